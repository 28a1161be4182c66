import json
from pathlib import Path

import pytest
import torch

from pipeline.latents import LatentStore
from pipeline.latents.verify import verify
from pipeline.latents.writer import remove_files, replace_store, store_files, write_shard
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


def test_a_store_is_replaced_whole_whenever_the_process_that_does_it_is_killed(
    sample, new_sample, shard_format, tmp_path, bytes_of, monkeypatch
):
    """Every rename and every removal is a moment to be killed at; then another one goes on."""
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
        else:
            with pytest.raises(UserError, match="not finished"):
                LatentStore(folder)
        replace_store(folder, folder / ".work" / "ready")
        assert bytes_of(folder) == wanted | {"notes.txt": b"mine"}
        moment += 1
    assert moment == 1 + 3 * 2 + 1 + 1 + 2 * 2 + 2, (
        "the manifest, all files of the old store, its manifest, the new one's"
    )
