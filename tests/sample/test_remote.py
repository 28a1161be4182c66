"""dit-sample --out s3://…: the objects of a local output, finished by its JSON, whatever is killed, throttled or there."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from pipeline.runtime import remote_files, remote_output
from sample.__main__ import main

pytestmark = pytest.mark.usefixtures("quick_urls")
FEW = ("--classes", "1,2", "--samples-per-class", "2")


def left_in_cache(tmp_path):
    return [path for path in (tmp_path / "cache" / "outputs").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["grid.png", "samples.npz", "latents.safetensors", "pictures/"])
def test_an_output_in_a_bucket_has_the_bytes_of_a_local_one_and_its_json_comes_last(s3, command, tmp_path, name):
    assert command("--out", f"{tmp_path}/{name}", *FEW)[0] == 0
    put = []
    s3.before_answer = lambda method, path: put.append(path.split("/", 2)[2]) if method == "PUT" else None
    status, said = command("--out", f"{s3.url}/made/{name}", *FEW)
    s3.before_answer = None
    assert status == 0 and f"all of it is at {s3.url}/made/{name.rstrip('/')}" in said
    made = sorted(path for path in tmp_path.rglob(f"{name.rstrip('/')}*") if "cache" not in path.parts)
    files = sorted(inner for path in made for inner in [path, *path.rglob("*")] if inner.is_file())
    assert s3.names("made") == sorted(path.relative_to(tmp_path).as_posix() for path in files)
    assert all(s3.read(f"made/{path.relative_to(tmp_path).as_posix()}") == path.read_bytes() for path in files)
    assert put[0].endswith("upload.json") and put[-1] == f"made/{name.rstrip('/')}.json"
    assert left_in_cache(tmp_path) == []
    put.clear()
    status, said = command("--out", f"{s3.url}/made/{name}", *FEW)
    assert status == 0 and "is finished, made with these very settings" in said and put == []


def test_a_strip_goes_along_and_is_missed_when_it_is_gone(s3, command):
    asked = ("--out", f"{s3.url}/grid.png", *FEW, "--trajectory", "2")
    assert command(*asked)[0] == 0
    assert s3.names() == ["grid.png", "grid.png.json", "grid.trajectory.png"]
    s3.files().rm_file(f"{s3.bucket}/grid.trajectory.png")
    status, said = command(*asked)
    assert status == 2 and "grid.trajectory.png is not what its JSON says; pass --overwrite" in said
    assert command(*asked, "--overwrite")[0] == 0 and "grid.trajectory.png" in s3.names()


def test_what_is_there_is_replaced_only_with_overwrite_and_then_leaves_nothing_of_the_old_one(s3, command):
    out = f"{s3.url}/pictures/"
    assert command("--out", out, *FEW)[0] == 0
    before = {name: s3.read(name) for name in s3.names()}
    status, said = command("--out", out, "--classes", "3", "--samples-per-class", "1")
    assert status == 2 and "is there already, made another way" in said
    assert {name: s3.read(name) for name in s3.names()} == before
    assert command("--out", out, "--classes", "3", "--samples-per-class", "1", "--overwrite")[0] == 0
    assert s3.names() == ["pictures.json", "pictures/n03/000000.png"]
    s3.files().pipe_file(f"{s3.bucket}/pictures/notes.txt", b"mine")
    status, said = command("--out", out, *FEW, "--overwrite")
    assert status == 2 and "holds other things" in said and s3.read("pictures/notes.txt") == b"mine"


def test_someone_elses_object_is_refused_before_anything_is_made_and_one_that_appears_meanwhile_stays(
    s3, command, monkeypatch
):
    s3.files().pipe_file(f"{s3.bucket}/samples.npz", b"mine")
    status, said = command("--out", f"{s3.url}/samples.npz", *FEW)
    assert status == 2 and f"{s3.url}/samples.npz is there already" in said and "samples:" not in said
    s3.files().rm_file(f"{s3.bucket}/samples.npz")
    put = remote_output.RemoteOutput.put

    def late(self, *arguments, **settings):
        s3.files().pipe_file(f"{s3.bucket}/samples.npz", b"mine")
        put(self, *arguments, **settings)

    monkeypatch.setattr(remote_output.RemoteOutput, "put", late)
    status, said = command("--out", f"{s3.url}/samples.npz", *FEW)
    assert status == 2 and "samples.npz is there already" in said
    assert s3.read("samples.npz") == b"mine" and "samples.npz.json" not in s3.names()


def test_an_object_that_appears_between_the_look_and_the_upload_is_refused_by_the_server(s3, monkeypatch, tmp_path):
    far = remote_files.UrlFolder(s3.url)
    send = far._files.pipe_file

    def late(place, data, **how):
        send(place, b"mine")
        send(place, data, **how)

    monkeypatch.setattr(far._files, "pipe_file", late)
    with pytest.raises(remote_files.UserError, match="one is there already"):
        far.put("one", b"other", replaces=False)
    assert s3.read("one") == b"mine"


def test_damage_of_the_same_size_is_found_with_overwrite_and_other_sizes_always(s3, command):
    asked = ("--out", f"{s3.url}/samples.npz", *FEW)
    assert command(*asked)[0] == 0
    whole = s3.read("samples.npz")
    s3.files().pipe_file(f"{s3.bucket}/samples.npz", whole[:-1])
    status, said = command(*asked)
    assert status == 2 and "is not what its JSON says" in said
    s3.files().pipe_file(f"{s3.bucket}/samples.npz", whole[:-1] + b"?")
    assert command(*asked, "--overwrite")[0] == 0 and s3.read("samples.npz") == whole


def test_throttling_and_broken_uploads_are_waited_out_and_expired_credentials_are_a_sentence_and_the_work_is_kept(
    s3, command, monkeypatch, tmp_path
):
    s3.throttled, s3.breaks["samples.npz"] = 2, 2
    assert command("--out", f"{s3.url}/samples.npz", *FEW)[0] == 0
    assert s3.names() == ["samples.npz", "samples.npz.json"]
    put = remote_output.RemoteOutput.put

    def refused(self, *arguments, **settings):
        s3.expired = True
        put(self, *arguments, **settings)

    monkeypatch.setattr(remote_output.RemoteOutput, "put", refused)
    status, said = command("--out", f"{s3.url}/more.npz", *FEW)
    assert status == 2 and "access is refused" in said and "Traceback" not in said
    s3.expired = False
    monkeypatch.setattr(remote_output.RemoteOutput, "put", put)
    status, said = command("--out", f"{s3.url}/more.npz", *FEW)
    assert status == 0 and "4 samples" not in said, "what was made is put there, and not made again"
    assert s3.read("more.npz") == s3.read("samples.npz") and left_in_cache(tmp_path) == []


@pytest.mark.parametrize("moment", ["upload.json", "samples.npz", "samples.npz.json"])
def test_a_kill_during_the_upload_is_completed_by_the_same_command_here_or_elsewhere(
    s3, tiny, vae_folder, command, monkeypatch, tmp_path, moment
):
    words = [
        "--checkpoint",
        str(tiny),
        "--vae",
        str(vae_folder),
        "--steps",
        "3",
        "--out",
        f"{s3.url}/samples.npz",
        *FEW,
    ]
    process = multiprocessing.get_context("fork").Process(target=killed_before, args=(words, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and "samples.npz.json" not in s3.names()
    status, said = command("--out", f"{s3.url}/samples.npz", "--classes", "5", "--samples-per-class", "1")
    if moment != "upload.json":
        assert status == 2 and "is being put there by another command" in said
    else:
        s3.files().rm(f"{s3.bucket}/", recursive=True)
        s3.files().mkdir(s3.bucket) if not s3.files().exists(s3.bucket) else None
    if moment == "samples.npz.json":  # another machine
        monkeypatch.setenv("DIT_LATENTS_CACHE", str(tmp_path / "elsewhere"))
    assert command("--out", f"{s3.url}/samples.npz", *FEW)[0] == 0
    assert s3.names() == ["samples.npz", "samples.npz.json"]
    assert json.loads(s3.read("samples.npz.json"))["output"]["bytes"] == len(s3.read("samples.npz"))


def killed_before(words, moment):
    """dit-sample in a process that is killed before it puts this object."""
    from tests.object_store import clear_instances

    clear_instances()
    put = remote_files.UrlFolder._put

    def watched(self, name, content, **how):
        if Path(name).name == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, name, content, **how)

    remote_files.UrlFolder._put = watched
    main(words)


def test_places_that_cannot_be_written_are_refused_before_anything_is_made(s3, command):
    for out, words in (
        (f"{s3.url}", "names no file or folder of its own"),
        ("https://127.0.0.1:9/x/samples.npz", "HTTP has no way to"),
        ("s3://no-such-bucket/samples.npz", "there is no such bucket"),
    ):
        status, said = command("--out", out, *FEW)
        assert status == 2 and words in said and "Traceback" not in said and "4 samples" not in said


def test_a_command_that_fails_leaves_nothing_that_keeps_another_one_away(s3, command, make_checkpoint):
    poisoned = make_checkpoint("poisoned", poison=True)
    status, said = command("--out", f"{s3.url}/samples.npz", *FEW, checkpoint=poisoned)
    assert status == 2 and "not finite" in said and s3.names() == []
