"""Latents that other projects saved become stores: number for number, whatever kills it, and not if they are damaged."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.folder import write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.checkpoint.weight_files import save_pickled_tensors
from pipeline.convert.__main__ import main
from pipeline.convert.imports import import_latents
from pipeline.convert.layouts import LAYOUTS, find_layout
from pipeline.dit import DiT, DiTConfig
from pipeline.inspect.checkpoint import describe_checkpoint
from pipeline.inspect.store import describe_store
from pipeline.latents import LatentStore
from pipeline.latents.verify import verify
from pipeline.recorded import RecordedVae
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import typed
from pipeline.vae import denormalize, find_vae, load_vae, normalize
from tests.pipeline.convert.foreign import COUNT, LABELS, MAKERS, make, pack
from tests.train.runs import train

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    return make(request.param, tmp_path / "in")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_latent_label_and_key_stands_in_the_store_as_it_was_meant(made, tmp_path):
    assert find_layout(made.path) == made.layout
    manifest = import_latents(made.path, tmp_path / "out", samples_per_shard=5, store_dtype="float32")
    with LatentStore(tmp_path / "out") as store:
        latents, labels = store[:]
        order = store.indices().numpy()
    assert sorted(order) == list(range(COUNT)) and (manifest.latent.kind, manifest.views) == (made.kind, made.views)
    np.testing.assert_allclose(latents.numpy(), made.latents[order], rtol=1e-6, atol=0)
    if made.layout in {"lightningdit", "mar"}:  # nothing was computed
        assert np.array_equal(latents.numpy(), made.latents[order])
    assert labels.tolist() == [made.labels[index] for index in order]
    assert [key for shard in range(3) for key in keys_of(tmp_path / "out", shard)] == [made.keys[i] for i in order]
    assert manifest.vae == made.vae and manifest["import"]["layout"] == made.layout
    assert "the VAE's fingerprint" in manifest["import"]["unknown"]
    assert verify(tmp_path / "out") == []


def keys_of(store, shard):
    return json.loads((store / f"train-{shard:05d}.json").read_text())["keys"]


def test_lightningdit_s_mean_and_spread_are_what_training_feeds(tmp_path):
    made = make("lightningdit", tmp_path)
    stats = torch.load(made.path / "latents_stats.pt", weights_only=True)
    import_latents(made.path, tmp_path / "out", store_dtype="float32")
    with LatentStore(tmp_path / "out") as store:
        latents, vae = store[:][0], store.manifest.vae
    theirs = (latents - stats["mean"]) / stats["std"]
    torch.testing.assert_close(normalize(latents, vae["scaling_factor"], vae["shift_factor"]), theirs)


def test_classes_are_the_folders_or_the_numbers_or_those_given(made, tmp_path):
    manifest = import_latents(made.path, tmp_path / "out")
    ids = {"mar": ("n01440764", "n01443537", "n01484850")}.get(made.layout, ("0", "1", "2"))
    assert manifest.class_ids == ids
    assert manifest.classes[0] == ("tench, Tinca tinca" if made.layout == "mar" else "0")
    manifest = import_latents(made.path, tmp_path / "named", class_names=["ant", "bee", "cat"])
    assert manifest.classes == ("ant", "bee", "cat")
    with pytest.raises(UserError, match="and 2 names were given"):
        import_latents(made.path, tmp_path / "short", class_names=["ant", "bee"])


def test_without_labels_a_store_is_unlabelled(tmp_path):
    made = make("edm2_folder", tmp_path)
    (made.path / "dataset.json").write_text('{"labels": null}')
    assert import_latents(made.path, tmp_path / "out").classes == ()
    with LatentStore(tmp_path / "out") as store:
        assert store[:][1].tolist() == [-1] * COUNT


def test_a_zip_and_its_folder_are_the_same_latents(tmp_path):
    stores = []
    for name in ("edm2_folder", "edm2_zip"):
        import_latents(make(name, tmp_path / name).path, tmp_path / name / "out")
        stores.append((tmp_path / name / "out" / "train-00000.safetensors").read_bytes())
    assert stores[0] == stores[1]


def test_a_layout_can_be_said_where_a_name_says_another(tmp_path):
    made = make("repa", tmp_path)
    assert import_latents(made.path / "vae-sd", tmp_path / "a").vae["pixels"] == [-1, 1]
    assert import_latents(made.path / "vae-sd", tmp_path / "b", layout="edm2").vae["pixels"] == [0, 1]


def test_imports_killed_at_random_moments_end_with_the_same_bytes(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("killed_imports.py")), str(tmp_path), "6", "1", *MAKERS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for layout, report in json.loads(done.stdout).items():
        assert report["status"] == 0 and report["killed"] > 0, (layout, report, done.stderr)
        straight, killed = tmp_path / layout / "straight", tmp_path / layout / "killed"
        shutil.rmtree(killed / ".work", ignore_errors=True)  # what the killed left there
        assert contents(killed) == contents(straight)


def test_two_steps_are_trained_from_every_imported_store(made, tmp_path, capsys):
    import_latents(made.path, tmp_path / "out")
    assert train(tmp_path / "out", tmp_path / "run", steps=2) == 0, capsys.readouterr().err
    info = json.loads((tmp_path / "run" / "checkpoints" / "step-0000002" / "config.json").read_text())
    assert info["vae"] == made.vae and info["latent"]["downsample"] == (16 if len(made.views) == 2 else 8)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0.1 < loss < 10 for loss in losses)


def converted(monkeypatch, capsys, source, target, *flags):
    words = ["dit-convert", "--from", source, "--to", target, "--format", *flags]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    return main(), capsys.readouterr().err


@pytest.mark.parametrize("name", ["edm2_zip", "lightningdit"])
def test_a_network_of_imported_latents_keeps_their_scale_and_pixels_whatever_it_becomes(
    name, tmp_path, monkeypatch, capsys
):
    made = make(name, tmp_path)
    import_latents(made.path, tmp_path / "store")
    assert train(tmp_path / "store", tmp_path / "run", steps=1) == 0
    status, err = converted(monkeypatch, capsys, tmp_path / "run", tmp_path / "new", "dit")
    assert status == 0, err
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vae"] == made.vae
    assert "not recorded" in "".join(describe_checkpoint(str(tmp_path / "new"), verify=False, asked={}))
    if name == "lightningdit":
        assert "not recorded (AutoencoderKL)" in "".join(describe_store(tmp_path / "store"))
        return
    status, err = converted(monkeypatch, capsys, tmp_path / "run", tmp_path / "named", "dit", "--vae", "demo")
    assert status == 0, err
    kept = json.loads((tmp_path / "named" / "config.json").read_text())["vae"]
    assert kept["name"] == "demo" and kept["sha256"]
    assert all(kept[key] == made.vae[key] for key in ("scaling_factor", "shift_factor", "pixels"))
    status, err = converted(monkeypatch, capsys, tmp_path / "run", tmp_path / "pipe", "diffusers", "--vae", "demo")
    assert (status, "pixels in [0, 1], as EDM2 makes them, which a diffusers pipeline cannot" in err) == (2, True)
    assert not (tmp_path / "pipe").exists()


def test_a_pipeline_of_diffusers_decodes_with_the_scale_of_the_latents_and_not_the_vae_s(tmp_path, monkeypatch, capsys):
    from diffusers import AutoencoderKL

    config = DiTConfig(input_size=4, hidden_size=64, depth=1, num_heads=4, num_classes=3)
    recorded = {"name": "demo", "scaling_factor": [0.5, 2.0, 1.0, 4.0], "shift_factor": [1.0, 0.0, -2.0, 3.0]}
    info = {**default_info(config), "vae": {**recorded, "pixels": [-1, 1]}}
    (tmp_path / "own").mkdir()
    write_model_files(tmp_path / "own", info=info, model=None, averages={"ema": DiT(config, seed=0).state_dict()})
    status, err = converted(monkeypatch, capsys, tmp_path / "own", tmp_path / "pipe", "diffusers")
    assert status == 0, err
    vae = AutoencoderKL.from_pretrained(tmp_path / "pipe" / "vae")
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = load_vae("demo")
    with torch.no_grad():
        theirs = vae.decode(x / vae.config.scaling_factor).sample
    ours = plain.decode_values(denormalize(x, recorded["scaling_factor"], recorded["shift_factor"]))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_the_command_says_what_was_kept_and_what_is_not_known(tmp_path, capsys, monkeypatch):
    path, out = make("edm2_zip", tmp_path).path, tmp_path / "out"
    words = ["dit-convert", "--from", str(path), "--to", str(out), "--format", "store", "--vae", "demo"]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 0
    said = capsys.readouterr().out
    assert said.startswith("14 moments of 4×4×4 in 1 shards, 3 classes, laid out as edm2's\n")
    assert "taken for the VAE demo, of pixels in [0, 1]; training feeds (z − shift) · scale: scale 0.54591, " in said
    assert "not known: the VAE's fingerprint, how images were cropped (adm-center is written)\n" in said
    monkeypatch.setattr(sys, "argv", [*words[:-2], "--layout", "mar", "--overwrite"])
    assert main() == 2 and "must hold a folder for each class" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*words[:5], "--format", "dit", "--layout", "mar"])
    assert main() == 2 and "--layout mar is for --format store" in capsys.readouterr().err


def test_other_latents_under_the_same_names_are_not_taken_for_the_same(tmp_path):
    made = make("mar", tmp_path)
    import_latents(made.path, tmp_path / "out")
    for path in made.path.glob("*/*.npz"):
        np.savez(path, moments=np.zeros((32, 4, 4), "f4"), moments_flip=np.zeros((32, 4, 4), "f4"))
    with pytest.raises(UserError, match="other settings or inputs"):
        import_latents(made.path, tmp_path / "out")


@pytest.mark.parametrize("pixels", [[0, 1], [-1, 1]])
def test_pictures_of_imported_latents_are_as_bright_as_their_pixels_were(pixels):
    """EDM2 gives its encoder pixels in [0, 1]: what the decoder gives is doubled and shifted."""
    recorded = {"name": "demo", "scaling_factor": [2.0] * 4, "shift_factor": None, "pixels": pixels}
    plain, found = load_vae("demo"), find_vae(typed(recorded, RecordedVae, "the VAE", advice=""))
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    values = plain.decode_values(z)
    assert torch.equal(found.decode_values(z), values * 2 - 1 if pixels == [0, 1] else values)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(found.encode(x), plain.encode((x + 1) / 2 if pixels == [0, 1] else x))
    described = found.describe()
    assert {name: described[name] for name in recorded} == recorded and described["sha256"] == plain.sha256


def rewrite(name, array):
    def damage(made):
        np.save(made.path / name, array)

    return damage


FIRST = "00000/img-mean-std-00000000.npy"


def relabel(labels):
    def damage(made):
        (made.path / "dataset.json").write_text(json.dumps({"labels": labels}))

    return damage


def reshard(**changes):
    def damage(made):
        path = made.path / "latents_rank01_shard000.safetensors"
        contents = {**load_file(path), **changes}
        save_file({name: tensor for name, tensor in contents.items() if tensor is not None}, path)

    return damage


def restat(**tensors):
    return lambda made: save_pickled_tensors(made.path / "latents_stats.pt", tensors)


def cut(pattern):
    def damage(made):
        path = made.path if pattern is None else next(made.path.glob(pattern))
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    return damage


def flipped(made):
    """One byte within an array in the zip."""
    data = bytearray(made.path.read_bytes())
    data[data.index(b"\x93NUMPY") + 200] ^= 1
    made.path.write_bytes(data)


def claiming(made):
    files = {FIRST: npy_header((8, 10**6, 10**6)), "dataset.json": json.dumps({"labels": [[FIRST, 0]]}).encode()}
    pack(made.path, files)


def npy_header(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def twice(made):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(made.path, "a") as archive:
        archive.writestr(FIRST, b"again")


PAIRS = [[f"00000/img-mean-std-{index:08d}.npy", LABELS[index]] for index in range(COUNT)]
SPREADS = np.full((8, 4, 4), -1, "f4")
DAMAGED = [
    (
        "edm2_folder",
        lambda made: (made.path / "dataset.json").unlink(),
        "holds no latents that are known here",
    ),
    ("edm2_folder", relabel(PAIRS[1:]), r"00000000\.npy and 0 others have no label"),
    (
        "edm2_folder",
        lambda made: (made.path / FIRST).unlink(),
        r"00000000\.npy' and 0 others that it labels are not there",
    ),
    ("edm2_folder", relabel([[FIRST, -1], *PAIRS[1:]]), r"labels\[0\]\[1\] is -1, but must be"),
    ("edm2_folder", relabel([[FIRST, 10**12], *PAIRS[1:]]), r"labels\[0\]\[1\] is 1000000000000, but must be"),
    ("edm2_folder", relabel([[FIRST, [0.0, 1.0]], *PAIRS[1:]]), r"labels\[0\]\[1\] is \[0\.0, 1\.0\], but must be"),
    ("edm2_folder", relabel([None, *PAIRS[1:]]), r"labels\[0\] is None, but must be"),
    ("edm2_folder", lambda made: (made.path / "dataset.json").write_text("{"), "is not valid JSON"),
    ("edm2_folder", rewrite(FIRST, np.zeros((8, 4), "f4")), r"is no latent of shape \[1, channels, height, width\]"),
    ("edm2_folder", rewrite(FIRST, np.zeros((8, 4, 4), "i8")), r"is no latent of shape .* but int64 \[8, 4, 4\]"),
    ("edm2_folder", rewrite(FIRST, np.zeros((7, 4, 4), "f4")), "has 7 values a cell"),
    (
        "edm2_folder",
        rewrite(FIRST, np.zeros((32, 4, 4), "f4")),
        "features of 16 channels, but .*ft-mse has latents of 4",
    ),
    (
        "edm2_folder",
        rewrite(PAIRS[5][0], np.zeros((8, 4, 5), "f4")),
        r"00000005\.npy is not \[1, 8, 4, 4\] like the first",
    ),
    ("edm2_folder", rewrite(FIRST, np.full((8, 4, 4), np.nan, "f4")), r"00000000\.npy .* not finite in float16"),
    ("edm2_folder", rewrite(FIRST, np.full((8, 4, 4), np.inf, "f4")), r"00000000\.npy .* not finite in float16"),
    ("edm2_folder", rewrite(FIRST, SPREADS), r"00000000\.npy .* not finite in float16"),
    ("edm2_folder", lambda made: os.mkfifo(made.path / "00000" / "pipe.npy"), r"pipe\.npy .* no label"),
    ("edm2_zip", cut(None), r"cannot be read as a zip"),
    ("edm2_zip", flipped, r"cannot be read as a \.npy array \(Bad CRC-32"),
    ("edm2_zip", claiming, r"its header claims 32000000000000 bytes of data, but it holds 0"),
    ("edm2_zip", twice, "holds a name twice"),
    ("edm2_zip", lambda made: pack(made.path, {"a.npy": b""}), r"has no dataset\.json"),
    (
        "edm2_zip",
        lambda made: pack(made.path, {"dataset.json": b'{"labels": []}'}),
        r"there is none \(pictures go to dit-extract\)",
    ),
    (
        "repa",
        lambda made: shutil.rmtree(made.path / "vae-sd" / "00000"),
        r"there is none \(pictures go to dit-extract\)",
    ),
    ("lightningdit", lambda made: (made.path / "latents_stats.pt").unlink(), r"latents_stats\.pt is missing"),
    ("lightningdit", restat(mean=torch.zeros(6)), "must hold a mean and a spread above 0 for each of the 6 channels"),
    ("lightningdit", restat(mean=torch.zeros(6), std=torch.zeros(6)), "must hold a mean and a spread above 0"),
    ("lightningdit", restat(mean=torch.zeros(6), std=torch.full((6,), torch.nan)), "must hold a mean and a spread"),
    ("lightningdit", cut("latents_stats.pt"), r"latents_stats\.pt"),
    ("lightningdit", cut("*rank01*"), r"rank01_shard000\.safetensors cannot be read as LightningDiT's latents"),
    ("lightningdit", reshard(labels=None), r"rank01_shard000\.safetensors cannot be read as LightningDiT's latents"),
    ("lightningdit", reshard(labels=torch.zeros(5)), r"labels \[N\] of whole numbers, but holds"),
    ("lightningdit", reshard(labels=torch.zeros(4, dtype=torch.long)), r"labels \[N\] of whole numbers, but holds"),
    ("lightningdit", reshard(latents=torch.zeros(5, 6, 4, 5)), "must hold latents and latents_flip of one shape"),
    (
        "lightningdit",
        reshard(latents=torch.zeros(5, 6, 4, 5), latents_flip=torch.zeros(5, 6, 4, 5)),
        "the latents in .* differ in shape",
    ),
    (
        "lightningdit",
        reshard(latents=torch.full((5, 6, 4, 4), torch.nan)),
        r"rank01_shard000\.safetensors/\d .* not finite in float16",
    ),
    ("lightningdit", reshard(labels=torch.tensor([0, 1, 2, 0, -1])), "the labels lie in -1"),
    ("lightningdit", reshard(labels=torch.tensor([0, 1, 2, 0, 10**15])), "the labels lie in 0 … 1000000000000000"),
    ("mar", cut("*/*.npz"), r"\.npz cannot be read as an \.npz of both views"),
    ("mar", lambda made: np.savez(next(made.path.glob("*/*.npz")), moments=np.zeros((32, 4, 4))), "moments_flip"),
    (
        "mar",
        lambda made: np.savez(next(made.path.glob("*/*.npz")), moments=np.zeros((32, 4, 4)), moments_flip=np.zeros(3)),
        "the two views in .* differ in shape",
    ),
    ("mar", lambda made: (made.path / "n99").mkdir(), "there is none in 'n99' and 0 others"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED)
def test_what_is_damaged_or_does_not_fit_is_one_sentence_that_names_it(name, damage, message, tmp_path):
    made = make(name, tmp_path / "in")
    damage(made)
    with pytest.raises(UserError, match=message) as raised:
        import_latents(made.path, tmp_path / "out")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_what_is_no_layout_is_told_all_there_are(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist") as raised:
        import_latents(tmp_path / "nowhere", tmp_path / "out")
    assert all(name in str(raised.value) for name in LAYOUTS)
    with pytest.raises(UserError, match="holds no latents that are known here"):
        import_latents(tmp_path, tmp_path / "out")
