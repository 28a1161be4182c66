"""What `dit-evaluate` writes: never over something else unless told to, the old one whole until the new one is."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from pipeline.runtime.files import sha256_of
from pipeline.runtime.publish import work_folder_of
from sample.evaluate import evaluation, features
from sample.work_folder import WorkFolder
from tests.sample.evaluate.test_protocol import stand_in


def images(path, seed, count=6):
    np.savez(path, np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8))
    return path


def hidden_names(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_result_that_appeared_meanwhile_is_not_replaced(run, tmp_path, monkeypatch):
    """Another command answers another question under the same name while this one computes."""
    out = tmp_path / "r.json"
    make = original = evaluation.make_features

    def slowly(*arguments, **settings):
        make(*arguments, **settings)
        monkeypatch.setattr(evaluation, "make_features", original)
        assert run("--samples", images(tmp_path / "b.npz", 1), "--metrics", "is", "--out", out)[0] == 0

    monkeypatch.setattr(evaluation, "make_features", slowly)
    status, _, message = run("--samples", images(tmp_path / "a.npz", 0, count=7), "--metrics", "is", "--out", out)
    assert (status, list(json.loads(out.read_text())["metrics"])) == (2, ["IS-6"])
    assert "holds another result; choose another name or --overwrite" in message


def test_the_same_command_beside_this_one_leaves_its_answer_to_both(run, tmp_path, monkeypatch):
    out, make = tmp_path / "r.json", evaluation.make_features
    command = ("--samples", images(tmp_path / "a.npz", 0), "--metrics", "is", "--out", out)
    inner = []

    def slowly(*arguments, **settings):
        make(*arguments, **settings)
        monkeypatch.setattr(evaluation, "make_features", make)
        inner.append(run(*command))

    monkeypatch.setattr(evaluation, "make_features", slowly)
    status, table, message = run(*command)
    assert (inner[0][0], status) == (0, 0)
    assert table == inner[0][1]
    assert "there already, made from these very inputs" in message
    assert hidden_names(tmp_path) == []


def test_an_old_reference_is_whole_until_the_new_one_is(run, tmp_path, monkeypatch):
    reference = tmp_path / "ref.npz"
    make = ("--make-reference", reference)
    assert run("--reference", images(tmp_path / "a.npz", 0), *make)[0] == 0
    before = {path: path.read_bytes() for path in (reference, tmp_path / "ref.npz.json")}

    def fail(path, *_, **__):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "write_statistics", fail)
    assert run("--reference", images(tmp_path / "b.npz", 1), *make, "--overwrite")[0] == 130
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "_features_of_batch", stand_in)
    assert run("--reference", images(tmp_path / "b.npz", 1), *make, "--overwrite")[0] == 0
    assert all(path.read_bytes() != data for path, data in before.items())
    assert hidden_names(tmp_path) == []


def test_a_reference_and_its_sidecar_are_of_one_command(run, tmp_path, monkeypatch):
    """Another command's reference appears while this one writes: both files are the other's."""
    reference, write = tmp_path / "ref.npz", evaluation.write_statistics
    other = tmp_path / "other.npz"
    assert run("--reference", images(tmp_path / "b.npz", 1), "--make-reference", other)[0] == 0

    def slowly(*arguments, **settings):
        write(*arguments, **settings)
        other.rename(reference)
        (tmp_path / "other.npz.json").rename(tmp_path / "ref.npz.json")

    monkeypatch.setattr(evaluation, "write_statistics", slowly)
    status, _, message = run("--reference", images(tmp_path / "a.npz", 0), "--make-reference", reference)
    assert status == 2
    assert "is there already; pass --overwrite" in message
    assert json.loads((tmp_path / "ref.npz.json").read_text())["sha256"] == sha256_of(reference)


def test_a_reference_that_is_not_what_its_sidecar_says_is_not_taken_for_finished(run, tmp_path):
    reference = tmp_path / "ref.npz"
    make = ("--reference", images(tmp_path / "a.npz", 0), "--make-reference", reference)
    assert run(*make)[0] == 0
    assert "nothing to do" in run(*make)[2]
    data = bytearray(reference.read_bytes())
    data[len(data) // 2] ^= 1
    reference.write_bytes(data)
    status, _, message = run(*make)
    assert status == 2
    assert "holds something else" in message


def test_images_that_changed_without_their_size_or_time_are_looked_at_again(run, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(5):
        Image.new("RGB", (2, 2), (k, 9, 30 * k)).save(folder / f"{k}.bmp")
    command = ("--samples", folder, "--metrics", "is", "--out", tmp_path / "r.json")
    assert run(*command)[0] == 0
    image = folder / "3.bmp"
    times = (image.stat().st_atime_ns, image.stat().st_mtime_ns)
    data = bytearray(image.read_bytes())
    data[-3] ^= 0xFF
    image.write_bytes(data)
    os.utime(image, ns=times)
    status, _, message = run(*command)
    assert status == 2
    assert "holds another result" in message


def test_a_changed_npz_whose_directory_is_the_same_is_looked_at_again(run, tmp_path):
    """The checksums in the directory are those of before; another process would read what is behind the change only."""
    path = images(tmp_path / "x.npz", 0)
    command = ("--samples", path, "--metrics", "is", "--out", tmp_path / "r.json")
    assert run(*command)[0] == 0
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    assert run(*command)[0] == 2


def test_what_a_kill_kept_from_its_name_is_published_before_it_is_read(run, tmp_path, monkeypatch):
    """A reference is recorded as finished, and the process ends before the renames."""
    from pipeline.runtime import publish

    reference = tmp_path / "ref.npz"
    monkeypatch.setattr(publish, "_put_all", lambda _work: (_ for _ in ()).throw(KeyboardInterrupt))
    make = ("--reference", images(tmp_path / "a.npz", 0, count=2050), "--make-reference", reference)
    assert run(*make)[0] == 130
    assert not reference.exists()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "_features_of_batch", stand_in)
    compare = ("--samples", tmp_path / "a.npz", "--reference", reference, "--metrics", "fid")
    status, table, message = run(*compare)
    assert status == 0, message
    assert float(table.split()[4]) == pytest.approx(0, abs=1e-6)


def test_an_answer_stands_for_the_settings_that_its_metrics_read(run, tmp_path):
    out = tmp_path / "r.json"
    command = ("--samples", images(tmp_path / "a.npz", 0), "--out", out)
    assert run(*command, "--metrics", "is")[0] == 0
    assert "nothing to do" in run(*command, "--metrics", "is", "--kid-subsets", 7, "--seed", 1)[2]
    assert run(*command, "--metrics", "is", "--batch-size", 4)[0] == 2
    compare = (*command, "--reference", images(tmp_path / "b.npz", 1), "--metrics", "kid", "--overwrite")
    assert run(*compare)[0] == 0
    for change in (("--kid-subsets", 7), ("--seed", 1), ("--kid-subset-size", 5)):
        assert run(*compare[:-1], *change)[0] == 2


def test_memory_that_ends_is_one_sentence(run, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(features, "_features_of_batch", full)
    status, _, message = run("--samples", images(tmp_path / "a.npz", 0), "--metrics", "is")
    assert status == 2
    sentences = [line for line in message.splitlines() if line.strip() and "0 of 6 images" not in line]
    assert len(sentences) == 1 and "--batch-size" in sentences[0]


def test_a_damaged_part_is_made_again(run, tmp_path, monkeypatch):
    """Of two parts, one is damaged between a kill and the next run."""
    from sample.evaluate.npz import NpzImages

    monkeypatch.setattr(NpzImages, "part_size", 3)
    command = ("--samples", images(tmp_path / "a.npz", 0), "--metrics", "is", "--out", tmp_path / "r.json")
    assert run(*command)[0] == 0
    right = json.loads((tmp_path / "r.json").read_text())["metrics"]
    (tmp_path / "r.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "compute_scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*command)[0] == 130
    parts = sorted(tmp_path.glob(".r.json.features/*/chunk-*"))
    assert len(parts) == 2
    data = bytearray(parts[1].read_bytes())
    data[-5] ^= 0xFF
    parts[1].write_bytes(data)
    assert run(*command)[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == right


@pytest.mark.parametrize(
    ("what", "name"), [(("--metrics", "is", "--out"), "out.json"), (("--make-reference",), "out.npz")]
)
@pytest.mark.parametrize("more", [(), ("--overwrite", "--batch-size", "3")])
def test_a_command_killed_after_its_output_had_its_name_is_cleaned_up_after_by_the_next(
    run, tmp_path, monkeypatch, what, name, more
):
    """The features, the folder that the output was made in, and the lock all stay when it is killed there."""
    out = tmp_path / name
    command = ("--samples", images(tmp_path / "a.npz", 0), *what, out)
    with monkeypatch.context() as killed:
        killed.setattr(WorkFolder, "remove", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:
            run(*command)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    work = work_folder_of(out)
    (work / "present").mkdir(parents=True)
    assert sorted(hidden_names(tmp_path)) == [f".{name}.features", f".{name}.work"]
    assert run("--samples", images(tmp_path / "a.npz", 0), *what, out, *more)[0] == 0
    assert hidden_names(tmp_path) == []
