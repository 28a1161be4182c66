"""What a conversion, an import or a contact sheet writes appears whole and flushed, alone, and the old one stays until then."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.folder import write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.convert import __main__ as convert
from pipeline.convert import run
from pipeline.convert.options import ConvertOptions
from pipeline.dit import DiT, DiTConfig
from pipeline.inspect import __main__ as inspect
from pipeline.runtime import publish
from pipeline.runtime.errors import UserError

CONFIG = DiTConfig(input_size=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
HOLDER = """
import sys
from pathlib import Path
from pipeline.runtime.publish import claimed, work_folder_of
with claimed(work_folder_of(Path(sys.argv[1]))):
    print("holding", flush=True)
    sys.stdin.read()
"""


def contents(path):
    """Every byte below a path."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture
def command(capsys, monkeypatch):
    """A command in this process: (exit status, what it complained about)."""

    def call(main, name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        status = main.main()
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def to_convert(tmp_path):
    """A checkpoint folder, and a folder of features of another project."""
    for name, seed in (("one", 0), ("two", 1)):
        folder = tmp_path / "sources" / name
        folder.mkdir(parents=True)
        info = default_info(CONFIG, vae={"name": "somewhere", "scaling_factor": 1.0})
        write_model_files(folder, info=info, model=None, averages={"ema": DiT(CONFIG, seed=seed).state_dict()})
        for kind, value in (("features", np.full((1, 4, 4, 4), seed, "f4")), ("labels", np.array([0]))):
            place = tmp_path / "sources" / f"fast-{name}" / f"some_{kind}"
            place.mkdir(parents=True)
            for k in range(3):
                np.save(place / f"{k}.npy", value)
    return tmp_path / "sources"


KINDS = {"dit": "out", "facebook": "out.safetensors", "diffusers": "out", "store": "out"}


@pytest.fixture
def write(tmp_path, to_convert, command):
    """Write one kind of output from one of two sources; the target and (exit status, complaint)."""

    def call(kind, source="one", *flags):
        target = tmp_path / "target" / KINDS[kind]
        place = to_convert / (f"fast-{source}" if kind == "store" else source)
        return target, command(convert, "dit-convert", "--from", place, "--to", target, "--format", kind, *flags)

    return call


@pytest.fixture
def events(monkeypatch):
    """Every flush and every name that is given, in order: ("flush", what) and ("name", what it was, what it is)."""
    found = []
    fsync, replace, put = os.fsync, Path.replace, publish._put

    def recorded_fsync(descriptor):
        found.append(("flush", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def recorded_replace(self, target):
        found.append(("name", str(self), str(target)))
        return replace(self, target)

    def recorded_put(made, final, *, overwrite):
        found.append(("name", str(made), str(final)))
        put(made, final, overwrite=overwrite)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    monkeypatch.setattr(publish, "_put", recorded_put)
    return found


def check_order(events, target, *, in_place):
    """Every file is flushed before its name is given, and the folder that holds the name after it."""
    named = [event for event in events if event[0] == "name" and event[2].startswith(str(target))]
    assert named
    for event in named:
        at = events.index(event)
        before = {path for what, path, *_ in events[:at] if what == "flush"}
        after = {path for what, path, *_ in events[at:] if what == "flush"}
        made, final = Path(event[1]), Path(event[2])
        assert str(final.parent) in after
        assert str(made) in before
    if not in_place:
        made = Path(named[-1][1])
        flushed = {path.removeprefix(f"{made}/") for what, path, *_ in events if what == "flush"}
        assert set(contents(target)) <= flushed or not target.is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_flushed_before_it_gets_its_name_and_the_name_after(write, events, kind):
    for flags in ((), ("--overwrite",)):
        events.clear()
        target, (status, err) = write(kind, "one", *flags)
        assert status == 0, err
        check_order(events, target, in_place=kind == "store" and not flags)
        assert [path.name for path in target.parent.iterdir()] == [target.name], "nothing hidden is left"


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_one_is_whole_under_its_name_until_the_new_one_is(write, monkeypatch, kind):
    target, (status, _) = write(kind)
    assert status == 0
    old, seen, fsync = contents(target), [], os.fsync

    def look(descriptor):
        seen.append(contents(target))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    assert write(kind, "two", "--overwrite")[1][0] == 0
    new = contents(target)
    assert new != old and old in seen
    assert all(found in (old, new) for found in seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.slow)])
def test_a_disk_that_fails_at_a_flush_leaves_the_old_one_or_the_new_one_whole(write, monkeypatch, events, kind, number):
    target, _ = write(kind, "two")
    new, fsync = contents(target), os.fsync
    events.clear()
    write(kind, "one", "--overwrite")
    old, flushes = contents(target), sum(event[0] == "flush" for event in events)
    for failing in (0, flushes // 2, flushes - 1):
        count = 0

        def broken(descriptor, failing=failing):
            nonlocal count
            count += 1
            if count > failing:
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            status, err = write(kind, "two", "--overwrite")[1]
        sentence = err.splitlines()[-1]
        if number == errno.ENOSPC:
            assert (status, sentence.startswith(f"dit-convert: error: cannot write {target}")) == (2, True), err
        else:
            assert (status, "cannot be used (Input/output error); the disk" in sentence) == (1, True), err
        assert contents(target) in (old, new), failing
    assert write(kind, "two", "--overwrite")[1][0] == 0
    assert contents(target) == new
    assert [path.name for path in target.parent.iterdir()] == [target.name], "nothing hidden is left"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_two_at_once_for_one_name_are_one_and_a_refusal(write, kind, flags):
    target = write(kind)[0] if flags else write(kind, "absent")[0]
    before = contents(target) if flags else None
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "holding\n"
        _, (status, err) = write(kind, "two", *flags)
        assert (status, "another command is making" in err) == (2, True), err
        assert (contents(target) == before) if flags else not target.exists()
    finally:
        holder.communicate("")
    assert write(kind, "two", *flags)[1][0] == 0


def test_what_appears_meanwhile_is_kept(write, monkeypatch):
    """The slower of two does not replace what the quicker one, of another program, has put there."""
    target = write("dit", "absent")[0]
    record = publish.write_json

    def appear(path, value):
        record(path, value)
        target.mkdir(parents=True)
        (target / "thesis.txt").write_text("years of work")

    monkeypatch.setattr(publish, "write_json", appear)
    status, err = write("dit")[1]
    assert (status, "appeared meanwhile" in err) == (2, True)
    assert contents(target) == {"thesis.txt": b"years of work"}


def test_an_empty_folder_is_a_free_name(write):
    target = write("dit", "absent")[0]
    for kind in ("dit", "diffusers", "store"):
        target.mkdir(parents=True)
        status, err = write(kind)[1]
        assert status == 0, err
        publish.remove_folder(target)


def test_a_second_import_of_other_features_changes_nothing_without_overwrite(write):
    target, _ = write("store")
    before = contents(target)
    status, err = write("store", "two")[1]
    assert (status, "--overwrite" in err) == (2, True)
    assert contents(target) == before


def test_an_import_goes_on_after_a_kill_and_sweeps_what_that_left(write, monkeypatch):
    from pipeline.convert import imports

    target, _ = write("store")
    whole = contents(target)
    (target / "manifest.json").unlink()
    (target / "train-00000.json").unlink()
    (target / ".work").mkdir()
    (target / ".work" / "train-00000.safetensors.1.partial").write_bytes(b"half")
    assert write("store")[1][0] == 0
    assert contents(target) == whole
    monkeypatch.setattr(imports, "write_shard", None)
    assert write("store")[1][0] == 0, "what is finished is not made again"


def test_a_reader_completes_what_a_killed_conversion_had_begun_to_publish(write, monkeypatch, tmp_path):
    """Killed between the record and the name, the conversion is whole: whoever looks finds it."""
    from pipeline.checkpoint import load_checkpoint

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(publish, "_put", killed)
        with pytest.raises(Killed):
            write("dit")
    target = tmp_path / "target" / "out"
    assert not target.exists()
    assert load_checkpoint(target)[1] == CONFIG


@pytest.fixture
def store(tmp_path, write):
    """A store of three points that the demo VAE decodes."""
    target, (status, err) = write("store", "one", "--vae", "demo")
    assert status == 0, err
    return target


def test_a_contact_sheet_is_flushed_before_it_gets_its_name_and_replaces_the_old_one_whole(
    store, command, tmp_path, events
):
    picture = tmp_path / "pictures" / "sheet.png"
    for per_class in (1, 2):
        events.clear()
        status, err = command(inspect, "dit-inspect", store, "--grid", picture, "--per-class", per_class)
        assert status == 0, err
        check_order(events, picture, in_place=False)
        assert [path.name for path in picture.parent.iterdir()] == ["sheet.png"]


def test_a_checkpoint_is_read_as_the_conversion_was_asked_to(tmp_path, monkeypatch):
    asked = {}

    def read(path, **how):
        asked.update(how)
        raise UserError("read")

    monkeypatch.setattr(run, "read_stored", read)
    given = {"average": 0.1, "at_step": 6, "num_heads": 2, "objective": "flow", "verify_weights": False}
    with pytest.raises(UserError, match="read"):
        run.convert(ConvertOptions(from_="here.pt", to=str(tmp_path / "there"), format="dit", **given))
    assert asked == {"weights": "sigma=0.1@6", "num_heads": 2, "objective": "flow", "verify": False}
