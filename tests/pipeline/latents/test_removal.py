import errno
import json
from pathlib import Path

import pytest
import torch

from pipeline.latents import LatentStore
from pipeline.latents.store_files import remove_files, replace_store, store_files
from pipeline.latents.verify import verify
from pipeline.latents.writer import write_shard
from pipeline.runtime.errors import UserError

MINE = ("notes-000001.tar", "run-2024010112.json", "train-2024.safetensors", "photo.png", "mydata-00001.json")


def names(files):
    return [path.name for path in files]


def test_a_store_is_removed_and_nothing_else_the_manifest_last(tmp_path):
    for name in MINE:
        (tmp_path / name).write_text("mine")
    for shard in range(2):
        (tmp_path / f"train-{shard:05d}.tar").write_bytes(b"x")
        (tmp_path / f"train-{shard:05d}.json").write_bytes(b"x")
    (tmp_path / "skipped.jsonl").write_text("")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "dit-latents", "split": "train"}))
    found = store_files(tmp_path)
    assert names(found) == [
        "train-00000.tar",
        "train-00001.tar",
        "train-00000.json",
        "train-00001.json",
        "skipped.jsonl",
        "manifest.json",
    ]
    remove_files(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(MINE)


def test_without_a_store_nothing_is_one(tmp_path):
    for name in (*MINE, "skipped.jsonl", "manifest.json"):
        (tmp_path / name).write_text("mine")
    assert store_files(tmp_path) == []
    assert store_files(tmp_path / "absent") == []


def test_an_unfinished_store_is_known_by_a_sound_record(tmp_path):
    write_shard(tmp_path, "val", 0, "safetensors", torch.zeros(1, 1, 8, 2, 2).half(), [0], [0], ["a.png"])
    (tmp_path / "val-00001.safetensors").write_bytes(b"half")
    (tmp_path / "mydata-00001.json").write_text("{}")
    assert names(store_files(tmp_path)) == ["val-00000.safetensors", "val-00001.safetensors", "val-00000.json"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("reader_first", [False, True], ids=["again", "reader"])
def test_a_store_is_replaced_whole_whenever_the_process_that_does_it_is_killed(
    sample, new_sample, shard_format, tmp_path, bytes_of, monkeypatch, reader_first
):
    """Every rename and every removal is a moment to be killed at; then another one, or a reader, goes on."""
    other = new_sample(rows=(3, 4))
    wanted = bytes_of(other.write(tmp_path / "wanted", shard_format))
    honest = {name: getattr(Path, name) for name in ("rename", "unlink")}
    moment = 0
    while True:
        folder = sample.write(tmp_path / str(moment) / "store", shard_format)
        (folder / "notes.txt").write_text("mine")
        other.write(folder / ".work" / "ready", shard_format)
        done = []
        for name, call in honest.items():

            def dying(path, *arguments, call=call, done=done, moment=moment, **more):
                if len(done) == moment:
                    raise Killed
                done.append(path)
                return call(path, *arguments, **more)

            monkeypatch.setattr(Path, name, dying)
        try:
            replace_store(folder, folder / ".work" / "ready")
            break
        except Killed:
            pass
        finally:
            for name, call in honest.items():
                monkeypatch.setattr(Path, name, call)
        if (folder / "manifest.json").exists():
            assert verify(folder) == []
        elif reader_first:
            assert len(LatentStore(folder)) == 7, "a reader completes what was begun"
        replace_store(folder, folder / ".work" / "ready")
        found = bytes_of(folder)
        found.pop(".work/replace.lock", None)  # goes with the work folder, when a dit-extract leaves it
        assert found == wanted | {"notes.txt": b"mine"}
        moment += 1
    cards = 2 if shard_format == "webdataset" else 0
    assert moment == 1 + 3 * 2 + 1 + 1 + 2 * 2 + 2 + cards, (
        "the manifest, all files of the old store, its manifest, the new one's"
    )


def test_a_card_that_someone_wrote_is_theirs(sample, new_sample, tmp_path):
    """The one beside tars comes and goes with the store; one with other words stays."""
    folder, ready = tmp_path / "store", tmp_path / "store" / ".work" / "ready"
    sample.write(folder, "webdataset")
    assert "README.md" in names(store_files(folder))
    (folder / "README.md").write_text("# My latents\n")
    new_sample(rows=(3, 4)).write(ready, "webdataset")
    replace_store(folder, ready)
    assert (folder / "README.md").read_text() == "# My latents\n"
    assert verify(folder) == []
    remove_files(store_files(folder))
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["README.md"]
    assert sample.write(folder, "webdataset") and (folder / "README.md").read_text() == "# My latents\n"


def test_a_store_of_tars_that_becomes_one_of_safetensors_has_no_card(sample, tmp_path):
    folder = sample.write(tmp_path / "store", "webdataset")
    sample.write(folder / ".work" / "ready", "safetensors")
    replace_store(folder, folder / ".work" / "ready")
    assert not (folder / "README.md").exists() and verify(folder) == []


def test_a_reader_that_may_not_complete_a_replacement_says_that_there_is_no_store_yet(
    sample, new_sample, tmp_path, monkeypatch
):
    folder = sample.write(tmp_path / "store", "safetensors")
    ready = new_sample(rows=(3, 4)).write(folder / ".work" / "ready", "safetensors")
    (folder / "manifest.json").rename(ready / "old")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(UserError, match="is not finished: it has no manifest.json yet; run the dit-extract"):
            LatentStore(folder)
    assert len(LatentStore(folder)) == 7
