"""What a store made by dit-extract holds, checked against the same thing done by hand, and how it refuses."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from extract.plan import Plan
from extract.preview import Reconstruction
from pipeline.images import center_crop, choose_box, decode_image, random_resized_crop, to_pixels
from pipeline.latents import LatentStore
from pipeline.vae import load_vae


def rows_of(store):
    """{index: (moments, label, key)} of every sample, by plain safetensors and the records."""
    rows = {}
    for path in sorted(store.glob("*.safetensors")):
        keys = json.loads(path.with_suffix(".json").read_text())["keys"]
        with safe_open(path, framework="pt") as file:
            name = "moments" if "moments" in list(file.keys()) else "latent"
            tensors = [file.get_tensor(tensor) for tensor in (name, "label", "index")]
        for moments, label, index, key in zip(*tensors, keys, strict=True):
            rows[int(index)] = moments, int(label), key
    return rows


def by_hand(vae, crops, dtype=torch.float16, batch=4):
    """[views, values, h, w] of crops [crops, size, size, 3], mirrored pixels after each."""
    views = []
    for crop in crops:
        pixels = torch.zeros(batch, 3, *crop.shape[:2])
        pixels[0] = torch.from_numpy(to_pixels(crop[None])[0])
        views += [vae.encode(pixels)[0], vae.encode(pixels.flip(-1))[0]]
    return torch.stack(views).to(dtype)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- contents ----------------------------------------------------------------------------------------------------


def test_every_sample_is_the_latent_of_its_image_and_of_its_mirror_image(
    tmp_path, command, images, vae_folder, one_thread
):
    assert command("--out", tmp_path / "s")[0] == 0
    rows, vae = rows_of(tmp_path / "s"), load_vae(str(vae_folder))
    listed = sorted(str(path.relative_to(images)) for path in images.rglob("*.jpg"))
    assert [rows[index][2] for index in range(50)] == listed
    for index in range(0, 50, 7):
        moments, label, key = rows[index]
        assert label == "abc".index(key[0])
        crop = center_crop(decode_image((images / key).read_bytes(), key), 32)
        assert torch.equal(moments, by_hand(vae, [crop]))


def test_the_manifest_says_what_is_there_and_nothing_about_the_machine(tmp_path, command, images, vae_folder):
    status, said = command("--out", tmp_path / "s")
    manifest = LatentStore(tmp_path / "s").manifest
    assert status == 0 and "50 samples, 7 shards" in said and "50 images of 512 B" in said
    assert (manifest.samples, manifest.skipped, manifest.seed, manifest.split) == (50, 0, 0, "train")
    assert manifest.classes == manifest.class_ids == ("a", "b", "c")
    assert manifest.image == {"size": 32, "crop": "adm-center"} and manifest.views == ("center", "center-hflip")
    assert manifest.vae["name"] == "small" and manifest.vae["sha256"] == load_vae(str(vae_folder)).sha256
    moments = torch.stack([row[0] for row in rows_of(tmp_path / "s").values()]).double()
    mean, logvar = moments.chunk(2, dim=2)
    variance = mean.var(dim=(0, 1, 3, 4), correction=0) + logvar.exp().mean(dim=(0, 1, 3, 4))
    torch.testing.assert_close(torch.tensor(manifest.statistics["mean"]).double(), mean.mean(dim=(0, 1, 3, 4)))
    torch.testing.assert_close(torch.tensor(manifest.statistics["std"]).double(), variance.sqrt())
    everything = b"".join(path.read_bytes() for path in (tmp_path / "s").iterdir())
    for secret in (str(tmp_path), str(images), str(vae_folder)):
        assert secret.encode() not in everything
    assert not (tmp_path / "s/.work").exists()


def test_both_formats_hold_the_same(tmp_path, command):
    assert command("--out", tmp_path / "a")[0] == command("--out", tmp_path / "b", "--format", "webdataset")[0] == 0
    with LatentStore(tmp_path / "a") as one, LatentStore(tmp_path / "b") as other:
        every = np.arange(50)
        for left, right in zip(one[every], other[every], strict=True):
            assert torch.equal(left, right)


def test_random_crops_are_drawn_from_the_seed_and_the_input_alone(tmp_path, command, images, vae_folder, one_thread):
    arguments = ["--crop", "random-resized", "--crops", 2, "--store-dtype", "float32", "--limit", 9, "--seed", 5]
    assert command("--out", tmp_path / "s", *arguments)[0] == 0
    assert LatentStore(tmp_path / "s").manifest.views == ("random-0", "random-0-hflip", "random-1", "random-1-hflip")
    index, (moments, _, key) = next(iter(rows_of(tmp_path / "s").items()))
    image = decode_image((images / key).read_bytes(), key)
    boxes = [choose_box(image.width, image.height, 5, index, number) for number in range(2)]
    crops = [random_resized_crop(image, 32, box) for box in boxes]
    assert boxes[0] != boxes[1]
    assert torch.equal(moments, by_hand(load_vae(str(vae_folder)), crops, torch.float32))


def test_a_vae_without_spread_gives_points(tmp_path, command):
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(1)
        blocks = {"encoder_block_out_channels": (4, 4, 4, 4), "decoder_block_out_channels": (4, 4, 4, 4)}
        AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(
            tmp_path / "v"
        )
    assert command("--out", tmp_path / "s", "--no-flip", "--limit", 8, vae=tmp_path / "v")[0] == 0
    store = LatentStore(tmp_path / "s")
    assert store.manifest.latent.kind == "point" and store[0][0].shape == (1, 4, 4, 4)


def test_flat_data_is_unlabelled_and_the_split_names_the_files(tmp_path, command, tree, make_picture):
    tree(tmp_path / "d", {f"{n}.jpg": make_picture(n) for n in range(3)})
    assert command("--out", tmp_path / "s", "--split", "val", data=tmp_path / "d")[0] == 0
    store = LatentStore(tmp_path / "s")
    assert store.manifest.classes == () and store.labels().tolist() == [-1, -1, -1]
    assert (tmp_path / "s/val-00000.safetensors").exists()


# --- classes -----------------------------------------------------------------------------------------------------


def test_imagenets_synsets_get_readable_names_and_files_give_others(tmp_path, command, tree, make_picture):
    tree(tmp_path / "d", {"n01443537/0.jpg": make_picture(0), "n01440764/1.jpg": make_picture(1)})
    assert command("--out", tmp_path / "a", data=tmp_path / "d")[0] == 0
    manifest = LatentStore(tmp_path / "a").manifest
    assert manifest.class_ids == ("n01440764", "n01443537")
    assert manifest.classes == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    texts = {"names.txt": "one\ntwo\n", "names.tsv": "n01443537\ttwo\nn01440764\tone\n", "names.json": '["one", "two"]'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        out = tmp_path / f"store-{name}"
        assert command("--out", out, "--class-names", tmp_path / name, data=tmp_path / "d")[0] == 0
        assert LatentStore(out).manifest.classes == ("one", "two")
    (tmp_path / "few.txt").write_text("one\n")
    status, said = command("--out", tmp_path / "b", "--class-names", tmp_path / "few.txt", data=tmp_path / "d")
    assert status == 2 and "has 1 names, but the data has 2 classes" in said
    assert not (tmp_path / "b").exists()


# --- the plan ----------------------------------------------------------------------------------------------------


def test_the_plan_never_changes():
    """A golden order: another one would make every unfinished store impossible to continue."""
    plan = Plan(inputs=20, seed=0, samples_per_shard=8)
    assert [plan.rows(shard).tolist() for shard in range(plan.shards)] == GOLDEN
    assert sorted(row for shard in GOLDEN for row in shard) == list(range(20))
    limited = Plan(inputs=20, seed=0, samples_per_shard=8, limit=10)
    assert [limited.rows(shard).tolist() for shard in range(limited.shards)] == [GOLDEN[0], GOLDEN[1][:2]]
    with pytest.raises(IndexError, match="shard 3 is not one of 3"):
        plan.rows(3)


GOLDEN = [[16, 9, 5, 7, 19, 0, 3, 17], [18, 10, 8, 15, 2, 14, 1, 6], [13, 12, 11, 4]]


def test_a_shard_of_sorted_data_sees_all_classes():
    plan = Plan(inputs=128_000, seed=0, samples_per_shard=4096)
    classes = [len(np.unique(plan.rows(shard)[:256] // 128)) for shard in range(20)]
    expected = 1000 * (1 - (1 - 1 / 1000) ** 256)
    assert abs(np.mean(classes) / expected - 1) < 0.02


def test_ranges_of_shards_make_one_store(tmp_path, command, reference, hashes):
    status, said = command("--out", tmp_path / "s", "--shard-range", "4:")
    assert status == 0 and "4 of 7 shards are not in place yet" in said
    assert not (tmp_path / "s/manifest.json").exists()
    assert command("--out", tmp_path / "s", "--shard-range", "0:4")[0] == 0
    assert hashes(tmp_path / "s") == reference


# --- the same command again --------------------------------------------------------------------------------------


def test_a_finished_store_is_left_alone_and_other_settings_are_refused(
    tmp_path, command, hashes, tree, images, make_picture
):
    out = tmp_path / "s"
    assert command("--out", out)[0] == 0
    before = hashes(out)
    (out / ".work/locks").mkdir(parents=True)  # as a kill right after the manifest leaves it
    status, said = command("--out", out)
    assert status == 0 and "already finished" in said
    for flags, named in {
        ("--seed", 3): "--seed 0 there, 3 now",
        ("--no-flip",): "--flip True there, False now",
        ("--image-size", 64): "--image-size 32 there, 64 now",
        ("--store-dtype", "float32"): "--store-dtype float16 there, float32 now",
        ("--limit", 5): "--limit None there, 5 now",
    }.items():
        status, said = command("--out", out, *flags)
        assert status == 2 and named in said and "--overwrite" in said
    tree(tmp_path / "other", {"a/0.jpg": make_picture(0)})
    status, said = command("--out", out, data=tmp_path / "other")
    assert status == 2 and "--data" in said and "--class-names" in said
    assert hashes(out) == before


def test_an_unfinished_store_refuses_other_settings_too(tmp_path, command):
    assert command("--out", tmp_path / "s", "--shard-range", "0:1")[0] == 0
    status, said = command("--out", tmp_path / "s", "--samples-per-shard", 9)
    assert status == 2 and "--samples-per-shard 8 there, 9 now" in said


def test_overwrite_removes_the_store_and_nothing_else(tmp_path, command, hashes):
    out = tmp_path / "s"
    assert command("--out", out)[0] == 0
    (out / "notes.txt").write_text("mine")
    assert command("--out", out, "--no-flip", "--overwrite", "--limit", 20)[0] == 0
    assert LatentStore(out).manifest.views == ("center",)
    assert sorted(hashes(out)) == sorted(
        [
            "manifest.json",
            "notes.txt",
            "skipped.jsonl",
            *(f"train-0000{n}.{kind}" for n in range(3) for kind in ("json", "safetensors")),
        ]
    )


def test_the_finished_store_stands_until_the_one_that_replaces_it_is_whole(tmp_path, command, hashes):
    out, wanted = tmp_path / "s", tmp_path / "wanted"
    assert command("--out", out)[0] == command("--out", wanted, "--seed", 1)[0] == 0
    (out / "train-00001.json").touch()
    before = hashes(out)
    for flags in (["--overwrite", "--shard-range", "0:3"], ["--shard-range", "3:5"]):
        status, said = command("--out", out, "--seed", 1, *flags)
        assert status == 0 and "shards are not in place yet" in said
        assert {name: digest for name, digest in hashes(out).items() if not name.startswith(".work")} == before
        assert LatentStore(out).manifest.seed == 0
    status, said = command("--out", out)
    assert status == 0 and "already finished" in said and "an unfinished store of other settings" in said
    status, said = command("--out", out, "--seed", 2)
    assert status == 2 and "--seed 0 there, 2 now" in said
    assert command("--out", out, "--seed", 1)[0] == 0
    assert hashes(out) == hashes(wanted)


def test_what_was_begun_to_replace_a_store_goes_with_the_next_overwrite(tmp_path, command, hashes):
    out, wanted = tmp_path / "s", tmp_path / "wanted"
    assert command("--out", out)[0] == command("--out", wanted, "--seed", 2)[0] == 0
    assert command("--out", out, "--overwrite", "--seed", 1, "--shard-range", "0:1")[0] == 0
    assert command("--out", out, "--overwrite", "--seed", 2)[0] == 0
    assert hashes(out) == hashes(wanted)


def test_a_replacement_that_was_whole_when_its_process_was_killed_is_put_in_place_by_any_command(
    tmp_path, command, hashes, monkeypatch
):
    from extract.store_folder import OutputFolder

    out, wanted = tmp_path / "s", tmp_path / "wanted"
    assert command("--out", out)[0] == command("--out", wanted, "--seed", 1)[0] == 0
    honest = OutputFolder.put_in_place
    monkeypatch.setattr(OutputFolder, "put_in_place", lambda _: None)
    assert command("--out", out, "--overwrite", "--seed", 1)[0] == 0
    assert LatentStore(out).manifest.seed == 0
    monkeypatch.setattr(OutputFolder, "put_in_place", honest)
    status, said = command("--out", out)
    assert status == 2 and "--seed 1 there, 0 now" in said
    assert hashes(out) == hashes(wanted)


def test_a_process_that_looks_at_the_inputs_while_another_puts_the_new_store_in_place_sees_one_store(
    tmp_path, command, hashes, monkeypatch
):
    from extract import run

    out, wanted = tmp_path / "s", tmp_path / "wanted"
    assert command("--out", out)[0] == command("--out", wanted, "--seed", 1)[0] == 0
    assert command("--out", out, "--overwrite", "--seed", 1, "--shard-range", "0:4")[0] == 0
    honest = run.check_same_data

    def late(output, plan, loader):
        (output.work / "replacement").rename(output.work / "ready")  # as the process does that was faster
        honest(output, plan, loader)

    for shard in sorted(wanted.glob("train-00004.*")):  # and has made the rest
        shutil.copy(shard, out / ".work" / "replacement")
    shutil.copy(wanted / "manifest.json", out / ".work" / "replacement")
    monkeypatch.setattr(run.OutputFolder, "put_in_place", lambda _: None)
    monkeypatch.setattr(run, "check_same_data", late)
    status, said = command("--out", out, "--seed", 1)
    assert status == 0, said
    assert hashes(out) == hashes(wanted)


def test_tars_that_are_replaced_on_the_server_are_not_mixed_into_a_store_that_is_begun(
    tmp_path, command, make_picture, serve
):
    from pipeline.runtime import remote_copies as remote

    def write(first):
        for number in range(2):
            with tarfile.open(tmp_path / f"{number}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for k in range(8 * number, 8 * number + 8):
                    data = make_picture(k + first, kind="BMP")
                    member = tarfile.TarInfo(f"{k}.bmp")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    write(0)
    os.utime(tmp_path / "1.tar", (1, 1))
    data, out = f"{serve(tmp_path)}/{{0..1}}.tar", tmp_path / "s"
    assert command("--out", out, "--shard-range", "0:1", data=data)[0] == 0
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes())  # who knows whether it is the same
    remote.local_place.cache_clear()  # as in another process
    status, said = command("--out", out, data=data)
    assert status == 2 and "was begun with other settings (--data (by size, ETag and time on the server)" in said
    assert command("--out", out, "--overwrite", data=data)[0] == 0


def test_overwrite_removes_nothing_before_all_else_is_found_right(tmp_path, command, hashes):
    out = tmp_path / "s"
    assert command("--out", out)[0] == 0
    before = hashes(out)
    for wrong in (
        ["--vae", "no-such-vae"],
        ["--class-names", "/nonexistent.txt"],
        ["--image-size", "36"],
        ["--device", "cuda:7"],
        ["--data", "/nonexistent"],
    ):
        assert command("--out", out, "--overwrite", *wrong)[0] == 2
        assert hashes(out) == before, wrong


def test_files_of_the_users_that_are_named_like_shards_outlive_overwrite(tmp_path, command, reference, hashes):
    out = tmp_path / "s"
    assert command("--out", out)[0] == 0
    mine = ("mydata-000001.tar", "run-2024010112.json", "notes-00001.json")
    for name in mine:
        (out / name).write_text("mine")
    assert command("--out", out, "--overwrite")[0] == 0
    assert {name: (out / name).read_text() for name in mine} == dict.fromkeys(mine, "mine")
    for name in mine:
        (out / name).unlink()
    assert hashes(out) == reference


@pytest.mark.parametrize("lost", ["a shard", "a shard and its record", "a shard cut short", "a record"])
def test_a_finished_store_that_lost_a_shard_is_made_whole_by_the_same_command(
    tmp_path, command, reference, hashes, lost
):
    out = tmp_path / "s"
    assert command("--out", out)[0] == 0
    shard, record = out / "train-00001.safetensors", out / "train-00001.json"
    if lost == "a shard cut short":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        for path in {"a shard": [shard], "a record": [record]}.get(lost, [shard, record]):
            path.unlink()
    status, said = command("--out", out)
    assert status == 0 and "1 shards of the finished store" in said
    assert hashes(out) == reference


def test_a_store_without_manifest_and_settings_is_still_known_and_goes_on(tmp_path, command, reference, hashes):
    """What one who follows the advice to remove damaged files may have left."""
    out = tmp_path / "s"
    assert command("--out", out)[0] == 0
    for name in ("manifest.json", "train-00001.json", "train-00001.safetensors"):
        (out / name).unlink()
    status, said = command("--out", out, "--seed", 1)
    assert status == 2 and "--overwrite" in said
    assert command("--out", out)[0] == 0
    assert hashes(out) == reference


def test_a_damaged_manifest_is_told_and_overwrite_begins_anew(tmp_path, command, reference, hashes):
    out = tmp_path / "s"
    assert command("--out", out)[0] == 0
    (out / "manifest.json").write_text("{")
    status, said = command("--out", out)
    assert status == 2 and "manifest.json is not valid JSON" in said
    assert command("--out", out, "--overwrite")[0] == 0
    assert hashes(out) == reference


def test_other_images_under_the_same_names_are_not_taken_for_the_same(tmp_path, command, tree, make_picture):
    for name, first in (("one", 0), ("other", 100)):
        tree(tmp_path / name, {f"a/{n:02d}.jpg": make_picture(first + n) for n in range(20)})
    out = tmp_path / "s"
    assert command("--out", out, "--shard-range", "0:1", data=tmp_path / "one")[0] == 0
    status, said = command("--out", out, data=tmp_path / "other")
    assert status == 2 and "is not the image that its latent was made from" in said
    assert command("--out", out, data=tmp_path / "one")[0] == 0
    status, said = command("--out", out, data=tmp_path / "other")
    assert status == 2 and "was begun with other data" in said


def test_another_column_of_the_same_table_is_another_setting(tmp_path, command, make_picture):
    import datasets

    pictures = {
        column: [{"bytes": make_picture(n + k), "path": None} for n in range(5)] for k, column in enumerate("ab")
    }
    features = datasets.Features({column: datasets.Image() for column in "ab"})
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(pictures, features=features).to_parquet(tmp_path / "table" / "x.parquet")
    out = tmp_path / "s"
    assert command("--out", out, "--image-column", "a", data=tmp_path / "table")[0] == 0
    status, said = command("--out", out, "--image-column", "b", data=tmp_path / "table")
    assert status == 2 and "--image-column a there, b now" in said


@pytest.mark.parametrize("flat", [True, False])
def test_a_store_made_within_its_data_is_no_part_of_it(tmp_path, command, tree, make_picture, flat):
    tree(tmp_path / "d", {f"{'' if flat else 'abc'[n % 3] + '/'}{n}.jpg": make_picture(n) for n in range(9)})
    out = tmp_path / "d" / "latents"
    for _ in range(2):
        assert command("--out", out, data=tmp_path / "d")[0] == 0
    with LatentStore(out) as store:
        assert len(store) == 9 and store.manifest["class_ids"] == ([] if flat else ["a", "b", "c"])


def test_a_class_folder_whose_name_is_no_unicode_is_a_class(tmp_path, command, tree, make_picture):
    tree(tmp_path / "d", {"a/0.jpg": make_picture(0)})
    tree(tmp_path / "d" / os.fsdecode(b"caf\xe9"), {"1.jpg": make_picture(1)})
    assert command("--out", tmp_path / "s", data=tmp_path / "d")[0] == 0
    with LatentStore(tmp_path / "s") as store:
        assert store.manifest["class_ids"] == ["a", "caf\\xe9"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the collector
def test_tars_of_bfloat16_are_read_as_the_documentation_says(tmp_path, command):
    import webdataset

    assert command("--out", tmp_path / "s", "--format", "webdataset", "--store-dtype", "bfloat16")[0] == 0
    with LatentStore(tmp_path / "s") as store:
        moments, labels = store[:]
    tars = [str(path) for path in sorted((tmp_path / "s").glob("*.tar"))]
    rows = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert [row["cls"] for row in rows] == labels.tolist()
    plain = np.stack([row["moments.npy"] for row in rows])
    assert plain.dtype == "V2"
    assert torch.equal(torch.from_numpy(plain.view(np.int16)).view(torch.bfloat16), moments)


def test_pictures_go_into_a_folder_that_is_made_and_not_onto_one(tmp_path, command):
    assert command("--preview", tmp_path / "new" / "p.png", "--preview-images", 1)[0] == 0
    (tmp_path / "p.png").mkdir()
    status, said = command("--preview", tmp_path / "p.png", "--preview-images", 1)
    assert status == 2 and "that is a folder" in said


def test_a_link_to_nowhere_as_output_is_refused(tmp_path, command):
    (tmp_path / "s").symlink_to(tmp_path / "absent" / "deep")
    status, said = command("--out", tmp_path / "s")
    assert status == 2 and "is a link that leads nowhere" in said


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_with_other_things_is_never_touched(tmp_path, command, overwrite):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/thesis.tex").write_text("words")
    status, said = command("--out", tmp_path / "s", *overwrite)
    assert status == 2 and "holds other things (thesis.tex)" in said
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["thesis.tex"]
    status, said = command("--out", tmp_path / "s/thesis.tex", *overwrite)
    assert status == 2 and "is a file" in said


def test_a_damaged_shard_is_noticed_and_made_again(tmp_path, command, reference, hashes):
    out = tmp_path / "s"
    assert command("--out", out, "--shard-range", "0:6")[0] == 0
    shard = out / "train-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    status, said = command("--out", out)
    assert status == 2 and "shard 2" in said
    assert command("--out", out)[0] == 0
    assert hashes(out) == reference


# --- bad inputs --------------------------------------------------------------------------------------------------


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def corpus(tmp_path, tree, make_picture):
    """Every bad input, every odd one that is good, and ordinary ones."""
    grey = Image.new("L", (50, 40), 90)
    good = {f"a/{n}.jpg": make_picture(n) for n in range(4)}
    odd = {
        "a/cmyk.jpg": make_picture(5, mode="CMYK"),
        "a/two frames.gif": encoded(grey.convert("P"), "GIF", save_all=True, append_images=[grey.convert("P")]),
        "a/broken profile.jpg": encoded(grey, "JPEG", icc_profile=b"nonsense"),
        "a/dot.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "b/new\nline ü 猫.png": make_picture(6, kind="PNG"),
        "b/no suffix": make_picture(7, kind="WEBP"),
        "b/wrong suffix.png": make_picture(8, kind="BMP"),
        "b/tiff.tif": make_picture(9, kind="TIFF"),
    }
    bad = {
        "a/truncated.jpg": make_picture(10)[:-200],
        "a/empty.jpg": b"",
        "a/words.jpg": b"these are words",
        "b/bomb.png": encoded(Image.new("1", (16000, 16000)), "PNG"),
        "b/thin.png": encoded(Image.new("L", (1, 5000)), "PNG"),
    }
    tree(tmp_path / "corpus", {**good, **odd, **bad})
    (tmp_path / "corpus/b/broken link.jpg").symlink_to("nowhere.jpg")
    return tmp_path / "corpus", {*good, *odd}, {*bad, "b/broken link.jpg"}


def test_bad_inputs_are_left_out_with_a_reason_and_odd_ones_are_encoded(tmp_path, command, corpus, hashes):
    data, good, bad = corpus
    flags = ["--out", tmp_path / "s", "--image-size", 256, "--no-flip"]
    status, said = command(*flags, data=data)
    assert status == 2 and "6 of 18 inputs (33.3%) were left out" in said and "--allow-skips 0.334" in said
    assert not (tmp_path / "s/manifest.json").exists()
    lines = [json.loads(line) for line in (tmp_path / "s/skipped.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == bad and all(line["reason"] for line in lines)
    reasons = {line["key"]: line["reason"] for line in lines}
    for key, word in {
        "a/truncated.jpg": "truncated",
        "a/empty.jpg": "zero bytes",
        "a/words.jpg": "not an image",
    }.items():
        assert word in reasons[key]
    for key, word in {
        "b/bomb.png": "bomb",
        "b/thin.png": "64 megapixels",
        "b/broken link.jpg": "broken symbolic",
    }.items():
        assert word in reasons[key]
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.safetensors")}
    status, said = command(*flags, "--allow-skips", 0.334, data=data)
    assert status == 0 and "6 left out" in said
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*.safetensors")} == shards
    store = LatentStore(tmp_path / "s")
    assert (store.manifest.samples, store.manifest.skipped) == (12, 6)
    assert {row[2] for row in rows_of(tmp_path / "s").values()} == good


def test_on_error_fail_stops_at_the_first_with_its_name(tmp_path, command, tree, make_picture):
    tree(tmp_path / "d", {"a/0.jpg": make_picture(0), "a/bad one.jpg": b"words"})
    status, said = command("--out", tmp_path / "s", "--on-error", "fail", data=tmp_path / "d")
    assert status == 2 and "a/bad one.jpg: not an image" in said
    assert not list((tmp_path / "s").glob("train-*"))
    tree(tmp_path / "d", {"a/bad one.jpg": make_picture(1)})
    assert command("--out", tmp_path / "s", "--on-error", "fail", data=tmp_path / "d")[0] == 0


def test_nothing_but_bad_inputs_is_no_store(tmp_path, command, tree):
    tree(tmp_path / "d", {"a/0.jpg": b"", "a/1.jpg": b""})
    status, said = command("--out", tmp_path / "s", "--allow-skips", 1, data=tmp_path / "d")
    assert status == 2 and "not one input could be encoded" in said


def test_latents_that_are_not_finite_are_named_and_left_out(tmp_path, command, monkeypatch):
    from pipeline import vae as vae_module

    honest = vae_module.Vae.encode

    def encode(self, pixels):
        latents = honest(self, pixels)
        latents[1, 0, 0, 0] = torch.nan
        return latents

    monkeypatch.setattr(vae_module.Vae, "encode", encode)
    status, said = command("--out", tmp_path / "s", "--limit", 8, "--allow-skips", 0.5)
    assert status == 0 and "warning: " in said and "not finite" in said
    assert LatentStore(tmp_path / "s").manifest.samples == 6
    monkeypatch.setattr(vae_module.Vae, "encode", lambda self, pixels: honest(self, pixels) * torch.inf)
    status, said = command("--out", tmp_path / "t", "--limit", 8)
    assert status == 2 and "every latent of a batch" in said and "--encode-dtype float32" in said


# --- trouble on the way ------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_the_rest_is_made_later(tmp_path, command, monkeypatch, reference, hashes):
    from pipeline.runtime import files

    honest, calls = files.flush_file, []

    def flush(path):
        calls.append(path)
        if ".safetensors" in Path(path).name and len(calls) > 8:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        honest(path)

    monkeypatch.setattr(files, "flush_file", flush)
    status, said = command("--out", tmp_path / "s")
    assert status == 2 and "the disk is full" in said and "Traceback" not in said
    monkeypatch.setattr(files, "flush_file", honest)
    left = hashes(tmp_path / "s")
    assert "manifest.json" not in left and "train-00000.json" in left and not any("partial" in name for name in left)
    assert command("--out", tmp_path / "s")[0] == 0
    assert hashes(tmp_path / "s") == reference


def test_a_vanished_input_is_one_sentence_and_the_run_goes_on_when_it_is_back(
    tmp_path, command, tree, make_picture, monkeypatch
):
    from extract.sources import folders

    tree(tmp_path / "d", {f"a/{n}.jpg": make_picture(n) for n in range(20)})
    honest = folders.FolderSource.read

    def read(self, listing, index):
        if index == 7:
            (tmp_path / "d/a/15.jpg").unlink(missing_ok=True)
            index = listing.keys.index("a/15.jpg")
        return honest(self, listing, index)

    monkeypatch.setattr(folders.FolderSource, "read", read)
    status, said = command("--out", tmp_path / "s", data=tmp_path / "d")
    assert status == 2 and "a/15.jpg is gone since the data was listed" in said
    monkeypatch.setattr(folders.FolderSource, "read", honest)
    tree(tmp_path / "d", {"a/15.jpg": make_picture(15)})
    assert command("--out", tmp_path / "s", data=tmp_path / "d")[0] == 0
    assert LatentStore(tmp_path / "s").manifest.samples == 20


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image-size", 36], "no multiple of 8"),
        (["--device", "cuda:7"], "--device cuda:7"),
        (["--device", "meta"], "--device meta is not supported"),
        (["--device", "toaster"], "--device toaster is not a device"),
        (["--shard-range", "5"], "must be A:B"),
        (["--shard-range", "5:5"], "is empty"),
        (["--split", "../x"], "becomes part of file names"),
        (["--crops", 2], "needs --crop random-resized"),
        (["--batch-size", 0], "--batch-size 0 must be at least 1"),
        (["--limit", 0], "--limit 0 must be at least 1"),
        (["--allow-skips", 2], "must be at least 0 and at most 1"),
        (["--data", ""], "--data is empty"),
        (["--image-sise", 64], "did you mean --image-size?"),
        (["--preview", "picture.jpg"], "must end in .png"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_leaves_nothing(tmp_path, command, arguments, sentence):
    status, said = command("--out", tmp_path / "s", *arguments)
    assert status == 2 and sentence in said and "Traceback" not in said
    assert not (tmp_path / "s").exists()


def test_every_number_may_be_as_small_as_it_can_be_and_the_folder_may_be_there(tmp_path, command):
    smallest = ["--batch-size", 1, "--workers", 1, "--samples-per-shard", 1, "--limit", 1, "--shard-range", "0:1"]
    smallest += ["--crop", "random-resized", "--crops", 1, "--image-size", 8, "--allow-skips", 0, "--seed", -1]
    (tmp_path / "s").mkdir()
    assert command("--out", tmp_path / "s", "--no-flip", *smallest)[0] == 0
    manifest = LatentStore(tmp_path / "s").manifest
    assert (manifest.samples, manifest.seed, manifest.views) == (1, -1, ("random-0",))
    assert manifest.latent.height == manifest.latent.width == 1
    assert command("--preview", tmp_path / "p.png", "--preview-images", 1, "--allow-skips", 1)[0] == 0


def test_missing_data_and_a_missing_vae_leave_nothing(tmp_path, command):
    status, said = command("--out", tmp_path / "s", data=tmp_path / "nowhere")
    assert status == 2 and "does not exist" in said
    status, said = command("--out", tmp_path / "s", vae=tmp_path / "nowhere")
    assert status == 2 and "there is no VAE folder" in said
    assert not (tmp_path / "s").exists()


# --- preview, help -----------------------------------------------------------------------------------------------


def test_a_preview_draws_reconstructions_and_extracts_nothing(tmp_path, command, images):
    status, said = command("--preview", tmp_path / "p.png", "--preview-images", 3)
    assert status == 0 and "mean PSNR" in said and said.count(" dB  ") == 3
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 100 and picture.info["vae"] == "small" and float(picture.info["mean_psnr_db"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_psnr_is_that_of_the_definition():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert Reconstruction(key="", original=black, decoded=grey).psnr == pytest.approx(20 * np.log10(5))
    assert Reconstruction(key="", original=black, decoded=black).psnr == np.inf


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom extract.__main__ import main\ntry:\n main(['--help'])\nexcept SystemExit as stop:\n"
        " assert not stop.code and 'torch' not in sys.modules"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert "--samples-per-shard" in done.stdout and "--no-flip" in done.stdout
