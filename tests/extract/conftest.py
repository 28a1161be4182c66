"""Small real images, a VAE that costs nothing, and the command: run in this process, or started as real processes."""

import functools
import hashlib
import http.server
import io
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = str(Path(__file__).parent.parent.parent)


def picture(number, size=(40, 32), kind="JPEG", mode="RGB"):
    """An encoded image whose pixels depend on its number."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    channels = [(x * (3 + number) + y * k * 5 + number * 31) % 256 for k in range(3)]
    image = Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def make_picture():
    return picture


def write_tree(root, files):
    for name, data in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Path(root)


@pytest.fixture(scope="session")
def tree():
    """Writes {relative path: bytes} under a folder."""
    return write_tree


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A random AutoencoderKL with down-factor 8, readable for every user."""
    from tests.encoders import write_vae

    return write_vae(tmp_path_factory.mktemp("vaes") / "small", block_out_channels=(4, 4, 4, 8))


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """50 images in three classes."""
    files = {f"{'abc'[n % 3]}/{n:02d}.jpg": picture(n) for n in range(50)}
    return write_tree(tmp_path_factory.mktemp("images"), files)


@pytest.fixture
def command(capsys, vae_folder, images):
    """Runs dit-extract in this process on 32 pixels and shards of 8; gives (exit status, stderr)."""
    from extract.__main__ import main

    def run(*arguments, data=images, vae=vae_folder):
        base = ["--data", data, "--vae", vae, "--image-size", 32, "--samples-per-shard", 8]
        status = main([str(argument) for argument in (*base, *arguments)])
        return status, capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """Runs code in a process of its own, forked from a server that has torch loaded; gives the process."""
    from tests.forked import server

    context = server()
    logs = tmp_path_factory.mktemp("logs")
    started = []

    def run(code):
        log = logs / f"{len(started)}.log"
        code = (
            f"import os, sys; sys.path.insert(0, {ROOT!r}); sys.stderr = open({str(log)!r}, 'w', buffering=1)\n{code}"
        )
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        process.log = log.read_text
        started.append(process)
        return process

    yield run
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture(scope="session")
def start(fork, vae_folder, images):
    """Starts dit-extract as a process of its own; gives the process."""

    def run(*arguments, before="", data=images, vae=vae_folder, base=None):
        if base is None:
            base = ["--vae", vae, "--image-size", 32, "--samples-per-shard", 8]
        base = ["--data", data, *base]
        argv = [str(argument) for argument in (*base, *arguments)]
        return fork(f"{before}\nfrom extract.__main__ import main\nos._exit(main({argv!r}))")

    return run


@pytest.fixture(scope="session")
def launch(fork):
    """Starts a launcher, a module of Python's, which starts the command as processes of its own."""

    def run(module, *arguments):
        argv = [module, *map(str, arguments)]
        return fork(
            f"os.dup2(sys.stderr.fileno(), 2)\nos.chdir({ROOT!r})\nsys.argv = {argv!r}\n"
            "os.environ.update(ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='', PYTHONPATH=os.getcwd())\n"
            f"import runpy\nrunpy.run_module({module!r}, run_name='__main__')"
        )

    return run


@pytest.fixture
def serve():
    """Serves a folder over HTTP; gives the URL."""
    servers = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def begin(folder):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def hashes():
    """{relative path: SHA-256} of everything in a folder."""

    def of(folder):
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return of


@pytest.fixture(scope="session")
def reference(tmp_path_factory, vae_folder, images, hashes):
    """The hashes of a store that one process made undisturbed."""
    from extract.__main__ import main

    out = tmp_path_factory.mktemp("reference") / "store"
    arguments = ["--data", images, "--vae", vae_folder, "--image-size", 32, "--samples-per-shard", 8, "--out", out]
    assert main([str(argument) for argument in arguments]) == 0
    return hashes(out)


def pytest_configure(config):
    assert sys.platform != "win32", "locks, forks and signals of this suite are those of Unix"
