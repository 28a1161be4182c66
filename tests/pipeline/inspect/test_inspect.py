"""dit-inspect: what it prints is what is there, and what is damaged is named."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.folder import describe_files, write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.dit import DiT, DiTConfig
from pipeline.inspect import __main__
from pipeline.runtime.files import sha256_of

CONFIG = DiTConfig(input_size=4, hidden_size=128, depth=6, num_heads=4, num_classes=3)


@pytest.fixture
def run(capsys):
    """The command in this process: (exit status, its lines, what it complained about)."""

    def call(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["dit-inspect", *map(str, arguments)])
            status = __main__.main()
        said = capsys.readouterr()
        return status, said.out.splitlines(), said.err

    return call


def facts_in(lines):
    return dict(line.split("  ", 1) for line in lines if "  " in line)


@pytest.fixture
def run_folder(tmp_path):
    """A run with two checkpoints; the newest has raw and EMA weights and can be resumed."""
    weights = DiT(CONFIG).state_dict()
    for step in (10, 20):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:07d}"
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "optimizer.bin").write_bytes(bytes(5000))
        info = {
            **default_info(CONFIG, classes=["zero", "one", "two"], class_ids=["zero", "one", "two"]),
            "step": step,
            "training": {"seed": 7, "batch_size": 256},
            "vae": {
                "name": "demo",
                "class": "AutoencoderKL",
                "sha256": "ab" * 32,
                "scaling_factor": 0.5,
                "shift_factor": None,
            },
        }
        write_model_files(folder, info=info, model=weights, averages={"ema": weights})
    return tmp_path / "run"


def test_a_run_is_described_by_its_newest_checkpoint(run_folder, run):
    status, lines, _ = run(run_folder)
    assert status == 0
    found = {name: value.strip() for name, value in facts_in(lines).items()}
    newest = run_folder / "checkpoints" / "step-0000020"
    assert found["checkpoints"] == "at step 10  20"
    assert found["checkpoint"] == str(newest)
    assert found["step"] == "20"
    assert found["model"] == "DiT-Ti/2, adaln-zero"
    assert found["parameters"] == f"{sum(p.numel() for p in DiT(CONFIG).parameters()):,}"
    assert found["objective"].startswith("ddpm (schedule linear, steps 1000, prediction epsilon")
    assert found["classes"] == "3: zero; one; two"
    assert found["VAE"] == f"demo (AutoencoderKL), scale 0.5, shift None, sha256 {'ab' * 32}"
    assert found["training"] == "seed 7, batch_size 256"
    assert sha256_of(newest / "ema.safetensors") in found["ema"]
    assert sha256_of(newest / "model.safetensors") in found["raw"]
    assert found["resuming"] == "possible, state/ takes 5.0 kB"


def test_values_stand_in_one_column(run_folder, run):
    _, lines, _ = run(run_folder / "checkpoints" / "step-0000010")
    starts = {len(line) - len(line.split("  ", 1)[1].lstrip()) for line in lines[:12]}
    assert len(starts) == 1


def test_a_bare_state_dict_is_described_too(tmp_path, run):
    model = DiT(CONFIG)
    save_file({**model.state_dict(), "pos_embed": model.pos_embed}, tmp_path / "w.safetensors")
    status, lines, _ = run(tmp_path / "w.safetensors")
    found = {name: value.strip() for name, value in facts_in(lines).items()}
    assert (status, found["step"], found["latent"]) == (0, "not recorded", "4×4×4 (moments)")


def test_verify_finds_weights_that_do_not_fit_or_are_no_numbers(run_folder, run):
    status, lines, _ = run(run_folder, "--verify")
    assert (status, lines[-1]) == (0, "verified: ema and raw fit the network exactly, every value is finite")
    file = run_folder / "checkpoints" / "step-0000020" / "model.safetensors"
    weights = load_file(file)
    weights["x_embedder.proj.bias"][3] = float("nan")
    save_file(weights, file)
    status, _, err = run(run_folder, "--verify")
    assert status == 2
    assert "the raw weights" in err
    assert "not finite: x_embedder.proj.bias" in err
    del weights["final_layer.linear.bias"]
    save_file(weights, file)
    status, _, err = run(run_folder, "--verify")
    assert (status, "1 missing: final_layer.linear.bias" in err) == (2, True)


def test_a_damaged_average_is_not_passed_over(run_folder, run):
    path = run_folder / "checkpoints" / "step-0000020" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    status, _, err = run(run_folder)
    assert (status, "ema.safetensors is damaged" in err) == (2, True)


def test_verify_names_every_file_of_a_checkpoint_that_is_not_as_training_wrote_it(run_folder, run):
    folder = run_folder / "checkpoints" / "step-0000020"
    files = ["ema.safetensors", "model.safetensors", "state/optimizer.bin"]
    listing = {"files": describe_files(folder, [folder / name for name in files])}
    (folder / "state" / "files.json").write_text(json.dumps(listing))
    assert run(run_folder, "--verify")[0] == 0
    content = bytearray((folder / "ema.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "ema.safetensors").write_bytes(content)
    (folder / "state" / "optimizer.bin").unlink()
    status, _, err = run(run_folder, "--verify")
    assert status == 2
    assert "ema.safetensors has other contents than were written; state/optimizer.bin is missing" in err


def test_the_papers_table_is_printed_within_five_seconds_without_a_path(run):
    import torch.utils.flop_counter  # noqa: F401 -- what is timed is the counting

    start = time.process_time()
    status, lines, _ = run("--models")
    assert time.process_time() - start < 5
    assert status == 0
    assert len(lines) == 17 + 3 + 6
    assert lines[18] == "with modern blocks:"
    assert lines[20].split() == ["DiT-S/2", "4×32×32", "32,843,563", "6.055674"]
    assert lines[3].split()[:6] == ["DiT-S/2", "adaln-zero", "4×32×32", "32,865,056", "33", "6.055674"]


def test_what_a_gpu_would_hold_is_printed_for_every_network(run):
    _, alone, _ = run("--models", "--batch-size", "256")
    _, eight, _ = run("--models", "--batch-size", "256", "--processes", "8")
    assert len(alone) == len(eight) == 2 * 15 + 2
    assert alone[10].split()[:4] == ["DiT-XL/2", "4×32×32", "10.06", "1.26"] and "116.3" in alone[10]
    assert float(eight[10].split()[6]) == pytest.approx(10.06 + 1.26 + 2.51 + 32 * 0.41, abs=0.2)
    assert float(eight[10].split()[8]) < float(eight[10].split()[6])
    assert eight[16] == "sampling 32 at a time on each, guided:"
    _, _, weights, image, vae, decoding, peak = (float(x) if "." in x else 0 for x in eight[27].split())
    assert eight[27].startswith("DiT-XL/2") and (weights, vae, decoding) == (1.26, 0.31, 3.0)
    assert peak == pytest.approx(1.26 + 32 * image + 0.31 + 3.0, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("somewhere", "--batch-size", "8"), "give --models too"),
        (("--models", "--processes", "2"), "--processes shares --batch-size"),
        (("--models", "--batch-size", "2", "--processes", "4"), "no less than --processes"),
        ((), "give the PATH of a store or a checkpoint, or --models"),
        (("--verify",), "give the PATH"),
        (("somewhere", "--classes", "3"), "give --grid PNG too"),
        (("somewhere", "--grid", "sheet.jpg"), "must end in .png"),
        (("somewhere",), "there is no checkpoint at somewhere"),
    ],
)
def test_bad_input_gives_one_sentence_and_status_two(run, arguments, complaint):
    status, lines, err = run(*arguments)
    assert (status, lines) == (2, [])
    assert complaint in err
    assert len(err.strip().splitlines()) == 1


def test_a_grid_of_a_checkpoint_points_to_the_sampler(run_folder, tmp_path, run):
    status, _, err = run(run_folder, "--grid", tmp_path / "x.png")
    assert (status, "draw a checkpoint's images with dit-sample" in err) == (2, True)


def test_help_does_not_load_torch():
    code = "import sys; from pipeline.inspect.__main__ import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for flag in ("--verify", "--grid", "--models"):
        assert flag in done.stdout


@pytest.fixture(scope="module")
def demo_vae():
    from pipeline.vae import load_vae

    return load_vae("demo").describe()


@pytest.fixture
def store(tmp_path, demo_vae):
    """A function that makes a store of two shards of five samples; label 2 of three classes has no sample."""

    def make(*, classes=("zero", "one", "two"), shard_format="safetensors"):
        from pipeline.latents.writer import LatentSpec, StoreDescription, finish_store, write_shard

        folder = tmp_path / "store"
        folder.mkdir()
        latent = LatentSpec(kind="moments", channels=4, height=4, width=4, dtype="float16", downsample=8)
        for shard in range(2):
            draws = torch.Generator().manual_seed(shard)
            moments = torch.randn(5, 1, 8, 4, 4, generator=draws).half()
            labels = [k % 2 if classes else -1 for k in range(5)]
            keys = [f"{shard}-{k}.png" for k in range(5)]
            indices = list(range(5 * shard, 5 * shard + 5))
            write_shard(folder, "train", shard, shard_format, moments, labels, indices, keys)
        description = StoreDescription(
            split="train",
            shard_format=shard_format,
            latent=latent,
            views=["center"],
            image={"size": 32, "crop": "adm-center"},
            vae=demo_vae,
            classes=list(classes),
            class_ids=[f"id-{name}" for name in classes],
            seed=0,
        )
        assert finish_store(folder, description, shards=2) is not None
        return folder

    return make


def test_a_store_is_described_with_counts_statistics_and_size(store, run):
    folder = store()
    status, lines, err = run(folder)
    assert status == 0, err
    found = {name: value.strip() for name, value in facts_in(lines).items()}
    assert found["samples"] == "10 (train), 0 inputs skipped"
    assert found["latent"] == "4×4×4 moments, float16, one cell for 8 px"
    assert found["VAE"].startswith("demo (AutoencoderKL), scale")
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert found["size"] == f"{written / 1000:.1f} kB in 2 shards"
    assert [line.split() for line in lines[-4:]] == [
        ["label", "id", "class", "samples"],
        ["0", "id-zero", "zero", "6"],
        ["1", "id-one", "one", "4"],
        ["2", "id-two", "two", "0"],
    ]
    channels = next(number for number, line in enumerate(lines) if line.startswith("channel"))
    assert len(lines[channels + 1].split()) == 3


@pytest.mark.parametrize("shard_format", ["safetensors", "webdataset"])
def test_verify_names_the_shard_with_one_flipped_bit(store, run, shard_format):
    folder = store(shard_format=shard_format)
    status, lines, _ = run(folder, "--verify")
    assert status == 0
    assert lines[-1].startswith("verified:")
    shard = next(path for path in sorted(folder.glob("train-00001.*")) if path.suffix != ".json")
    content = bytearray(shard.read_bytes())
    content[-2000 if shard_format == "webdataset" else -200] ^= 4
    shard.write_bytes(content)
    status, _, err = run(folder, "--verify")
    assert status == 2
    assert shard.name in err
    assert "train-00000" not in err


def test_the_grid_draws_the_chosen_classes_in_labelled_rows(store, tmp_path, run):
    from PIL import Image

    status, _, err = run(store(), "--grid", tmp_path / "a.png", "--classes", "one,0", "--per-class", 5)
    assert status == 0, err
    with Image.open(tmp_path / "a.png") as picture:
        both = picture.size
    assert run(tmp_path / "store", "--grid", tmp_path / "b.png", "--classes", "one", "--per-class", 5)[0] == 0
    with Image.open(tmp_path / "b.png") as picture:
        one = picture.size
    assert both[1] > one[1]
    assert min(both[0], one[0]) > 5 * 64
    status, _, err = run(tmp_path / "store", "--grid", tmp_path / "c.png", "--classes", "two")
    assert (status, "has no samples of class 2 (id-two, two)" in err) == (2, True)
    status, _, err = run(tmp_path / "store", "--grid", tmp_path / "c.png", "--classes", "tow")
    assert (status, "did you mean two?" in err) == (2, True)
    assert not (tmp_path / "c.png").exists()


def test_a_store_without_labels_is_drawn_too(store, tmp_path, run):
    status, lines, err = run(store(classes=()), "--grid", tmp_path / "a.png", "--per-class", 4)
    assert status == 0, err
    assert lines[-1] == f"written: {tmp_path / 'a.png'}, 10 images"
    status, _, err = run(tmp_path / "store", "--grid", tmp_path / "b.png", "--classes", "0")
    assert (status, "has no classes; drop --classes" in err) == (2, True)


def test_an_unfinished_store_says_so(store, run):
    folder = store()
    (folder / "manifest.json").unlink()
    status, _, err = run(folder)
    assert status == 2
    assert "not finished" in err
