"""The encoder: a sample's latent depends on its pixels alone, and each process finds its device."""

from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from extract.encoder import Encoder, arithmetic, lane_of
from pipeline.images import to_pixels
from pipeline.vae import load_vae


def crops_of(count, seed=0, px=32):
    return [np.random.default_rng([seed, n]).integers(0, 256, (1, px, px, 3), dtype=np.uint8) for n in range(count)]


def encoder_of(vae, batch_size=4, **more):
    return Encoder(vae, batch_size=batch_size, flip=True, store_dtype=torch.float32, views=2, image_px=32, **more)


def neighbours_do_not_matter(vae):
    with arithmetic(vae.device), encoder_of(vae) as encoder:
        crops, others = crops_of(4), crops_of(4, seed=1)
        together = encoder.start(crops).result()
        assert together.shape == (4, *encoder.sample_shape) and together.device.type == "cpu"
        for row in range(4):
            assert torch.equal(encoder.start(crops[row : row + 1]).result()[0], together[row])
            assert torch.equal(encoder.start([*others[:2], crops[row], others[3]]).result()[2], together[row])
    return together


def test_a_latent_does_not_depend_on_what_else_is_in_the_batch(vae_folder):
    neighbours_do_not_matter(load_vae(str(vae_folder)))


def test_threads_of_the_caller_do_not_matter(vae_folder):
    vae, results = load_vae(str(vae_folder)), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with arithmetic(vae.device), encoder_of(vae) as encoder:
                results.append(encoder.start(crops_of(4)).result())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_within_rounding_and_is_compiled_by_one_thread(vae_folder, monkeypatch):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    vae = load_vae(str(vae_folder))
    with arithmetic(vae.device), encoder_of(vae) as encoder:
        plain = encoder.start(crops_of(4)).result()
    with arithmetic(vae.device), encoder_of(vae, compiled=True) as encoder:
        first = encoder.start(crops_of(4))
        compiled_by_then = counter.frame_count
        for latents in [first, *(encoder.start(crops_of(4)) for _ in range(4))]:
            torch.testing.assert_close(latents.result(), plain)
    assert counter.frame_count == compiled_by_then > 0
    torch.compiler.reset()


def test_bytes_become_the_same_pixels_on_every_device(vae_folder):
    images = np.concatenate(crops_of(2))
    with encoder_of(load_vae(str(vae_folder))) as encoder:
        looked_up = encoder._values[torch.from_numpy(images).permute(0, 3, 1, 2).int()]
    assert torch.equal(looked_up, torch.from_numpy(to_pixels(images)))


def test_a_pass_takes_no_more_memory_for_larger_images_on_a_gpu_and_is_as_ever_on_a_cpu():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [lane_of(gpu, px) for px in (32, 128, 256, 384, 512, 1024, 4096)] == [32, 32, 32, 14, 8, 2, 1]
    assert all(lane_of(gpu, px) * px**2 <= 32 * 256**2 for px in (64, 256, 320, 512, 768, 1024))
    assert {lane_of(cpu, px) for px in (32, 256, 1024)} == {4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_neighbours_do_not_matter_and_the_cpu_is_close(vae_folder, dtype):
    gpu = neighbours_do_not_matter(load_vae(str(vae_folder), device="cuda:0", dtype=dtype))
    cpu = neighbours_do_not_matter(load_vae(str(vae_folder)))
    torch.testing.assert_close(gpu, cpu, rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_two_processes_give_the_bytes_of_one(tmp_path, start, hashes):
    stores = {count: tmp_path / f"store-{count}" for count in (1, 2)}
    for count, out in stores.items():
        processes = [start("--out", out, "--device", "cuda") for _ in range(count)]
        for process in processes:
            process.join(120)
            assert process.exitcode == 0, process.log()
    assert hashes(stores[1]) == hashes(stores[2])
