"""Stores behind a URL: shards are copied once, checked, shared between processes; a real server on loopback."""

import contextlib
import functools
import http.server
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import torch

from pipeline.latents import LatentStore, remote
from pipeline.latents.verify import verify
from pipeline.runtime import remote_files
from pipeline.runtime.errors import UserError


class Server:
    """Python's own web server, which knows no ranges, counting what is asked for."""

    def __init__(self, folder):
        self.asked, self.failures = Counter(), {}
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rsplit("/", 1)[-1]
                outer.asked[name] += 1
                if outer.failures.get(name, 0) > 0:
                    outer.failures[name] -= 1
                    self.send_error(503)
                else:
                    super().do_GET()

            def log_message(self, *_):
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server(own_store):
    server = Server(own_store)
    yield server
    server.close()


def test_a_store_behind_http_reads_like_a_local_one_and_each_shard_travels_once(server, sample, tmp_path):
    store = LatentStore(server.url, cache=tmp_path / "cache")
    assert sum(server.asked.values()) == 1  # the manifest; shards come when they are needed
    assert torch.equal(store[[8]][0], sample.latents[[8]])
    assert sum(server.asked.values()) == 2
    assert torch.equal(store[:][0], sample.latents) and store.labels().tolist() == sample.labels.tolist()
    shards = {shard.file for shard in store.manifest.shards if shard.samples}
    assert all(server.asked[name] == 1 for name in shards)
    again = LatentStore(server.url + "/", cache=tmp_path / "cache")
    assert torch.equal(again.gather(np.array([11, 0]))[0], sample.latents[[11, 0], 0])
    assert all(server.asked[name] == 1 for name in shards)
    copies = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert {path.stem for path in copies} <= {shard.sha256 for shard in store.manifest.shards}


def test_all_shards_can_be_copied_ahead(server, sample, tmp_path):
    store = LatentStore(server.url, cache=tmp_path)
    store.download()
    server.close_count = sum(server.asked.values())
    assert torch.equal(store[:][0], sample.latents) and sum(server.asked.values()) == server.close_count == 4


def test_many_readers_of_one_cache_copy_each_shard_once(server, sample, tmp_path):
    """Each reader has its own locks, as processes have."""

    def read(_):
        return LatentStore(server.url, cache=tmp_path)[:][0]

    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(latents, sample.latents) for latents in threads.map(read, range(4)))
    assert all(count == 1 for name, count in server.asked.items() if name != "manifest.json")
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_what_a_killed_download_left_is_never_read(server, sample, tmp_path):
    store = LatentStore(server.url, cache=tmp_path)
    entry = store.manifest.shards[0]
    final = tmp_path / f"{entry.sha256}.{entry.file.rsplit('.', 1)[1]}"
    (tmp_path / f".{final.name}.123.partial").write_bytes(b"half")
    final.write_bytes(b"not even half")  # by a file system that lost its end
    assert torch.equal(store[:][0], sample.latents)


def test_a_shard_that_arrives_damaged_is_named_and_not_kept(server, own_store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files.time, "sleep", lambda _: None)
    path = next(own_store.glob("train-00000.[st]*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = LatentStore(server.url, cache=tmp_path)
    with pytest.raises(UserError, match=rf"{server.url}/{path.name} has not the SHA-256"):
        store[0]
    path.write_bytes(data[:-5])
    with pytest.raises(UserError, match=rf"{path.name} is cut off"):
        store[0]
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is missing"):
        store[0]
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock") and path.is_file()] == []


def test_a_failure_that_passes_is_no_failure(server, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files.time, "sleep", lambda _: None)
    store = LatentStore(server.url, cache=tmp_path)
    server.failures = {shard.file: 2 for shard in store.manifest.shards}
    assert torch.equal(store[:][0], sample.latents)


def test_a_url_without_a_finished_store_and_an_unknown_kind_of_url_are_told(server, own_store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_files.time, "sleep", lambda _: None)
    (own_store / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no finished latent store at http.*manifest\.json"):
        LatentStore(server.url, cache=tmp_path)
    with pytest.raises(UserError, match="gopher://x cannot be opened"):
        LatentStore("gopher://x", cache=tmp_path)
    server.close()
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        LatentStore(server.url, cache=tmp_path)


def test_a_remote_store_is_verified_too(server, own_store, tmp_path):
    assert verify(server.url, cache=tmp_path) == []
    (own_store / "train-00002.json").unlink()
    (fault,) = verify(server.url, cache=tmp_path)
    assert fault.startswith(f"{server.url}/train-00002.json is missing")


def test_a_copy_that_was_damaged_in_the_cache_is_fetched_anew_by_verifying(server, own_store, tmp_path):
    cache = tmp_path / "cache"
    assert verify(server.url, cache=cache) == []
    copy = min(path for path in cache.iterdir() if path.suffix in {".safetensors", ".tar"})
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert verify(server.url, cache=cache) == []
    assert copy.read_bytes() == whole


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """Sends without end what was asked for, or nothing at all."""

    protocol_version = "HTTP/1.0"
    folder, sent, falls_silent = None, 0, False

    def do_GET(self):
        path = self.folder / self.path.rsplit("/", 1)[-1]
        self.send_response(200)
        self.end_headers()
        if path.suffix not in {".tar", ".safetensors"}:
            self.wfile.write(path.read_bytes())
            return
        with contextlib.suppress(OSError):
            self.wfile.write(path.read_bytes()[:1000])
            if self.falls_silent:
                self.rfile.read()  # until the other side gives up
            while not self.falls_silent:
                type(self).sent += self.wfile.write(bytes(1 << 20))

    def log_message(self, *_):
        pass


@pytest.fixture(params=[True, False], ids=["silent", "endless"])
def misbehaving(own_store, request):
    handler = type("Handler", (Misbehaving,), {"folder": own_store, "falls_silent": request.param})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_reading_from_a_server_ends_at_the_promised_size_and_after_a_silence(misbehaving, tmp_path, monkeypatch):
    url, handler = misbehaving
    monkeypatch.setattr(remote_files, "SILENCE_S", 0.4)
    monkeypatch.setattr(remote_files.time, "sleep", lambda _: None)
    begun = time.monotonic()
    cache = tmp_path / "cache"
    store = LatentStore(url, cache=cache)
    with pytest.raises(UserError, match="cannot be read" if handler.falls_silent else "is too long"):
        store[0]
    assert time.monotonic() - begun < 30
    assert handler.sent < 3 * (64 << 20), "each of three attempts takes little more than what was promised"
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_a_half_copy_of_a_killed_process_goes_when_its_shard_is_fetched(server, sample, tmp_path):
    store = LatentStore(server.url, cache=tmp_path)
    entry = store.manifest.shards[0]
    left = tmp_path / f".{entry.sha256}.{entry.file.rsplit('.', 1)[1]}.123.partial"
    left.write_bytes(b"half")
    assert torch.equal(store[:][0], sample.latents)
    assert not left.exists()


def test_any_file_system_of_fsspec_will_do(whole_store, sample, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(whole_store), "/stores/one", recursive=True)
    store = LatentStore("memory://stores/one", cache=tmp_path)
    assert torch.equal(store[:][0], sample.latents)
    memory.rm("/stores", recursive=True)
    assert torch.equal(LatentStore(f"file://{whole_store}")[:][0], sample.latents)


@pytest.mark.slow
def test_a_store_in_s3_is_read_through_throttling_and_refused_credentials_are_told(s3, whole_store, sample, tmp_path):
    s3.files().put(str(whole_store), f"{s3.bucket}/stores/one", recursive=True)
    s3.throttled = 3
    store = LatentStore(f"{s3.url}/stores/one", cache=tmp_path)
    s3.throttled = 2
    assert torch.equal(store[:][0], sample.latents)
    s3.expired = True
    with pytest.raises(UserError, match=r"manifest\.json cannot be read: access is refused .* check the credentials"):
        LatentStore(f"{s3.url}/stores/one", cache=tmp_path)


def test_the_cache_is_where_the_argument_the_variable_or_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DIT_LATENTS_CACHE", str(tmp_path / "variable"))
    assert remote.cache_folder(tmp_path / "given") == tmp_path / "given"
    assert remote.cache_folder(None) == tmp_path / "variable"
    monkeypatch.delenv("DIT_LATENTS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert remote.cache_folder(None) == tmp_path / "user" / "dit-pipeline" / "latents"
