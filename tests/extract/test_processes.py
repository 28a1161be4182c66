"""Real processes, real signals: any number of them, killed at any moment, end in the same bytes."""

import os
import random
import shutil
import signal
import time

import pytest


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def finish_all(processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_and_three_processes_give_the_bytes_of_one(tmp_path, start, reference, hashes, count):
    processes = [start("--out", tmp_path / "store") for _ in range(count)]
    assert finish_all(processes) == [0] * count, [process.log() for process in processes]
    assert hashes(tmp_path / "store") == reference


def kill_rounds(tmp_path, start, reference, hashes, rounds):
    """Kill one or two processes twice at random moments, continue with as many, compare the bytes.

    A fast machine finishes the store before a kill: then that round begins anew, with a shorter wait.
    """
    draw = random.Random(2024)
    longest_wait = 0.4
    for number in range(rounds):
        out = tmp_path / f"store-{number}"
        count = 1 + number % 2
        kills = 0
        while kills < 2:
            processes = [start("--out", out) for _ in range(count)]
            if not kills:
                wait_for(
                    lambda out=out: any((out / name).exists() for name in (".work/settings.json", "manifest.json"))
                )
            time.sleep(draw.uniform(0, longest_wait))
            for process in processes:
                process.kill()
            finish_all(processes)
            kills += 1
            if (out / "manifest.json").exists():
                longest_wait, kills = longest_wait / 2, 0
                shutil.rmtree(out)
        last = [start("--out", out) for _ in range(count)]
        assert finish_all(last) == [0] * count, [process.log() for process in last]
        assert hashes(out) == reference
        shutil.rmtree(out)


def test_killed_at_random_moments_and_continued_the_bytes_are_the_same(tmp_path, start, reference, hashes):
    kill_rounds(tmp_path, start, reference, hashes, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_rounds_of_kills(tmp_path, start, reference, hashes):
    kill_rounds(tmp_path, start, reference, hashes, 20)


SLOWLY = """
import time, extract.fill as shards
write = shards.write_shard
shards.write_shard = lambda *a, **k: (time.sleep(0.3), write(*a, **k))[1]
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_says_how_to_continue_and_the_rest_is_made_later(tmp_path, start, reference, hashes, number):
    out = tmp_path / "store"
    process = start("--out", out, before=SLOWLY)
    wait_for((out / "train-00000.json").exists)
    os.kill(process.pid, number)
    assert finish_all([process]) == [128 + number], process.log()
    assert "run the same command again to continue" in process.log()
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.partial"))
    again = start("--out", out)
    assert finish_all([again]) == [0]
    assert hashes(out) == reference


def test_a_shard_claimed_by_a_killed_process_is_free_again(tmp_path, start, reference, hashes):
    out = tmp_path / "store"
    process = start("--out", out, before=SLOWLY)
    wait_for((out / ".work/locks/00001.lock").exists)
    process.kill()
    finish_all([process])
    assert finish_all([start("--out", out)]) == [0]
    assert hashes(out) == reference


HELD = """
import time, pathlib, extract.fill as shards
write = shards.write_shard
def held(*a, **k):
    while not pathlib.Path({go!r}).exists():
        time.sleep(0.01)
    return write(*a, **k)
shards.write_shard = held
"""


def test_overwrite_waits_for_nobody_and_refuses_while_another_works(tmp_path, start, reference, hashes):
    out, go = tmp_path / "store", tmp_path / "go"
    process = start("--out", out, before=HELD.format(go=str(go)))
    wait_for((out / ".work/locks/00000.lock").exists)
    second = start("--out", out, "--overwrite")
    assert finish_all([second]) == [2]
    assert "another process is writing" in second.log()
    go.touch()
    assert finish_all([process]) == [0]
    assert hashes(out) == reference


RANKS = "import os; os.environ.update(RANK='{}', LOCAL_RANK='{}', WORLD_SIZE='2')"


@pytest.mark.parametrize(
    "old",
    ["finished", *(pytest.param(old, marks=pytest.mark.slow) for old in ("unfinished", "without a manifest", "none"))],
)
def test_processes_started_together_overwrite_once_and_share_the_new_work(tmp_path, start, reference, hashes, old):
    for round_ in range(3):
        out = tmp_path / f"store-{round_}"
        if old != "none":
            part = ["--shard-range", "0:3"] if old == "unfinished" else []
            assert finish_all([start("--out", out, "--seed", 1, *part)]) == [0]
        if old == "without a manifest":
            (out / "manifest.json").unlink()
        time.sleep(0.02)  # file times come in ticks of the kernel's clock
        both = [start("--out", out, "--overwrite", before=RANKS.format(rank, rank)) for rank in (1, 0)]
        assert finish_all(both) == [0, 0], [process.log() for process in both]
        assert hashes(out) == reference


KILLED_WHILE_REMOVING = """
import os, signal, pathlib
unlink, count = pathlib.Path.unlink, []
def dying(path, **k):
    if path.suffix in (".safetensors", ".json", ".jsonl"):
        count.append(path)
        if len(count) > {}:
            os.kill(os.getpid(), signal.SIGKILL)
    unlink(path, **k)
pathlib.Path.unlink = dying
"""


@pytest.mark.parametrize("after", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 6, 10, 14, 15))])
def test_a_kill_during_overwrite_leaves_what_the_same_command_goes_on_with(tmp_path, start, reference, hashes, after):
    """Seven shards, seven records, the list of what was skipped and the manifest go one after the other."""
    out = tmp_path / "store"
    assert finish_all([start("--out", out, "--seed", 1)]) == [0]
    killed = start("--out", out, "--overwrite", before=KILLED_WHILE_REMOVING.format(after))
    assert finish_all([killed]) == [-signal.SIGKILL]
    again = start("--out", out, "--overwrite")
    assert finish_all([again]) == [0], again.log()
    assert hashes(out) == reference


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_before_the_first_image_has_its_status_and_a_line_too(tmp_path, start, number):
    stop_at_listing = f"""
import os, signal, extract.inputs as extraction
extraction.cached_listing = lambda *a: os.kill(os.getpid(), {int(number)})
"""
    process = start("--out", tmp_path / "store", before=stop_at_listing)
    assert finish_all([process]) == [128 + number]
    assert process.log() == f"dit-extract: stopped by {number.name}; run the same command again to continue\n"
    assert not (tmp_path / "store").exists()


# Root may do everything by its capabilities; without them the rights of files count, for root as for anybody. What is
# imported is so before, by a first run, wherever it lies.
BOUND_BY_RIGHTS = """
import ctypes
from extract.__main__ import main
assert main({first!r}) == 0
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0
"""


def test_without_permission_an_input_is_left_out_and_an_output_is_one_sentence(
    tmp_path, start, tree, make_picture, images, vae_folder
):
    data = tree(tmp_path / "data", {f"a/{n}.jpg": make_picture(n) for n in range(4)})
    (data / "a/2.jpg").chmod(0)
    (tmp_path / "store").mkdir()

    def begin(number):
        first = ["--data", images, "--vae", vae_folder, "--image-size", 32, "--limit", 1, "--out", tmp_path / number]
        before = BOUND_BY_RIGHTS.format(first=[str(word) for word in first])
        return start("--out", tmp_path / "store", "--allow-skips", "0.3", data=data, before=before)

    (tmp_path / "store").chmod(0o555)
    refused = begin("one")
    assert finish_all([refused]) == [2], refused.log()
    assert "no permission to write" in refused.log() and "Traceback" not in refused.log()
    (tmp_path / "store").chmod(0o755)
    process = begin("two")
    assert finish_all([process]) == [0], process.log()
    assert (
        '"a/2.jpg", "reason": "cannot be opened: Permission denied"' in (tmp_path / "store/skipped.jsonl").read_text()
    )


LITTLE_DISK = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"


def test_a_file_that_may_not_grow_ends_in_one_sentence(tmp_path, start, reference, hashes):
    out = tmp_path / "store"
    process = start("--out", out, before=LITTLE_DISK)
    assert finish_all([process]) == [2]
    assert "cannot write" in process.log() and "Traceback" not in process.log()
    assert not list(out.glob("*.safetensors"))
    assert finish_all([start("--out", out)]) == [0]
    assert hashes(out) == reference


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_processes_that_share_the_work(
    tmp_path, start, launch, reference, hashes, images, vae_folder, launcher
):
    out = tmp_path / "store"
    arguments = ["--data", images, "--vae", vae_folder, "--image-size", 32, "--samples-per-shard", 8, "--out", out]
    head = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node", 2, "--master-port", 0, "--module", "extract"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "-m", "extract"],
    }[launcher]
    if launcher == "accelerate":  # the old store goes once, and both processes work on the new one
        assert finish_all([start("--out", out, "--seed", 1)]) == [0]
        arguments.append("--overwrite")
    process = launch(head[0], *head[1:], *arguments)
    process.join(550)
    assert process.exitcode == 0, process.log()
    assert hashes(out) == reference
