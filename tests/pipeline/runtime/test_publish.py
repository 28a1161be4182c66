"""Outputs that appear whole under their names, killed or doubled at any call."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.runtime import publish
from pipeline.runtime.errors import UserError
from pipeline.runtime.publish import finish, making, work_folder_of

ROOT = Path(__file__).parents[3]


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def make(out, text, *, overwrite=False, folder=False):
    sidecar = out.with_name(f"{out.name}.json")
    with making(out, overwrite=overwrite, beside=(sidecar,)) as stage:
        made = stage.place(out)
        if folder:
            made.mkdir()
            (made / "a").write_text(text)
        else:
            made.write_text(text)
        stage.place(sidecar).write_text(f"of {text}")


def content(out):
    return ((out / "a") if out.is_dir() else out).read_text(), out.with_name(f"{out.name}.json").read_text()


@pytest.mark.parametrize("folder", [False, True])
def test_all_names_appear_together_and_nothing_else_stays(tmp_path, folder):
    out = tmp_path / "deep" / "x"
    make(out, "one", folder=folder)
    assert content(out) == ("one", "of one")
    assert listing(tmp_path / "deep") == (["x", "x.json", "x/a"] if folder else ["x", "x.json"])


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_there_is_replaced_only_when_that_is_asked_for(tmp_path, folder):
    out = tmp_path / "x"
    make(out, "one", folder=folder)
    with pytest.raises(UserError, match="is there already; pass --overwrite"):
        make(out, "two", folder=folder)
    assert content(out) == ("one", "of one")
    make(out, "two", folder=folder, overwrite=True)
    assert content(out) == ("two", "of two")
    assert not any(name.startswith(".") for name in listing(tmp_path))


@pytest.mark.parametrize("late", ["x", "x.json"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_name_that_appears_while_the_output_is_made_is_kept_and_nothing_is_published(
    tmp_path, late, exchange, monkeypatch
):
    out = tmp_path / "x"
    if not exchange:
        monkeypatch.setattr(publish, "renameat2", lambda *_: False)
    real = publish.write_json

    def write_json(path, value):
        real(path, value)
        (tmp_path / late).write_text("a stranger's")

    monkeypatch.setattr(publish, "write_json", write_json)
    with pytest.raises(UserError, match=f"{late} appeared meanwhile"):
        make(out, "one")
    assert listing(tmp_path) == [late]
    assert (tmp_path / late).read_text() == "a stranger's"


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_while_it_is_made_leaves_the_old_output_and_nothing_new(tmp_path, folder):
    out = tmp_path / "x"
    make(out, "one", folder=folder)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="no"), making(out, overwrite=True) as stage:
        stage.place(out).write_text("half")
        raise ValueError("no")
    assert listing(tmp_path) == before
    assert content(out) == ("one", "of one")


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("step", range(8))
def test_killed_at_any_step_of_publishing_a_reader_or_the_next_start_sees_one_output_whole(
    tmp_path, monkeypatch, folder, exchange, step
):
    """Every call that changes something is a step; after it nothing more happens, as when a process is killed."""
    out = tmp_path / "x"
    make(out, "one", folder=folder)
    left = step

    class Killed(BaseException):
        pass

    def counting(real):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if not exchange:
            patch.setattr(publish, "renameat2", lambda *_: False)
        else:
            patch.setattr(publish, "renameat2", counting(publish.renameat2))
        for name in ("write_json", "remove_folder", "flush_folder"):
            patch.setattr(publish, name, counting(getattr(publish, name)))
        for name in ("rename", "replace", "unlink"):
            patch.setattr(Path, name, counting(getattr(Path, name)))
        with contextlib.suppress(Killed):
            make(out, "two", folder=folder, overwrite=True)
    finish(out)
    assert content(out) in {("one", "of one"), ("two", "of two")}
    make(out, "two", folder=folder, overwrite=True)
    assert content(out) == ("two", "of two")
    assert not any(name.startswith(".") for name in listing(tmp_path))


HOLDER = """
import sys
import threading
from pathlib import Path
from pipeline.runtime.publish import making
with making(Path(sys.argv[1]), overwrite=True) as stage:
    stage.place(Path(sys.argv[1])).write_text("theirs")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_two_commands_for_one_name_never_mix_and_the_claim_dies_with_its_process(tmp_path):
    out = tmp_path / "x"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, out], env=environment, **pipes) as holder:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match=f"another command is making {out}"):
            make(out, "ours", overwrite=True)
        holder.kill()
    make(out, "ours", overwrite=True)
    assert content(out) == ("ours", "of ours")
    assert listing(tmp_path) == ["x", "x.json"]


def test_work_of_a_killed_command_goes_with_the_next_start(tmp_path):
    out = tmp_path / "x"
    ready = work_folder_of(out) / publish.READY / "0"
    ready.mkdir(parents=True)
    (ready / "x").write_text("half")
    make(out, "one")
    assert listing(tmp_path) == ["x", "x.json"]


@pytest.mark.parametrize("taken", [False, True])
def test_a_reader_that_looks_while_an_output_is_published_waits_and_takes_nothing_from_it(tmp_path, monkeypatch, taken):
    """The reader comes between the record and the first name, when it looks as if the command had been killed."""
    out, write = tmp_path / "x", publish.write_json
    reader = threading.Thread(target=finish, args=(out,))

    def write_and_be_read(path, value):
        write(path, value)
        if taken:
            out.write_text("another's")
        reader.start()
        reader.join(0.3)

    monkeypatch.setattr(publish, "write_json", write_and_be_read)
    if taken:
        with pytest.raises(UserError, match=f"{out} appeared meanwhile"):
            make(out, "one")
        assert out.read_text() == "another's"
    else:
        make(out, "one")
        assert content(out) == ("one", "of one")
    reader.join(10)
    assert not any(name.startswith(".") for name in listing(tmp_path))


def killed_after_the_first_name(out, monkeypatch):
    class Killed(BaseException):
        pass

    puts, real = [], publish._put

    def put(made, final, *, overwrite):
        if puts:
            raise Killed
        puts.append(final)
        real(made, final, overwrite=overwrite)

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(publish, "_put", put)
        make(out, "one")


def test_an_output_that_its_user_removed_after_a_kill_does_not_come_back(tmp_path, monkeypatch):
    out = tmp_path / "x"
    killed_after_the_first_name(out, monkeypatch)
    out.unlink()
    finish(out)
    assert not out.exists()
    make(out, "two", overwrite=True)
    assert content(out) == ("two", "of two")
    assert listing(tmp_path) == ["x", "x.json"]


def test_on_a_disk_without_locks_a_single_command_publishes_all_the_same(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fails)
    make(tmp_path / "x", "one")
    make(tmp_path / "x", "two", overwrite=True)
    assert content(tmp_path / "x") == ("two", "of two")
    assert listing(tmp_path) == ["x", "x.json"]


def test_what_a_command_left_that_was_killed_after_its_output_had_its_name_is_swept_unless_it_lives(tmp_path):
    out = tmp_path / "x"
    make(out, "one")
    (work_folder_of(out) / publish.READY / "0").mkdir(parents=True)
    with publish.claimed(work_folder_of(out)):
        publish.sweep(out)
        assert work_folder_of(out).exists()
    (work_folder_of(out) / publish.READY / "0").mkdir(parents=True)
    publish.sweep(out)
    assert (content(out), listing(tmp_path)) == (("one", "of one"), ["x", "x.json"])
