"""The weight file: found, fetched once, its hash compared, and nothing but the FID network's tensors accepted."""

import hashlib
import http.server
import threading

import pytest
import torch
from safetensors.torch import save_file

from pipeline.runtime.errors import UserError
from pipeline.runtime.work_queue import exclusive
from sample.evaluate import inception_weights
from sample.evaluate.inception_weights import FILE_NAME, URL, find_inception, load_inception


@pytest.fixture
def server(tmp_path):
    """An HTTP server over a folder: (folder, its address, the paths asked for)."""
    folder = tmp_path / "served"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *_):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def named_by_hash(data):
    return f"weights-{hashlib.sha256(data).hexdigest()[:8]}.pth"


def test_a_missing_file_says_where_to_get_it(tmp_path):
    for named in (None, str(tmp_path / "nothing.pth")):
        with pytest.raises(UserError) as caught:
            find_inception(named)
        assert URL in str(caught.value)
        assert "--inception" in str(caught.value)


def test_the_file_in_the_cache_is_found_and_its_hash_compared(cache):
    cache.mkdir(parents=True)
    (cache / FILE_NAME).write_bytes(b"not those weights")
    with pytest.raises(UserError, match=r"but its name promises 6726825d…: it is damaged or another file"):
        find_inception(None)


def test_a_file_of_another_name_is_taken_and_its_hash_told(tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"x")
    found = find_inception(str(tmp_path / "mine.pth"))
    assert found.describe() == {"file": "mine.pth", "sha256": hashlib.sha256(b"x").hexdigest()}


def test_an_address_is_fetched_once_into_the_cache(server, cache):
    folder, address, asked = server
    data = b"weights" * 1000
    name = named_by_hash(data)
    (folder / name).write_bytes(data)
    for _ in range(2):
        found = find_inception(f"{address}/{name}")
        assert found.path == cache / name
        assert found.path.read_bytes() == data
    assert len(asked) == 1


def test_one_command_at_a_time_downloads(server, cache, monkeypatch):
    folder, address, _ = server
    name = named_by_hash(b"weights")
    (folder / name).write_bytes(b"weights")
    fetch = inception_weights._fetch

    def watched(url, path):
        with pytest.raises(UserError, match="taken"), exclusive(path.with_name(f".{name}.lock"), refusal="taken"):
            pass
        fetch(url, path)

    monkeypatch.setattr(inception_weights, "_fetch", watched)
    assert find_inception(f"{address}/{name}").path.read_bytes() == b"weights"


def test_what_a_killed_download_left_goes_with_the_next(server, cache):
    folder, address, _ = server
    name = named_by_hash(b"weights")
    (folder / name).write_bytes(b"weights")
    cache.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # killed before the file has its name, and after
        for left in (f".{name}.4711.partial", f".{name}.4711.partial.0a0a.partial", f".{name}.lock"):
            (cache / left).write_bytes(b"half")
        assert find_inception(f"{address}/{name}").path == cache / name
        assert [path.name for path in cache.iterdir()] == [name]


def test_a_download_with_another_hash_leaves_nothing_behind(server, cache):
    folder, address, _ = server
    (folder / "weights-00000000.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="its name promises 00000000"):
        find_inception(f"{address}/weights-00000000.pth")
    assert list(cache.iterdir()) == []


def test_an_address_that_fails_or_carries_no_hash_is_refused_in_a_sentence(server):
    _, address, _ = server
    with pytest.raises(UserError, match=r"cannot be downloaded \(.*404.*\); get pt_inception"):
        find_inception(f"{address}/weights-00000000.pth")
    for url in (f"{address}/weights.pth", "ftp://host/weights-00000000.pth", "file:///weights-00000000.pth"):
        with pytest.raises(UserError, match="is no http"):
            find_inception(url)


def test_safetensors_and_pickled_weights_give_the_same_network(weights_file, rule_weights, tmp_path):
    torch.save({n: t for n, t in rule_weights.items() if not n.endswith("num_batches_tracked")}, tmp_path / "w.pth")
    for path in (weights_file, tmp_path / "w.pth"):
        network = load_inception(find_inception(str(path)))
        assert not network.training
        assert torch.equal(network.fc.bias, rule_weights["fc.bias"])
        assert torch.equal(network.Mixed_7c.branch1x1.bn.running_var, rule_weights["Mixed_7c.branch1x1.bn.running_var"])


def test_weights_of_another_network_are_refused_with_every_tensor_named(rule_weights, tmp_path):
    wrong = dict(rule_weights)
    del wrong["Conv2d_1a_3x3.conv.weight"], wrong["Mixed_6e.branch1x1.bn.bias"]
    wrong["AuxLogits.fc.weight"] = torch.zeros(2)
    wrong["fc.bias"] = torch.zeros(1000)
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as caught:
        load_inception(find_inception(str(tmp_path / "w.safetensors")))
    message = str(caught.value)
    assert "2 missing (Conv2d_1a_3x3.conv.weight, Mixed_6e.branch1x1.bn.bias)" in message
    assert "1 unknown (AuxLogits.fc.weight)" in message
    assert "fc.bias [1000] instead of [1008]" in message


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"fc.bias": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="opening it would run code"):
        load_inception(find_inception(str(tmp_path / "w.pth")))
