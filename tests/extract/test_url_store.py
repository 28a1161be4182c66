"""dit-extract --out s3://…: the bytes of a local store, whatever is killed, throttled or hidden; no locks, little disk."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from extract import url_store
from pipeline.latents import LatentStore
from pipeline.runtime import remote_files
from pipeline.runtime.errors import UserError
from pipeline.runtime.launchers import part_of_job
from pipeline.runtime.processes import Launch

pytestmark = pytest.mark.usefixtures("quick_urls")


@pytest.fixture
def download(s3, tmp_path, hashes):
    """The hashes of what lies at `s3.url`/store."""

    def get():
        shutil.rmtree(tmp_path / "downloaded", ignore_errors=True)
        s3.files().get(f"{s3.bucket}/store/", str(tmp_path / "downloaded"), recursive=True)
        return hashes(tmp_path / "downloaded")

    return get


def test_a_store_in_a_bucket_has_the_bytes_of_a_local_one_and_leaves_no_disk_behind(
    s3, command, reference, download, tmp_path
):
    order = []
    s3.before_answer = lambda method, path: order.append(path.rsplit("/", 1)[1]) if method == "PUT" else None
    status, said = command("--out", f"{s3.url}/store")
    assert status == 0 and f"{s3.url}/store is finished: 50 samples, 7 shards" in said
    s3.before_answer = None
    assert download() == reference
    assert order[0] == "settings.json" and order[-2:] == ["skipped.jsonl", "manifest.json"]
    assert all(order.index(f"train-{n:05d}.json") > order.index(f"train-{n:05d}.safetensors") for n in range(7))
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == []
    store = LatentStore(f"{s3.url}/store")
    assert len(store) == 50
    status, said = command("--out", f"{s3.url}/store")
    assert status == 0 and "is already finished" in said


def test_a_store_of_tars_in_a_bucket_has_the_card_of_a_local_one(s3, command, download, hashes, tmp_path):
    tars = ("--format", "webdataset")
    assert command("--out", str(tmp_path / "local"), *tars)[0] == 0
    assert command("--out", f"{s3.url}/store", *tars)[0] == 0
    assert "README.md" in download() and download() == hashes(tmp_path / "local")


def test_holes_are_found_by_listing_and_filled_and_a_finished_store_that_lost_a_shard_is_mended(
    s3, command, reference, download
):
    assert command("--out", f"{s3.url}/store", "--shard-range", "2:4")[0] == 0
    assert [name for name in s3.names("store") if name.endswith(".json")] == [
        ".work/settings.json",
        "train-00002.json",
        "train-00003.json",
    ]
    s3.files().rm_file(f"{s3.bucket}/store/train-00002.json")  # as of a process that was killed before its record
    status, said = command("--out", f"{s3.url}/store")
    assert status == 0 and download() == reference
    s3.hidden.add("train-00005")
    status, said = command("--out", f"{s3.url}/store")
    assert status == 0 and "is already finished" in said, "what is only not listed is not lost"
    s3.hidden.clear()
    s3.files().rm_file(f"{s3.bucket}/store/train-00005.safetensors")
    status, said = command("--out", f"{s3.url}/store")
    assert status == 0 and "1 shards of the finished store" in said and download() == reference


def test_shards_are_divided_by_rank_and_array_and_the_last_one_finishes(s3, command, reference, download, monkeypatch):
    put = []
    s3.before_answer = lambda method, path: put.append(path) if method == "PUT" and path.endswith("tensors") else None
    monkeypatch.setattr(url_store, "part_of_job", lambda place: (0, 3))
    status, said = command("--out", f"{s3.url}/store")
    assert status == 0 and "4 of 7 shards are not there yet" in said
    for part in (1, 2):
        monkeypatch.setattr(url_store, "part_of_job", lambda place, part=part: (part, 3))
        assert command("--out", f"{s3.url}/store")[0] == 0
    assert len(put) == len(set(put)) == 7 and download() == reference


def test_two_writers_of_one_shard_do_no_harm_and_other_bytes_are_noticed(s3, command, reference, download, monkeypatch):
    assert command("--out", f"{s3.url}/store")[0] == 0
    for name in ("manifest.json", "train-00001.json"):
        s3.files().rm_file(f"{s3.bucket}/store/{name}")
    s3.hidden.add("train-0000")  # this process sees none of what the other ones have put
    assert command("--out", f"{s3.url}/store")[0] == 0
    s3.hidden.clear()
    assert download() == reference
    record = json.loads(s3.read("store/train-00003.json"))
    from pipeline.latents.manifest import sealed

    other = {key: value for key, value in record.items() if key != "checksum"} | {"sha256": "0" * 64}
    s3.files().pipe_file(f"{s3.bucket}/store/train-00003.json", sealed(other))
    s3.files().rm_file(f"{s3.bucket}/store/manifest.json")
    s3.hidden.add("train-00003.json")
    status, said = command("--out", f"{s3.url}/store")
    assert status == 2 and "with other bytes than were made here" in said


def test_throttling_and_a_broken_upload_change_nothing_and_what_does_not_pass_is_said(
    s3, command, reference, download, monkeypatch
):
    s3.throttled = 3
    s3.breaks["train-00002.safetensors"] = 7
    assert command("--out", f"{s3.url}/store")[0] == 0
    assert download() == reference and s3.breaks["train-00002.safetensors"] == 0
    monkeypatch.setattr(remote_files, "_ATTEMPTS", 1)
    s3.breaks["train-00004.safetensors"] = 10**6
    status, said = command("--out", f"{s3.url}/other")
    assert status == 2 and "train-00004.safetensors cannot be written" in said
    assert {"train-00004.json", "manifest.json"}.isdisjoint(s3.names("other"))
    s3.expired = True
    status, said = command("--out", f"{s3.url}/other")
    assert status == 2 and "access is refused" in said and "Traceback" not in said


def test_what_is_there_is_not_mixed_with_other_settings_or_other_things(s3, command):
    assert command("--out", f"{s3.url}/store", "--shard-range", "0:1")[0] == 0
    status, said = command("--out", f"{s3.url}/store", "--seed", "1")
    assert status == 2 and "was begun with other settings (--seed 0 there, 1 now)" in said
    s3.files().pipe_file(f"{s3.bucket}/else/notes.txt", b"mine")
    status, said = command("--out", f"{s3.url}/else")
    assert status == 2 and "holds other things (notes.txt)" in said and s3.names("else") == ["notes.txt"]
    status, said = command("--out", "s3://no-such-bucket/store")
    assert status == 2 and "there is no such bucket" in said
    status, said = command("--out", "http://127.0.0.1:9/store")
    assert status == 2 and "http://127.0.0.1:9/store cannot be written: HTTP has no way to" in said
    assert "inputs" not in said, "it is said before anything is listed"
    status, said = command("--out", f"{s3.url}/store", "--overwrite")
    assert status == 2 and "--overwrite removes nothing behind a URL" in said


@pytest.mark.slow
def test_a_killed_worker_loses_its_shard_and_the_same_command_gives_the_same_bytes(
    s3, start, reference, download, tmp_path
):
    slowly = "import time, extract.url_store as u\nput = u.UrlOutput.publish\n"
    slowly += "u.UrlOutput.publish = lambda *a: (time.sleep(0.2), put(*a))[1]"
    environment = f"import os\nos.environ.update({s3.environment() | {'DIT_LATENTS_CACHE': str(tmp_path / 'w')}!r})\n"
    for kill in range(3):
        process = start("--out", f"{s3.url}/store", before=environment + slowly)
        while process.is_alive() and len([n for n in s3.names("store") if n.endswith("tensors")]) <= kill:
            process.join(0.05)
        process.kill()
        process.join()
        assert "manifest.json" not in s3.names("store")
    last = start("--out", f"{s3.url}/store", before=environment)
    last.join(120)
    assert last.exitcode == 0, last.log()
    assert download() == reference
    assert [path for path in (tmp_path / "w").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_processes_of_torchrun_make_a_store_in_a_bucket_together(s3, reference, download, images, vae_folder):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module"]
    words += ["extract", "--data", str(images), "--vae", str(vae_folder), "--image-size", "32"]
    words += ["--samples-per-shard", "8", "--out", f"{s3.url}/store"]
    put = []
    s3.before_answer = lambda method, path: put.append(path) if method == "PUT" and path.endswith("tensors") else None
    again = subprocess.run(words, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, check=False, capture_output=True)
    assert again.returncode == 0, again.stderr.decode()
    assert len(put) == len(set(put)) == 7 and download() == reference


def test_a_store_on_another_disk_by_its_url_is_written_whole_under_each_name(command, reference, hashes, tmp_path):
    assert command("--out", f"local://{tmp_path}/disk/store")[0] == 0
    assert hashes(tmp_path / "disk" / "store") == reference


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, (1, 2)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "6",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            (5, 8),
        ),
        ({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "3"}, (5, 6)),
    ],
)
def test_which_part_is_whose(environment, part):
    assert part_of_job(Launch(rank=1, world_size=2), environment) == part


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "7",
                "SLURM_ARRAY_TASK_COUNT": "2",
            },
            "no gaps",
        ),
        ({"JOB_COMPLETION_INDEX": "2"}, "set JOB_COMPLETIONS"),
        ({"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "3"}, "task 3 of 3"),
    ],
)
def test_variables_that_tell_too_little_are_refused(environment, words):
    with pytest.raises(UserError, match=words):
        part_of_job(Launch(), environment)
