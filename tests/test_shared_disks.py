"""Disks that several machines share, as real processes meet them: without locks, with stale handles, a slow flush, another clock."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.crash_points.shim import compiler
from tests.train.runs import ROOT, assert_same_run, checkpoints, command, environment, make_store, train

pytestmark = pytest.mark.skipif(
    compiler() is None or not sys.platform.startswith("linux"), reason="the library that is preloaded must be compiled"
)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Runs a command's words in a process to which files of a path lie on such a disk."""
    library = tmp_path_factory.mktemp("library") / "shared_disk.so"
    source = Path(__file__).with_name("shared_disk.c")
    subprocess.run([compiler(), "-O1", "-w", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def run(words, path="", **disk):
        told = {f"DISK_{name.upper()}": str(value) for name, value in disk.items()}
        everything = environment(LD_PRELOAD=str(library), DISK_PATH=str(path), HF_HUB_OFFLINE="1", **told)
        return subprocess.run(
            [sys.executable, *words], env=everything, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "latents")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_shared_work_is_refused_in_a_sentence_and_a_lone_command_says_it_once_and_goes_on(
    store, on_disk, tmp_path, number
):
    pictures = tmp_path / "pictures/a"
    pictures.mkdir(parents=True)
    (pictures / "0.ppm").write_bytes(b"P6 32 32 255\n" + os.urandom(3 * 32 * 32))
    words = ["-m", "extract", "--data", pictures.parent, "--out", tmp_path / "s", "--vae", "demo", "--image-size", "32"]
    refused = on_disk(words, tmp_path, flock=number)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "cannot lock files, which keeps processes from making the same twice" in refused.stderr
    lone = on_disk(command(store, tmp_path / "run", steps=3), tmp_path, flock=number)
    assert lone.returncode == 0, lone.stderr
    assert lone.stderr.count("cannot lock files: see to it that no second command works there") == 1
    assert train(store, tmp_path / "straight", steps=3) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run", 3)


@pytest.mark.slow
def test_a_stale_handle_ends_training_in_a_sentence_and_the_same_command_goes_on(store, on_disk, tmp_path):
    words = command(store, tmp_path / "run", "--save-every", "2", steps=3)
    lost = on_disk(words, store, read=errno.ESTALE)
    assert lost.returncode == 2 and "Traceback" not in lost.stderr
    assert "train-00000.safetensors cannot be read (Stale file handle); check the disk" in lost.stderr
    assert on_disk(words, store).returncode == 0


@pytest.mark.slow
def test_a_flush_of_a_second_a_file_delays_the_checkpoint_and_changes_nothing(store, on_disk, tmp_path):
    slow = on_disk(command(store, tmp_path / "run", steps=2), tmp_path / "run/checkpoints", fsync=1)
    assert slow.returncode == 0, slow.stderr
    assert checkpoints(tmp_path / "run") == ["step-0000002"]
    assert train(store, tmp_path / "straight", steps=2) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run", 2)


WAITING = """
    import sys, time
    from pathlib import Path
    from extract import store_folder
    from extract.store_folder import OutputFolder

    store_folder._WAIT_FOR_MAIN_S = 3
    folder, is_old = OutputFolder(path=Path(sys.argv[1]), split="train"), sys.argv[2] == "old"
    folder.work.mkdir(parents=True)
    if is_old:
        folder._settings.write_text("{}")
        time.sleep(0.2)
    began = time.time()
    time.sleep(0.2)
    if not is_old:
        folder._settings.write_text("{}")
    start = time.monotonic()
    folder.wait_for_main(began)
    print(time.monotonic() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("clock", [-300, 0, 300])
def test_an_old_store_is_told_from_the_one_begun_anew_whatever_the_machines_clock_says(on_disk, tmp_path, clock):
    """Files have the disk's times. One who takes the old store for the new would be refused for its settings."""
    for age, waits in (("old", True), ("new", False)):
        done = on_disk(["-c", textwrap.dedent(WAITING), tmp_path / age, age], clock=clock)
        assert done.returncode == 0, done.stderr
        assert (float(done.stdout) >= 3) == waits, (age, done.stdout)
