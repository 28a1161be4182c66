"""dit-inspect --machine: what it says of the machine and of a disk is so, and nothing is left on the disk."""

import os
import shutil
import sys

import pytest
import torch

from pipeline.inspect import __main__, machine


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dit-inspect", *map(str, arguments)])
        status = __main__.main()
        said = capsys.readouterr()
        return status, dict(line.split("  ", 1) for line in said.out.splitlines() if "  " in line), said.err

    return call


def test_device_precision_attention_and_versions_are_said_with_their_reasons(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    status, found, _ = run("--machine")
    assert status == 0
    assert found["device"].strip() == "cpu (the launcher asks for the CPU)"
    assert found["precision"].strip() == "no (default here)"
    assert "float32" in found["attention"] and torch.__version__ in found["versions"]
    assert "GOMP_SPINCOUNT" in found["threads"] and f"{len(os.sched_getaffinity(0))} cores" in found["processor"]
    assert "disk of" not in found and "locks" not in found


def test_what_a_disk_can_do_is_tried_and_nothing_stays(run, tmp_path):
    status, found, _ = run("--machine", tmp_path / "not" / "there")
    assert status == 0 and found["disk of"].strip() == str(tmp_path.resolve())
    assert found["locks"].strip() == "yes" and " ms for 4 kB" in found["fsync"]
    assert found["exchange"].strip().startswith(("yes", "no: "))
    assert f"of {machine.size(shutil.disk_usage(tmp_path).total)}" in found["free space"]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_or_exchange_says_so(run, tmp_path, monkeypatch):
    import errno

    from filelock import FileLock

    def refused(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "_acquire", refused)
    monkeypatch.setattr(machine, "renameat2", lambda *_: False)
    status, found, _ = run("--machine", tmp_path)
    assert status == 0 and found["locks"].strip().startswith("no (")
    assert "two renames" in found["exchange"]


@pytest.mark.parametrize("arguments", [["--machine", "--models"], ["--machine", "s3://bucket/x"]])
def test_what_has_no_disk_or_no_machine_is_refused(run, arguments):
    status, _, said = run(*arguments)
    assert status == 2 and "--machine" in said
