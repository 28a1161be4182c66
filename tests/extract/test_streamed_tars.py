"""dit-extract --remote-tars stream: the bytes of a local extraction, with a few tars on the disk and never all of them."""

import contextlib
import errno
import io
import json
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from extract import fill
from extract.sources import tars
from pipeline.runtime import remote_copies
from pipeline.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_urls")
TARS, IMAGES = 16, 3


@pytest.fixture
def made(tmp_path):
    """Tars of incompressible pictures with labels, and the bytes of one."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(TARS):
        with tarfile.open(folder / f"{number:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for k in range(IMAGES * number, IMAGES * number + IMAGES):
                pixels = np.random.default_rng(k).integers(0, 256, (300, 300, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, format="png")
                for name, data in ((f"{k:04d}.png", buffer.getvalue()), (f"{k:04d}.cls", str(k % 4).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder, (folder / "000.tar").stat().st_size


@pytest.fixture
def there(s3, made):
    """The same in a bucket; gives --data."""
    for path in made[0].iterdir():
        s3.files().put(str(path), f"{s3.bucket}/tars/{path.name}")
    remote_copies.local_place.cache_clear()
    return f"{s3.url}/tars/{{000..{TARS - 1:03d}}}.tar"


def most_held(folder, during):
    """(the most bytes that a folder's files held on the disk, what the call gave)."""
    most, done = [0], threading.Event()

    def look():
        while not done.is_set():
            held = 0
            for path in folder.rglob("*") if folder.exists() else ():
                with contextlib.suppress(FileNotFoundError):
                    held += 512 * path.stat().st_blocks
            most.append(held)
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        result = during()
    finally:
        done.set()
        thread.join()
    return max(most), result


def test_few_tars_are_on_the_disk_at_a_time_and_the_bytes_are_those_of_local_ones(
    made, there, command, hashes, tmp_path
):
    folder, tar_bytes = made
    local = str(folder / f"{{000..{TARS - 1:03d}}}.tar")
    assert command("--out", tmp_path / "local", data=local)[0] == 0
    cache = tmp_path / "source-cache"
    words = ("--remote-tars", "stream", "--source-cache", cache)
    most, (status, said) = most_held(cache, lambda: command("--out", tmp_path / "streamed", *words, data=there))
    assert status == 0, said
    assert hashes(tmp_path / "streamed") == hashes(tmp_path / "local")
    assert 0 < most < 6 * tar_bytes < TARS * tar_bytes / 2, f"{most / tar_bytes:.1f} tars were on the disk"
    assert f"{TARS} files to fetch" in said and "of which at most 4 are whole here at a time" in said


def test_a_stopped_extraction_goes_on_with_streams_or_with_copies_to_the_same_bytes(
    made, there, command, hashes, tmp_path
):
    assert command("--out", tmp_path / "whole", data=there)[0] == 0
    out = tmp_path / "store"
    assert command("--out", out, "--shard-range", "0:2", "--remote-tars", "stream", data=there)[0] == 0
    assert command("--out", out, "--shard-range", "2:4", data=there)[0] == 0
    assert command("--out", out, "--remote-tars", "stream", data=there)[0] == 0
    assert hashes(out) == hashes(tmp_path / "whole")
    assert json.loads((out / "manifest.json").read_text())["samples"] == TARS * IMAGES


def test_into_a_bucket_from_a_bucket_leaves_no_disk_behind_and_waits_out_throttling(
    s3, there, command, hashes, tmp_path, monkeypatch
):
    assert command("--out", tmp_path / "whole", data=there)[0] == 0
    read, calls = tars.part_of, []

    def throttled(*where):
        calls.append(where)
        if len(calls) == 3:  # the first one is of the listing
            s3.throttled = 3
        return read(*where)

    monkeypatch.setattr(tars, "part_of", throttled)
    assert command("--out", f"{s3.url}/store", "--remote-tars", "stream", data=there)[0] == 0
    s3.files().get(f"{s3.bucket}/store/", str(tmp_path / "downloaded"), recursive=True)
    assert hashes(tmp_path / "downloaded") == hashes(tmp_path / "whole")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_copies_of_tars_wait_out_throttling_and_connections_that_are_cut(s3, made, there, tmp_path, monkeypatch):
    address = there.replace(f"{{000..{TARS - 1:03d}}}", "000")
    honest, begun = remote_copies.pieces_of, []

    def cut_twice(*where, **more):
        begun.append(where)
        pieces = honest(*where, **more)
        if len(begun) > 2:
            yield from pieces
            return
        yield next(pieces)[:1000]
        if len(begun) == 1:  # the second time nobody says that it is cut
            raise ConnectionResetError("cut")

    monkeypatch.setattr(remote_copies, "pieces_of", cut_twice)
    s3.throttled = 3
    remote_copies.fetch([address], tmp_path / "copies")
    assert len(begun) == 3 and s3.throttled == 0
    assert remote_copies.local_place(address, tmp_path / "copies").read_bytes() == (made[0] / "000.tar").read_bytes()


def test_a_tar_that_is_replaced_meanwhile_ends_the_command_before_its_images_get_into_a_shard(
    s3, made, there, command, tmp_path, monkeypatch
):
    write = fill.write_latents

    def late(*arguments, **settings):
        data = (made[0] / "003.tar").read_bytes()
        s3.files().pipe_file(f"{s3.bucket}/tars/003.tar", data[:-1024] + bytes(2048))
        write(*arguments, **settings)

    monkeypatch.setattr("extract.run.write_latents", late)
    status, said = command("--out", tmp_path / "store", "--remote-tars", "stream", data=there)
    assert status == 2 and "003.tar was replaced on the server meanwhile" in said
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_a_server_that_gives_no_parts_and_a_disk_that_is_too_small_are_told_before_anything_is_fetched(
    made, there, command, serve, tmp_path, monkeypatch
):
    data = f"{serve(made[0])}/{{000..003}}.tar"  # Python's server of files sends all of a file whatever is asked for
    status, said = command("--out", tmp_path / "store", "--remote-tars", "stream", data=data)
    assert status == 2 and "the server gives no parts of files; then leave --remote-tars stream away" in said
    disk = type(remote_copies.shutil.disk_usage(tmp_path))(10**9, 10**9 - 10, 10)
    monkeypatch.setattr(remote_copies.shutil, "disk_usage", lambda _: disk)
    status, said = command("--out", tmp_path / "store", data=there)
    assert status == 2 and "--remote-tars stream, which keeps a few at a time" in said


def test_a_copy_that_could_not_be_thinned_to_its_end_is_none_and_leaves_nothing(there, command, tmp_path, monkeypatch):
    thin = tars.without_images

    def cut_off(path):
        thin(path)
        path.write_bytes(path.read_bytes()[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tars, "without_images", cut_off)
    words = ("--remote-tars", "stream", "--source-cache", tmp_path / "source-cache")
    status, said = command("--out", tmp_path / "store", *words, data=there)
    assert status == 2 and "cannot write" in said and "Traceback" not in said
    assert [path for path in (tmp_path / "source-cache").rglob("*") if path.is_file()] == []
    monkeypatch.setattr(tars, "without_images", thin)
    assert command("--out", tmp_path / "store", *words, data=there)[0] == 0


def test_a_server_that_stops_telling_sizes_is_named_before_anything_is_fetched(tmp_path, monkeypatch):
    told = [{"size": "3"}]

    def tell(_):
        if not told:
            raise ConnectionError("refused")
        return told.pop()

    monkeypatch.setattr(remote_copies, "_told", tell)
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/a.tar cannot be fetched \(refused\)"):
        remote_copies.fetch(["http://127.0.0.1:9/a.tar"], tmp_path / "copies")
    assert list((tmp_path / "copies").iterdir()) == []
