import errno
import os

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import (
    flush_file,
    flush_folder,
    publish_folder,
    read_json,
    replacing,
    sha256_of,
    write_bytes,
    write_json,
)


def test_a_file_replaced_in_vain_stays_as_it_was(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_the_temporary_can_stand_in_a_work_folder(tmp_path):
    work = tmp_path / ".work"
    work.mkdir()
    with replacing(tmp_path / "a.bin", work_folder=work) as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == work and not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"new" and not list(work.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_the_disk_refuses_is_said_in_one_sentence(tmp_path, monkeypatch, number):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="cannot write .*a.bin: .*(disk|permission)"):
        write_bytes(tmp_path / "a.bin", b"x")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_published_whole(tmp_path):
    partial = tmp_path / ".run.partial"
    (partial / "state").mkdir(parents=True)
    (partial / "state" / "x").write_text("1")
    publish_folder(partial, tmp_path / "run")
    assert (tmp_path / "run" / "state" / "x").read_text() == "1" and not partial.exists()


def test_json_is_the_same_bytes_for_the_same_value_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, "é"]})
    assert (tmp_path / "a.json").read_text() == '{\n "b": 1,\n "a": [\n  1.5,\n  "é"\n ]\n}\n'
    assert read_json(tmp_path / "a.json") == {"b": 1, "a": [1.5, "é"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.json does not exist"):
        read_json(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="bad.json is not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_hash(tmp_path):
    write_bytes(tmp_path / "a", b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("flush", [flush_file, flush_folder])
def test_a_device_that_fails_while_something_is_flushed_is_an_error_with_its_name(tmp_path, monkeypatch, flush):
    path = tmp_path / "x"
    path.touch() if flush is flush_file else path.mkdir()

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        flush(path)
    assert caught.value.filename == str(path)
