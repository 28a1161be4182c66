"""The whole command in one process: outputs, sidecars, going on, and what it refuses."""

import hashlib
import json
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoint import read_checkpoint
from pipeline.diffusion import RectifiedFlow
from pipeline.diffusion.sit import SiTFlow
from pipeline.runtime.publish import work_folder_of
from pipeline.vae import load_vae
from sample import progress, run
from sample.generate import Generator
from sample.options import ImageOptions, SampleOptions
from sample.resolve import resolve

NPZ = ("--num-samples", 10, "--batch-size", 4)


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_an_npz_and_its_sidecar_are_all_that_is_left(command, tmp_path, read_json):
    status, said = command("--out", tmp_path / "new" / "a.npz", *NPZ)
    assert status == 0
    assert listing(tmp_path / "new") == ["a.npz", "a.npz.json"]
    assert "10 samples: ddpm, 3 steps, guidance 4, seed 0, batches of 4 on cpu" in said
    assert "estimate: " in said
    with np.load(tmp_path / "new" / "a.npz") as content:
        assert content["arr_0"].shape == (10, 64, 64, 3)
        assert content["arr_1"].shape == (10,)
        assert content["arr_0"].std() > 5


def test_a_decoders_lane_is_part_of_the_plan_where_it_does_not_follow_from_the_batch(tiny, vae_folder, monkeypatch):
    options = SampleOptions(checkpoint=str(tiny), out="a.npz", vae=str(vae_folder), images=ImageOptions(num_samples=4))
    assert "decode_lane" not in resolve(options).recipe
    monkeypatch.setattr("sample.resolve.choose_device", lambda *_: (torch.device("meta"), "no CPU, as a GPU is none"))
    monkeypatch.setattr("sample.decode.DECODED_PX", 2 * 64 * 64)
    assert resolve(options).recipe["decode_lane"] == 2


@pytest.mark.parametrize(("precision", "tf32"), [("no", False), ("bf16", True)])
def test_the_networks_precision_switches_tf32_for_all_that_is_computed(
    command, tmp_path, monkeypatch, noted_tf32, precision, tf32
):
    """The switch itself is tried in tests/pipeline/runtime; here it stands around every pass, and is put back."""
    passes, here = [], noted_tf32.here
    for name in ("latents", "pixels"):
        real = getattr(Generator, name)
        monkeypatch.setattr(Generator, name, lambda *a, real=real, **b: passes.append([*here]) or real(*a, **b))
    monkeypatch.setattr("sample.generate.float32_products", noted_tf32)
    status, _ = command("--out", tmp_path / "a.npz", *NPZ, "--mixed-precision", precision)
    assert status == 0 and passes == [[tf32]] * 6 and here == []


def test_the_sidecar_says_how_to_make_the_same_and_nothing_of_the_machine(command, tmp_path, tiny, read_json):
    out = tmp_path / "a.npz"
    command("--out", out, *NPZ, "--guidance-channels", 3, "--guidance-interval", "0.1:0.9")
    text = Path(f"{out}.json").read_text()
    content = json.loads(text)
    assert (content["format"], content["version"]) == ("dit-samples", 1)
    recipe = content["recipe"]
    for name, value in {
        "sampler": "ddpm",
        "steps": 3,
        "eta": 0.0,
        "guidance": 4.0,
        "guidance_channels": 3,
        "guidance_interval": [0.1, 0.9],
        "seed": 0,
        "batch_size": 4,
        "device": "cpu",
        "mixed_precision": "no",
        "decode_dtype": "float32",
    }.items():
        assert recipe[name] == value
    assert recipe["labels"]["rule"] == "random"
    assert recipe["checkpoint"]["step"] == 10
    assert recipe["checkpoint"]["weights"] == "ema"
    assert len(recipe["checkpoint"]["sha256"]) == len(recipe["vae"]["sha256"]) == len(content["output"]["sha256"]) == 64
    assert recipe["versions"]["torch"] == torch.__version__
    for hidden in (str(tmp_path), str(tiny), str(tiny.parent), "/"):
        assert hidden not in text


def test_the_same_command_again_says_so_and_does_nothing(command, tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    command("--out", out, *NPZ)
    before = out.stat()
    monkeypatch.setattr(Generator, "latents", None)
    for more in ((), ("--overwrite",)):
        status, said = command("--out", out, *NPZ, *more)
        assert status == 0
        assert "is finished, made with these very settings; nothing to do" in said
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_nothing_is_overwritten_without_the_flag_and_the_difference_is_named(command, tmp_path):
    out = tmp_path / "a.npz"
    command("--out", out, *NPZ)
    before = out.read_bytes()
    status, said = command("--out", out, *NPZ, "--seed", 1)
    assert status == 2
    assert "a.npz is there already, made another way (seed 0, not 1; " in said
    assert "pass --overwrite to replace it" in said
    assert out.read_bytes() == before
    status, _ = command("--out", out, *NPZ, "--seed", 1, "--overwrite")
    assert status == 0
    assert out.read_bytes() != before


def test_a_file_changed_since_is_noticed_and_made_again_when_asked(command, tmp_path):
    out = tmp_path / "a.npz"
    command("--out", out, *NPZ)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    status, said = command("--out", out, *NPZ)
    assert status == 2
    assert "is not what" in said
    out.write_bytes(whole[:-1] + b"x")
    command("--out", out, *NPZ, "--overwrite")
    assert out.read_bytes() == whole


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(command, tmp_path, monkeypatch):
    command("--out", tmp_path / "straight.npz", *NPZ)
    out, write = tmp_path / "a.npz", run._write_chunk

    def interrupted(work, chunk, latents, job):
        if chunk == 1:
            signal.raise_signal(signal.SIGTERM)
        write(work, chunk, latents, job)

    monkeypatch.setattr(run, "_write_chunk", interrupted)
    status, said = command("--out", out, *NPZ)
    assert status == 128 + signal.SIGTERM
    assert "stopped: 8 of 10 samples are kept" in said
    assert not out.exists()
    monkeypatch.setattr(run, "_write_chunk", write)
    status, said = command("--out", out, *NPZ)
    assert status == 0
    assert "10 samples, 8 of them there already" in said
    assert out.read_bytes() == (tmp_path / "straight.npz").read_bytes()
    assert "a.npz" in listing(tmp_path)
    assert not work_folder_of(out).exists()


@pytest.mark.parametrize("kind", ["a.npz", "f"])
@pytest.mark.parametrize("at", ["sidecar.write", "publish", "WorkFolder.remove"])
def test_an_interruption_while_the_output_is_put_together_is_mended_too(command, tmp_path, monkeypatch, kind, at):
    class Killed(BaseException):
        pass

    def kill(*_args, **_kwargs):
        raise Killed

    out = tmp_path / kind
    with monkeypatch.context() as broken:
        broken.setattr(f"sample.run.{at}", kill)
        with pytest.raises(Killed):
            command("--out", out, *NPZ)
    status, _ = command("--out", out, *NPZ)
    assert status == 0
    assert [name for name in listing(tmp_path) if name.startswith(".")] == []
    assert (tmp_path / f"{kind}.json").is_file()
    assert len(list(out.rglob("*.png"))) == (10 if kind == "f" else 0)
    assert command("--out", out, *NPZ)[1].endswith("nothing to do\n")


def test_a_grid_is_rows_by_class_with_names(command, tmp_path):
    status, _ = command("--out", tmp_path / "g.png", "--classes", "golden retriever,7", "--samples-per-class", 3)
    assert status == 0
    with Image.open(tmp_path / "g.png") as picture:
        width, height = picture.size
    assert 2 * 64 < height < 3 * 64
    assert 3 * 64 + 40 < width < 8 * 64


def test_a_strip_shows_the_reverse_process(command, tmp_path):
    status, _ = command("--out", tmp_path / "g.png", "--samples-per-class", 1, "--trajectory", 4)
    assert status == 0
    with Image.open(tmp_path / "g.trajectory.png") as picture:
        width, height = picture.size
    assert width > 4 * 64
    assert height > 8 * 64  # four images, two rows each


def test_the_time_to_go_is_that_of_a_batch_s_steps_for_every_batch_that_is_missing(monkeypatch):
    said, clock = [], iter([0.0, 0.0, 6.0])
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    work, job = SimpleNamespace(missing=lambda: [2, 3]), SimpleNamespace(batch_size=8)
    bar = SimpleNamespace(set_postfix_str=lambda *_, **__: None, refresh=lambda: None)
    pace = progress.SamplingProgress(work, job, bar, SimpleNamespace(signal=None))
    pace.step(1, 4)
    pace.step(4, 4)
    assert said == ["estimate: 16 s to go, 1 images/s before decoding"]


@pytest.mark.parametrize(("process", "fed", "shown"), [(RectifiedFlow(), 250.0, 250.0), (SiTFlow(), 0.25, 750.0)])
def test_a_strip_tells_every_process_s_times_from_noise_at_1000_to_data_at_0(process, fed, shown):
    job = SimpleNamespace(generator=SimpleNamespace(checkpoint=SimpleNamespace(process=process)))
    assert run._shown_time(fed, job) == shown


def test_a_folder_has_a_sub_folder_per_class(command, tmp_path):
    command("--out", f"{tmp_path}/f/", "--classes", "1,7", "--samples-per-class", 2)
    assert listing(tmp_path / "f") == ["n01", "n01/000000.png", "n01/000001.png",
                                       "n07", "n07/000002.png", "n07/000003.png"]  # fmt: skip
    assert (tmp_path / "f.json").is_file()


def test_raw_latents_need_no_vae_and_decode_to_the_same_images(command, tmp_path, vae_folder):
    from safetensors.numpy import load_file

    from pipeline.vae import load_vae

    status, _ = command("--out", tmp_path / "l.safetensors", *NPZ, vae=None)
    assert status == 0
    command("--out", tmp_path / "a.npz", *NPZ)
    content = load_file(tmp_path / "l.safetensors")
    decoded = load_vae(str(vae_folder)).decode(torch.from_numpy(content["latents"])).numpy()
    with np.load(tmp_path / "a.npz") as images:
        assert np.abs(images["arr_0"].astype(int) - decoded).max() <= 1
        assert (images["arr_1"] == content["label"]).all()


def test_an_unconditional_checkpoint_gives_images_without_guidance(command, tmp_path, make_checkpoint, read_json):
    plain = make_checkpoint("unconditional", num_classes=0)
    status, _ = command("--out", tmp_path / "u.png", "--num-samples", 4, checkpoint=plain)
    assert status == 0
    assert read_json(tmp_path / "u.png.json")["recipe"]["guidance"] == 1.0
    status, said = command("--out", tmp_path / "v.png", "--guidance", 2, checkpoint=plain)
    assert status == 2
    assert "--guidance 2.0 cannot apply: this checkpoint is unconditional" in said


def test_a_checkpoint_without_label_dropout_is_sampled_without_guidance(command, tmp_path, make_checkpoint):
    checkpoint = make_checkpoint("no-null", class_dropout_prob=0.0)
    status, said = command("--out", tmp_path / "a.npz", *NPZ, checkpoint=checkpoint)
    assert status == 0
    assert "note: sampling without guidance, because this checkpoint was trained without label dropout" in said


def test_a_flow_checkpoint_has_its_own_samplers(command, tmp_path, make_checkpoint):
    flow = make_checkpoint("flow", process=RectifiedFlow(), learn_sigma=False)
    assert command("--out", tmp_path / "a.npz", *NPZ, checkpoint=flow)[0] == 0
    status, said = command("--out", tmp_path / "b.npz", *NPZ, "--sampler", "ddpm", checkpoint=flow)
    assert status == 2
    assert "--sampler ddpm does not fit this checkpoint's process; it takes heun, euler" in said


def test_raw_weights_and_further_averages_are_taken_when_asked_for(command, tmp_path, make_checkpoint, read_json):
    checkpoint = make_checkpoint("averages", averages=("ema-slow",))
    for name, weights in (("raw", "raw"), ("slow", "ema-slow")):
        assert command("--out", tmp_path / f"{name}.npz", *NPZ, "--weights", name, checkpoint=checkpoint)[0] == 0
        assert read_json(tmp_path / f"{name}.npz.json")["recipe"]["checkpoint"]["weights"] == weights
    status, said = command("--out", tmp_path / "ema.npz", *NPZ, checkpoint=checkpoint)
    assert status == 2
    assert "has no ema weights; pass --weights" in said


def test_compile_is_left_out_on_a_cpu_with_the_reason(command, tmp_path, read_json):
    assert command("--out", tmp_path / "a.npz", *NPZ)[0] == 0
    status, said = command("--out", tmp_path / "b.npz", *NPZ, "--compile")
    assert status == 0
    assert "--compile is left out: on a CPU" in said
    assert read_json(tmp_path / "b.npz.json")["recipe"]["compile"] is False
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_images_of_a_number_do_not_depend_on_how_many_there_are(command, tmp_path):
    command("--out", tmp_path / "few.npz", "--num-samples", 5, "--batch-size", 4)
    command("--out", tmp_path / "more.npz", "--num-samples", 9, "--batch-size", 4)
    with np.load(tmp_path / "few.npz") as few, np.load(tmp_path / "more.npz") as more:
        assert (few["arr_0"][:5] == more["arr_0"][:5]).all()
        assert (few["arr_1"] == more["arr_1"][:5]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "0,golden retreiver"), "class 'golden retreiver' is unknown; did you mean golden retriever"),
        (("--classes", "crane"), "class 'crane' is ambiguous: it could be 3 (n03, crane), 4 (n04, crane)"),
        (("--sampler", "ddmp"), "--sampler ddmp does not fit this checkpoint's process; did you mean ddpm?"),
        (("--eta", "0.5"), "--eta 0.5 is for --sampler ddim, not ddpm"),
        (("--steps", "1001"), "1001"),
        (("--device", "tpu"), "--device tpu is not a device; use auto, cpu, cuda or cuda:N"),
        (("--num-samples", "20000"), "a grid of 20000 images is too large to look at; choose at most 19531"),
        (
            ("--num-samples", "20000000"),
            "a grid of 20000000 images is too large to look at",
        ),  # before they have classes
        (("--labels", "nowhere.txt"), "--labels nowhere.txt is neither random nor balanced nor a file"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(command, tmp_path, arguments, message):
    status, said = command("--out", tmp_path / "a.png", *arguments)
    assert status == 2
    assert said.startswith("dit-sample: error: ")
    assert message in said
    assert said.count("\n") == 1
    assert listing(tmp_path) == []


def test_a_folder_that_is_no_run_is_refused(command, tmp_path):
    (tmp_path / "notes").mkdir()
    status, said = command("--out", tmp_path / "a.png", checkpoint=tmp_path / "notes")
    assert status == 2
    assert "is no checkpoint" in said


def test_a_vae_that_is_not_the_checkpoints_is_refused_unless_it_is_meant(command, tmp_path, make_checkpoint):
    other = make_checkpoint("other-vae", info={"vae": {"name": "demo", "class": "AutoencoderKL", "sha256": "0" * 64,
                                                       "scaling_factor": 1.0, "shift_factor": None}})  # fmt: skip
    status, said = command("--out", tmp_path / "a.npz", *NPZ, checkpoint=other)
    assert status == 2
    assert "fingerprint" in said
    assert listing(tmp_path) == []
    assert command("--out", tmp_path / "a.npz", *NPZ, "--allow-other-vae", checkpoint=other)[0] == 0


def test_values_that_are_not_finite_are_told_with_the_seed_the_image_and_its_class(command, tmp_path, make_checkpoint):
    checkpoint = make_checkpoint("poisoned-one", poison=True)
    status, said = command("--out", tmp_path / "a.npz", "--classes", "two,one", "--samples-per-class", 1, "--seed", 5,
                           checkpoint=checkpoint)  # fmt: skip
    assert status == 2
    assert "latents are not finite with seed 5: image 1 of class 1 (n01, one)" in said
    assert listing(tmp_path) == []


def test_a_network_that_does_not_fit_into_memory_says_so(command, tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Generator, "__init__", fails)
    status, said = command("--out", tmp_path / "a.npz", *NPZ)
    assert status == 2
    assert "do not fit into memory" in said


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_out_of_memory_says_what_to_lower(command, tmp_path, monkeypatch, error):
    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(Generator, "latents", fails)
    status, said = command("--out", tmp_path / "a.npz", *NPZ)
    assert status == 2
    assert "out of memory with --batch-size 4; lower it to 2" in said
    assert listing(tmp_path) == []


def test_a_folder_with_other_things_in_it_is_never_touched(command, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.tex").write_text("dear")
    for more in ((), ("--overwrite",)):
        status, said = command("--out", f"{tmp_path}/f/", *NPZ, *more)
        assert status == 2
        assert "holds other things" in said
    assert listing(tmp_path) == ["f", "f/thesis.tex"]


def test_what_a_user_put_into_a_folder_of_ours_is_never_lost(command, tmp_path):
    grid = ("--out", f"{tmp_path}/f/", "--classes", "0", "--samples-per-class")
    assert command(*grid, 1)[0] == 0
    for name in ("thesis.txt", "mine/photo.jpg", "n00/deep/000001.png"):
        path = tmp_path / "f" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        status, said = command(*grid, 2, "--overwrite")
        assert status == 2 and f"holds other things ({name})" in said
        assert path.read_text() == "mine"
        path.unlink()
    assert command(*grid, 2, "--overwrite")[0] == 0


def test_a_full_disk_is_one_sentence_and_finished_chunks_stay(command, tmp_path, monkeypatch):
    """The system refuses files beyond 30 kB, as a full disk refuses any; a chunk of four images has 49 kB."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, allowed[1]))
    try:
        status, said = command("--out", tmp_path / "a.npz", *NPZ)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert status == 2 and "cannot write" in said and "Traceback" not in said
    assert not (tmp_path / "a.npz").exists()


def test_weights_that_came_alone_take_the_factors_of_the_vae_that_is_given(command, tiny, tmp_path, read_json):
    """A state dict does not say which VAE its latents are of, so the one that is given does, in the sidecar too."""
    from safetensors.torch import load_file, save_file

    state = load_file(tiny / "ema.safetensors")
    save_file({**state, "pos_embed": read_checkpoint(tiny).model.pos_embed}, tmp_path / "bare.safetensors")
    demo = load_vae("demo")
    found = {}
    for name, flags in {"plain": (), "demo": ("--vae", "demo")}.items():
        out = tmp_path / f"{name}.safetensors"
        words = ("--out", out, "--num-samples", 2, "--num-heads", 4, *flags)
        assert command(*words, checkpoint=tmp_path / "bare.safetensors", vae=None)[0] == 0
        found[name] = load_file(out)["latents"]
        scaling = read_json(tmp_path / f"{name}.safetensors.json")["recipe"]["scaling"]
        expected = {"scaling_factor": 0.18215, "shift_factor": None}
        given = {"scaling_factor": demo.scaling_factor, "shift_factor": demo.shift_factor}
        assert scaling == (given if name == "demo" else expected)
    network = found["plain"] * 0.18215
    torch.testing.assert_close((found["demo"] - demo.shift_factor) * demo.scaling_factor, network, rtol=1e-4, atol=1e-4)


def test_a_vae_of_other_latents_is_refused_before_any_work(command, tmp_path, make_checkpoint):
    eight = make_checkpoint("eight", in_channels=8, info={"vae": {"name": None, "scaling_factor": 1.0}})
    status, said = command("--out", tmp_path / "a.npz", *NPZ, checkpoint=eight)
    assert status == 2 and "latents of 4 channels and cells of 8 pixels, but 8 channels" in said
    coarse = make_checkpoint(
        "coarse", info={"latent": {"kind": "moments", "channels": 4, "height": 8, "width": 8, "downsample": 16}}
    )
    status, said = command("--out", tmp_path / "a.npz", *NPZ, checkpoint=coarse)
    assert status == 2 and "cells of 16 pixels are needed" in said
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.npy", b""),
        ("empty.npz", b""),
        ("cut.npz", b"PK\x03\x04 and no more"),
        ("words.npy", b"no labels"),
    ],
)
def test_damaged_files_of_labels_are_one_sentence(command, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    status, said = command("--out", tmp_path / "a.npz", "--labels", tmp_path / name)
    assert status == 2 and f"{name} cannot be read as labels" in said


def test_labels_are_known_by_their_content_and_stand_in_the_sidecar_of_a_picture(command, tmp_path, read_json):
    np.save(tmp_path / "a.npy", np.array([3, 1, 2]))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    assert command("--out", tmp_path / "g.png", "--labels", tmp_path / "a.npz")[0] == 0
    assert read_json(tmp_path / "g.png.json")["recipe"]["labels"]["values"] == [3, 1, 2]


@pytest.mark.parametrize("out", ["", ".", "./", "/", ".."])
def test_an_output_without_a_name_is_refused(command, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    status, said = command("--out", out)
    assert status == 2 and "names no file or folder of its own" in said
    assert listing(tmp_path) == []


def test_a_name_that_is_too_long_is_told(command, tmp_path):
    status, said = command("--out", tmp_path / f"{'x' * 300}.npz")
    assert status == 2 and "cannot be used (File name too long)" in said


@pytest.mark.parametrize(("sampler", "most"), [("ddpm", 1000), ("dpm++", 999)])
def test_more_steps_than_there_are_are_refused_by_the_flag(command, tmp_path, sampler, most):
    status, said = command("--out", tmp_path / "a.npz", "--sampler", sampler, steps=most + 1)
    assert status == 2 and f"--steps {most + 1} is more than --sampler {sampler} can take here: at most {most}" in said


def test_a_strip_of_more_moments_than_there_are_is_refused_and_a_lost_one_is_told(command, tmp_path):
    status, said = command("--out", tmp_path / "g.png", "--classes", "1", "--trajectory", 5)
    assert status == 2 and "--trajectory 5 is more than the 3 steps and the result have" in said
    assert command("--out", tmp_path / "g.png", "--classes", "1", "--trajectory", 4)[0] == 0
    (tmp_path / "g.trajectory.png").unlink()
    status, said = command("--out", tmp_path / "g.png", "--classes", "1", "--trajectory", 4)
    assert status == 2 and "g.trajectory.png is gone" in said


def test_a_strip_is_known_by_its_content_and_one_of_other_images_is_told(command, tmp_path, read_json):
    arguments = "--out", tmp_path / "g.png", "--classes", "1", "--trajectory", 4
    assert command(*arguments)[0] == 0
    strip = tmp_path / "g.trajectory.png"
    made = strip.read_bytes()
    assert read_json(tmp_path / "g.png.json")["strip"]["sha256"] == hashlib.sha256(made).hexdigest()
    strip.write_bytes(made[:-1] + b"x")
    status, said = command(*arguments)
    assert status == 2 and "g.trajectory.png is not what its JSON says" in said
    assert command(*arguments, "--overwrite")[0] == 0
    assert strip.read_bytes() == made


@pytest.mark.parametrize("kind", ["a.npz", "a.safetensors"])
def test_a_disk_without_room_for_the_parts_and_the_output_is_told_before_anything_is_made(
    command, tmp_path, monkeypatch, kind
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    status, said = command("--out", tmp_path / "out" / kind, "--samples-per-class", 10)
    assert status == 2 and "has 50.0 kB free; free some space or choose another --out" in said
    assert listing(tmp_path) == []


def test_a_sidecar_that_is_no_json_is_a_strangers_file(command, tmp_path):
    assert command("--out", tmp_path / "a.npz", *NPZ)[0] == 0
    (tmp_path / "a.npz.json").write_text("{")
    status, said = command("--out", tmp_path / "a.npz", *NPZ)
    assert status == 2 and "is there already; pass --overwrite" in said
    assert command("--out", tmp_path / "a.npz", *NPZ, "--overwrite")[0] == 0


def test_an_unknown_class_is_told_with_the_flag(command, tmp_path):
    status, said = command("--out", tmp_path / "a.png", "--classes", "golden retreiver")
    assert status == 2 and "--classes: class 'golden retreiver' is unknown; did you mean golden retriever?" in said


def test_classes_of_one_name_and_names_that_cannot_be_drawn_are_told_apart_in_pictures(make_checkpoint, vae_folder):
    names = ["crane", "crane", "сова", "貓", "Crête, the"]
    ids = ["n1", "n2", "owl", "貓", "n5"]
    folder = make_checkpoint("names", num_classes=5, info={"classes": names, "class_ids": ids})
    options = SampleOptions(checkpoint=str(folder), out="a.png", vae=str(vae_folder))
    job = resolve(options)
    assert [job.class_name(label) for label in range(5)] == ["crane (n1)", "crane (n2)", "owl", "3", "Crête"]


def test_a_file_in_the_way_of_the_sidecar_or_the_output_is_not_lost(command, tmp_path):
    (tmp_path / "a.npz.json").write_text("{}")
    status, said = command("--out", tmp_path / "a.npz", *NPZ)
    assert status == 2
    assert "a.npz.json is in the way" in said
    (tmp_path / "b.npz").write_text("mine")
    status, said = command("--out", tmp_path / "b.npz", *NPZ)
    assert status == 2
    assert "b.npz is there already; pass --overwrite" in said
    assert (tmp_path / "b.npz").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused_before_any_work(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Generator, "latents", None)
    status, said = command("--out", tmp_path / "file" / "a.npz", *NPZ)
    assert status == 2
    assert "is a file" in said or "cannot write" in said


def test_class_names_of_a_stranger_cannot_leave_the_folder(command, tmp_path, make_checkpoint):
    evil = make_checkpoint("evil", info={"class_ids": ["../../up", "/abs", "..", "", "ok", "a/b", "c", "d"]})
    status, _ = command("--out", f"{tmp_path}/in/f/", "--samples-per-class", 1, checkpoint=evil)
    assert status == 0
    folders = {path.name for path in (tmp_path / "in" / "f").iterdir()}
    assert folders == {"0000", "0001", "0002", "0003", "ok", "0005", "c", "d"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_overwrite_of_a_finished_output_drops_unfinished_work_for_another_one(command, tmp_path):
    out = tmp_path / "s.npz"
    assert command("--out", out, "--num-samples", 2)[0] == 0
    work = work_folder_of(out)
    work.mkdir()
    (work / "plan.json").write_text('{"seed": 1}')
    assert command("--out", out, "--num-samples", 2)[0] == 0
    assert work.exists(), "it may be gone on with"
    assert command("--out", out, "--num-samples", 2, "--overwrite")[0] == 0
    assert not work.exists()
