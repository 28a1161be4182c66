"""Files behind a URL, on a real S3 server with faults and on a disk by file://: whole or not at all, and told clearly."""

import hashlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.runtime import remote_files
from pipeline.runtime.errors import UserError
from pipeline.runtime.remote_files import DamagedError, UrlFolder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote_files, "_FIRST_WAIT_S", 0.01)


@pytest.fixture(params=["s3", "memory", "file"])
def folder(request, tmp_path):
    """An empty folder behind a URL, of each kind of writing."""
    if request.param == "s3":
        yield UrlFolder(f"{request.getfixturevalue('s3').url}/a/b")
    elif request.param == "file":
        yield UrlFolder(f"file://{tmp_path}/far/a/b")
    else:
        import fsspec

        yield UrlFolder("memory://remote-files/a/b/")
        fsspec.filesystem("memory").rm("/remote-files", recursive=True)


def test_files_are_put_listed_read_fetched_replaced_and_removed(folder, tmp_path):
    assert folder.names() == {} and folder.read("one") is None
    folder.remove("one")
    (tmp_path / "big").write_bytes(bytes(range(256)) * 1000)
    folder.put("c/big", tmp_path / "big")
    folder.put("one", b"first")
    assert folder.names() == {"c/big": 256_000, "one": 5} and folder.names("c") == {"c/big": 256_000}
    folder.put("one", b"the second")
    assert folder.read("one") == b"the second" and folder.names()["one"] == 10
    sha256 = hashlib.sha256((tmp_path / "big").read_bytes()).hexdigest()
    folder.fetch("c/big", tmp_path / "copy", size=256_000, sha256=sha256)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "big").read_bytes()
    folder.remove("one")
    assert folder.names() == {"c/big": 256_000}


def test_a_folder_that_is_gone_is_removed_again_without_a_word(folder):
    folder.put("other", b"1")
    folder.put("c/one", b"1")
    for _ in range(2):
        folder.remove_folder("c")
        assert folder.names() == {"other": 1}


@pytest.mark.parametrize("content", [b"bytes", Path("file")])
def test_the_server_itself_is_asked_to_refuse_a_name_that_is_taken(content):
    asked = []
    answer = SimpleNamespace(
        protocol="s3", pipe_file=lambda *_, **how: asked.append(how), put_file=lambda *_, **how: asked.append(how)
    )
    far = SimpleNamespace(_files=answer, _place=str, _send=lambda *what, **how: UrlFolder._send(far, *what, **how))
    for replaces in (False, True):
        UrlFolder._put(far, "name", content, replaces=replaces)
    assert asked == [{"mode": "create"}, {}]


def test_what_is_not_what_was_promised_is_refused_and_leaves_nothing(folder, tmp_path):
    folder.put("one", b"12345")
    sha256 = hashlib.sha256(b"12345").hexdigest()
    for promised, words in (
        ({"size": 6, "sha256": sha256}, "cut off"),
        ({"size": 4, "sha256": sha256}, "too long"),
        ({"size": 5, "sha256": "0" * 64}, "has not the SHA-256"),
    ):
        with pytest.raises(DamagedError, match=words):
            folder.fetch("one", tmp_path / "copy", **promised)
    with pytest.raises(DamagedError, match="other is missing"):
        folder.fetch("other", tmp_path / "copy", size=5, sha256=sha256)
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []


def test_a_file_on_a_disk_gets_its_name_when_it_is_whole(tmp_path, monkeypatch):
    far = UrlFolder(f"file://{tmp_path}/far")
    seen = []
    send = far._files.pipe_file

    def looked_at(place, data):
        send(place, data)
        seen.append(sorted(path.name for path in (tmp_path / "far").iterdir()))

    monkeypatch.setattr(far._files, "pipe_file", looked_at)
    far.put("one", b"x")
    assert seen == [[".one.partial"]] and [path.name for path in (tmp_path / "far").iterdir()] == ["one"]


def test_an_upload_of_several_parts_appears_when_its_last_part_is_there(s3, tmp_path, monkeypatch):
    (tmp_path / "big").write_bytes(bytes(11 << 20))
    far = UrlFolder(s3.url)
    put = far._files.put_file
    monkeypatch.setattr(far._files, "put_file", lambda path, place: put(path, place, chunksize=5 << 20))
    seen = []
    s3.before_answer = lambda method, path: seen.append(method) if path.endswith("/big") else None
    far.put("big", tmp_path / "big")
    assert seen.count("PUT") == 3, "three parts"
    s3.before_answer = None
    s3.breaks["big"] = 10**6
    monkeypatch.setattr(remote_files, "_ATTEMPTS", 1)
    with pytest.raises(UserError, match="cannot be written"):
        far.put("other-big", tmp_path / "big")
    assert s3.names() == ["big"]


def test_throttling_and_a_broken_upload_are_waited_out(s3):
    far = UrlFolder(s3.url)
    s3.throttled = 3
    far.put("one", b"1" * 10_000)
    s3.throttled = 3
    assert far.read("one") == b"1" * 10_000
    s3.breaks["two"] = 2
    far.put("two", b"2" * 10_000)
    assert s3.read("two") == b"2" * 10_000 and s3.breaks["two"] == 0


def test_what_does_not_pass_is_said_in_a_sentence_and_leaves_nothing_half_written(s3, quick_urls, monkeypatch):
    far = UrlFolder(f"{s3.url}/run")
    s3.expired = True
    for action in (
        lambda: far.put("one", b"1"),
        lambda: far.read("one"),
        far.names,
        lambda: far.remove("one"),
    ):
        with pytest.raises(UserError, match=r"s3://.*access is refused .*check the credentials"):
            action()
    s3.expired = False
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)  # it waits longer each time, in each of our attempts
    s3.breaks["one"] = 10**6
    with pytest.raises(UserError, match=r"run/one cannot be written \("):
        far.put("one", b"1" * 10_000)
    assert s3.names() == []
    s3.breaks.clear()
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x/one cannot be written: there is no such bucket"):
        UrlFolder("s3://no-such-bucket/x").put("one", b"1")
    with pytest.raises(UserError, match="HTTP has no way to"):
        UrlFolder("http://127.0.0.1:9/x").put("one", b"1")


def test_refused_credentials_are_told_at_once(s3):
    s3.expired = True
    begun = time.monotonic()
    with pytest.raises(UserError, match="access is refused"):
        UrlFolder(s3.url).put("one", b"1")
    assert len(s3.asked) <= 2 and time.monotonic() - begun < 60


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch):
    from fsspec.core import get_filesystem_class

    registry = sys.modules[get_filesystem_class.__module__]
    known = {"class": "no_such_s3fs.X", "err": "Install s3fs"}
    monkeypatch.setitem(registry.known_implementations, "s3", known)
    monkeypatch.delitem(registry._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3://b/x cannot be opened: Install s3fs; pip install 'dit-pipeline\[s3\]'"):
        UrlFolder("s3://b/x")
    with pytest.raises(UserError, match="gopher://x cannot be opened"):
        UrlFolder("gopher://x")


def test_a_listing_is_looked_up_anew_each_time(s3):
    far = UrlFolder(s3.url)
    assert far.names() == {}
    UrlFolder(s3.url).put("one", b"1")
    s3.files().pipe_file(f"{s3.bucket}/two", b"22")
    assert far.names() == {"one": 1, "two": 2}
    s3.hidden.add("two")
    assert far.names() == {"one": 1} and far.read("two") == b"22"
    assert far.size("two") == 2 and far.size("three") is None
