"""Image k from (seed, k) alone, and what a step costs."""

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from pipeline.checkpoint import read_checkpoint
from pipeline.diffusion import SAMPLERS, GaussianDiffusion, RectifiedFlow
from pipeline.dit import compile_blocks
from pipeline.vae import load_vae
from sample.decode import NotFiniteError, Overlap, decode_lane, overlapping
from sample.generate import Generator, ReversePlan
from sample.options import ComputeOptions, ReverseOptions
from sample.resolve import resolve_plan
from sample.trajectory import Watch

DEFAULTS = {
    "sampler": "ddpm",
    "steps": 4,
    "eta": 0.0,
    "guidance": 1.5,
    "channels": None,
    "interval": None,
    "seed": 3,
    "precision": "no",
}


@pytest.fixture(scope="module")
def vae(vae_folder):
    return load_vae(str(vae_folder))


@pytest.fixture
def generator(tiny, vae):
    def make(batch_size, path=tiny, **changes):
        plan = ReversePlan(**{**DEFAULTS, "batch_size": batch_size, **changes})
        return Generator(read_checkpoint(path), plan, device="cpu", vae=vae)

    return make


def labels(first, count):
    return (np.arange(first, first + count) * 3) % 8


def images(generator, total):
    size = generator.plan.batch_size
    starts = range(0, total, size)
    parts = [generator.pixels(generator.latents(start, labels(start, size))) for start in starts]
    return np.concatenate(parts)[:total]


@pytest.fixture(scope="module")
def record_draws():
    """Wraps a generator so that every draw is kept by (image, step)."""

    def wrap(generator):
        draws, inner = {}, generator._noise

        def noise(first, count, *step):
            batch = inner(first, count, *step)
            draws.update({(first + row, *step): batch[row].clone() for row in range(count)})
            return batch

        generator._noise = noise
        return draws

    return wrap


def test_noise_is_bit_equal_for_batches_of_1_7_and_64(generator, record_draws):
    taken = {}
    for size in (1, 7, 64):
        made = generator(size, steps=3)
        taken[size] = record_draws(made)
        for first in range(0, 14, size):
            made.latents(first, labels(first, size))
    for key, drawn in taken[1].items():
        assert torch.equal(drawn, taken[7][key])
        assert torch.equal(drawn, taken[64][key])
    assert len(taken[1]) == 14 * 3  # the start and two of three steps: the last draws nothing


def test_every_image_and_every_step_has_noise_of_its_own(generator, record_draws):
    made = generator(4, steps=3)
    draws = record_draws(made)
    made.latents(0, labels(0, 4))
    values = [tuple(drawn.flatten()[:3].tolist()) for drawn in draws.values()]
    assert len(set(values)) == len(values)


def test_pixels_differ_by_at_most_one_level_between_batch_sizes(generator):
    reference = images(generator(7), 28).astype(int)
    for size in (1, 16, 64):
        assert np.abs(images(generator(size), 28) - reference).max() <= 1


def test_pixels_are_equal_for_one_batch_size_in_any_order_and_company(generator):
    made = generator(8)
    alone = made.latents(8, labels(8, 8))
    after = generator(8)
    after.latents(16, labels(16, 8))
    assert torch.equal(after.latents(8, labels(8, 8)), alone)
    other_neighbours = labels(8, 8)
    other_neighbours[4:] = 0
    assert torch.equal(made.latents(8, other_neighbours)[:4], alone[:4])
    assert (made.pixels(alone) == after.pixels(alone)).all()


def test_pixels_do_not_depend_on_the_number_of_threads(generator):
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(images(generator(16), 16))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_a_compiled_network_gives_the_same_images(generator):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a network that is yet to be compiled wants one lane at a time
    try:
        plain, compiled = generator(8), generator(8)
        compile_blocks(compiled.model, backend="aot_eager")
        assert np.abs(images(plain, 8).astype(int) - images(compiled, 8)).max() <= 1
    finally:
        torch.set_num_threads(threads)


def test_another_seed_gives_other_images(generator):
    assert (images(generator(4), 4) != images(generator(4, seed=4), 4)).mean() > 0.5


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 8), (1.5, 16)])
def test_no_guidance_costs_half_of_guidance(generator, guidance, rows):
    made = generator(8, guidance=guidance, steps=2)
    seen = []
    made.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    made.latents(0, labels(0, 8))
    assert sum(seen) == rows * 2


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
def test_every_sampler_gives_images_that_do_not_depend_on_company(generator, sampler):
    made = generator(4, sampler=sampler)
    assert torch.equal(made.latents(0, labels(0, 4)), generator(4, sampler=sampler).latents(0, labels(0, 4)))


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde", "dpm++2m"])
def test_flow_checkpoints_are_sampled_too(generator, make_checkpoint, sampler):
    flow = make_checkpoint(f"flow-{sampler}", process=RectifiedFlow(), learn_sigma=False)
    made = generator(4, path=flow, sampler=sampler)
    assert torch.isfinite(made.latents(0, labels(0, 4))).all()


def test_an_unconditional_flow_is_sampled_with_times_that_are_no_whole_numbers(generator, make_checkpoint):
    flow = make_checkpoint("flow-unconditional", process=RectifiedFlow(), learn_sigma=False, num_classes=0)
    made = generator(4, path=flow, sampler="euler", guidance=1.0, steps=3)
    assert torch.isfinite(made.latents(0, np.full(4, -1))).all()


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_every_precision_is_that_of_autocast_by_hand_and_near_float32(generator, tiny, precision, dtype):
    made = generator(4, sampler="ddim", steps=2, guidance=1.0, precision=precision)
    kinds = []
    made.model.blocks[0].attn.qkv.register_forward_hook(lambda _, __, output: kinds.append(output.dtype))
    found = made.latents(0, labels(0, 4))
    assert set(kinds) == {dtype or torch.float32}

    def by_hand(dtype):
        model, y = read_checkpoint(tiny).model.eval(), torch.from_numpy(labels(0, 4))
        rows = []
        for row in range(4):  # in lanes of one, as a batch of four is cut
            with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                x = made._noise(row, 1)
                rows.append(
                    SAMPLERS["ddim"](GaussianDiffusion(), partial(model, y=y[row : row + 1]), x, pytest.fail, steps=2)
                )
        return made.raw(torch.cat(rows))

    assert torch.equal(found, by_hand(dtype))
    error = (found - by_hand(None)).norm() / found.norm()
    assert error == 0 if dtype is None else 0 < error < 0.05


def test_weights_of_products_are_cast_once_when_the_network_is_taken_and_no_others(generator):
    kept = {
        name
        for name, weight in generator(4, precision="bf16").model.state_dict().items()
        if weight.dtype != torch.bfloat16
    }
    assert kept == {"y_embedder.embedding_table.weight"}


def test_a_gpus_noise_is_drawn_ahead_and_is_the_same(generator):
    made, there = generator(4, steps=5), generator(4, steps=5)
    there._on_cpu, drawn, inner = False, [], there._noise
    there._noise = lambda *key: drawn.append((key[2:], threading.current_thread())) or inner(*key)
    with made._noise_of(8) as here, there._noise_of(8) as ahead:
        for step in ((), (0,), (1,), (2,), (3,)):
            assert torch.equal(here(*step), ahead(*step))
    assert [step for step, _ in drawn] == [(), (0,), (1,), (2,), (3,)]
    assert [thread is threading.main_thread() for _, thread in drawn] == [True, True, False, False, False]


def test_the_memory_of_a_decoders_lane_on_a_gpu_does_not_grow_with_the_image():
    gpu = torch.device("cuda")
    assert [decode_lane(gpu, pixels=side**2) for side in (128, 256, 512, 1024, 2048)] == [64, 16, 4, 1, 1]
    assert {decode_lane(torch.device("cpu"), pixels=side**2) for side in (64, 256, 1024)} == {8}


def test_values_that_are_not_finite_are_told_by_their_rows(generator, make_checkpoint):
    made = generator(8, path=make_checkpoint("poisoned", poison=True))
    given = labels(0, 8)
    with pytest.raises(NotFiniteError, match="latents of rows") as error:
        made.latents(0, given)
    assert error.value.rows == np.flatnonzero(given == 1).tolist()
    latents = torch.zeros(8, 4, 8, 8)
    latents[5] = float("inf")
    with pytest.raises(NotFiniteError, match=r"decoded pixels of rows \[5\]"):
        made.pixels(latents)


def test_an_error_in_one_lane_ends_the_others(generator):
    made = generator(16, steps=50)
    seen = []

    def on_step(done, total):
        seen.append(done)
        if done == 3:
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        made.latents(0, labels(0, 16), on_step=on_step)
    assert seen == [1, 2, 3]


def test_steps_are_counted_over_all_lanes(generator):
    made = generator(16, steps=3)
    seen = []
    made.latents(0, labels(0, 16), on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]


def test_a_watch_keeps_evenly_spaced_moments_from_noise_to_the_result(generator):
    made = generator(8, steps=9)
    watch = Watch(4, rows=[1, 6])
    latents = made.latents(0, labels(0, 8), watch=watch)
    for row in (1, 6):
        moments = watch.of_row(row)
        assert [moment.k for moment in moments[:-1]] == [0, 3, 6]
        assert torch.equal(moments[0].x_t, made._noise(row, 1)[0])
        assert torch.equal(made.raw(moments[-1].x_t[None])[0], latents[row])
        assert [moment.t for moment in moments] == sorted((m.t for m in moments), reverse=True)
    assert torch.equal(generator(8, steps=9).latents(0, labels(0, 8)), latents)


@pytest.mark.parametrize(("guidance", "kept"), [(1.0, (None, None)), (0.0, (3, (0.1, 0.9))), (4.0, (3, (0.1, 0.9)))])
def test_what_is_guided_and_when_counts_wherever_guidance_does_anything_and_nowhere_else(tiny, guidance, kept):
    reverse = ReverseOptions(guidance=guidance, guidance_channels=3, guidance_interval="0.1:0.9")
    plan = resolve_plan(reverse, ComputeOptions(), read_checkpoint(tiny), samples=1, device="cpu")
    assert (plan.channels, plan.interval) == kept


def test_overlapped_work_runs_beside_the_main_thread_and_its_errors_come_out():
    threads = []
    with overlapping(enabled=True) as overlap:
        overlap.run(lambda: threads.append(threading.current_thread()))
    assert threads[0] is not threading.main_thread()
    overlap = Overlap(enabled=True)
    overlap.run(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        overlap.wait()
    with overlapping(enabled=False) as overlap:
        overlap.run(lambda: threads.append(threading.current_thread()))
    assert threads[1] is threading.main_thread()


def test_what_overlaps_ends_before_an_error_leaves_the_block():
    written = []

    def slow():
        time.sleep(0.3)
        written.append("whole")

    with pytest.raises(KeyboardInterrupt), overlapping(enabled=True) as overlap:
        overlap.run(slow)
        raise KeyboardInterrupt
    assert written == ["whole"]
