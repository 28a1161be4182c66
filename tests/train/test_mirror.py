"""dit-train --mirror: a copy of the run behind a URL, whole or not at all, from which another machine goes on."""

import json
import re
import shutil
import time

import pytest
import torch

from pipeline.checkpoint import load_checkpoint
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.remote import localized, whole_steps
from pipeline.inspect.checkpoint import describe_checkpoint
from pipeline.runtime import remote_files
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of
from sample.evaluate.inputs import kind_of
from tests.train.runs import assert_same_run, checkpoints, history, train

pytestmark = pytest.mark.usefixtures("quick_urls")
FILES = ["model.safetensors", "config.json", "state/files.json"]
KEEP = ["--save-every", "4", "--keep-last", "2"]


@pytest.fixture
def mirrored(s3, store, tmp_path):
    """A run of twelve steps with a copy at `s3.url`/run."""
    assert train(store, tmp_path / "run", *KEEP, "--mirror", f"{s3.url}/run") == 0
    return tmp_path / "run"


def test_the_copy_is_the_run_kept_by_the_same_rules(s3, mirrored):
    names = s3.names("run")
    here = sorted(
        path.relative_to(mirrored).as_posix()
        for path in mirrored.rglob("*")
        if path.is_file() and path.name != ".lock" and "tensorboard" not in path.parts
    )
    assert names == here and checkpoints(mirrored) == ["step-0000008", "step-0000012"]
    assert all(s3.read(f"run/{name}") == (mirrored / name).read_bytes() for name in names)


def test_a_checkpoint_that_was_going_up_when_it_would_have_been_removed_goes_at_the_end(s3, store, tmp_path):
    newest = tmp_path / "run" / "checkpoints" / "step-0000012" / "config.json"

    def wait(method, path):
        end = time.monotonic() + 20
        while method == "PUT" and "step-0000004/" in path and not newest.exists() and time.monotonic() < end:
            time.sleep(0.01)

    s3.before_answer = wait
    assert train(store, tmp_path / "run", *KEEP, "--mirror", f"{s3.url}/run") == 0
    assert checkpoints(tmp_path / "run") == ["step-0000008", "step-0000012"]
    assert whole_steps(s3.names("run")) == [8, 12]


def test_of_a_checkpoint_what_makes_it_count_goes_up_last_and_down_first(s3, store, tmp_path):
    asked = []
    s3.before_answer = lambda method, path: asked.append((method, path)) if "step-0000004/" in path else None
    flags = [*KEEP, "--mirror", f"{s3.url}/run"]
    assert train(store, tmp_path / "run", *flags, steps=4) == 0
    put = [path.split("step-0000004/")[1] for method, path in asked if method == "PUT"]
    assert put[-2:] == ["config.json", "state/files.json"]
    assert put[:2] == ["ema.safetensors", "model.safetensors"]
    assert train(store, tmp_path / "run", *flags) == 0
    gone = [path.split("step-0000004/")[1] for method, path in asked if method == "DELETE"]
    assert gone[0] == "state/files.json" and set(gone) == set(put)


def test_an_empty_machine_goes_on_from_the_copy_to_the_same_bits(s3, store, mirrored, tmp_path):
    flags = [*KEEP, "--mirror", f"{s3.url}/run"]
    assert train(store, tmp_path / "fresh", *flags, steps=20) == 0
    assert train(store, tmp_path / "straight", *KEEP, steps=20) == 0
    assert_same_run(tmp_path / "fresh", tmp_path / "straight", 20)
    assert history(tmp_path / "fresh")[0]["step"] == 1, "the log came along"
    assert whole_steps(s3.names("run")) == [16, 20]
    # The machine of before comes back, and goes on from where the other one was.
    assert train(store, mirrored, *flags, steps=24) == 0
    assert train(store, tmp_path / "straight", *KEEP, steps=24) == 0
    assert_same_run(mirrored, tmp_path / "straight", 24)


@pytest.mark.slow
def test_a_listing_that_lags_costs_steps_and_nothing_else(s3, store, mirrored, tmp_path):
    s3.hidden.add("step-0000012")
    assert train(store, tmp_path / "fresh", *KEEP, "--mirror", f"{s3.url}/run", steps=16) == 0
    s3.hidden.clear()
    assert train(store, tmp_path / "straight", *KEEP, steps=16) == 0
    assert_same_run(tmp_path / "fresh", tmp_path / "straight", 16)
    assert whole_steps(s3.names("run")) == [12, 16]
    assert train(store, tmp_path / "third", *KEEP, "--mirror", f"{s3.url}/run", steps=16) == 0
    assert_same_run(tmp_path / "third", tmp_path / "straight", 16)


@pytest.mark.slow
def test_a_name_that_is_listed_and_gone_or_damaged_is_passed_over(s3, store, mirrored, tmp_path, capsys):
    damaged = bytearray(s3.read("run/checkpoints/step-0000012/model.safetensors"))
    damaged[-1] ^= 1
    s3.files().pipe_file(f"{s3.bucket}/run/checkpoints/step-0000012/model.safetensors", bytes(damaged))
    assert train(store, tmp_path / "fresh", *KEEP, "--mirror", f"{s3.url}/run") == 0
    said = capsys.readouterr().err
    assert "model.safetensors has not the SHA-256" in said and "going on from" in said and "step-0000008" in said
    assert_same_run(tmp_path / "fresh", mirrored, 12)
    assert s3.read("run/checkpoints/step-0000012/model.safetensors")[-1] != damaged[-1], "mended on the way"
    for step in (8, 12):
        s3.files().pipe_file(f"{s3.bucket}/run/checkpoints/step-{step:07d}/ema.safetensors", b"?")
    assert train(store, tmp_path / "other", *KEEP, "--mirror", f"{s3.url}/run") == 2
    assert "holds no checkpoint that is whole" in capsys.readouterr().err


def test_throttling_and_broken_uploads_are_waited_out(s3, store, tmp_path):
    s3.breaks["step-0000008/model.safetensors"] = 7
    s3.throttled = 3
    assert train(store, tmp_path / "run", *KEEP, "--mirror", f"{s3.url}/run") == 0
    assert s3.breaks["step-0000008/model.safetensors"] == 0 and whole_steps(s3.names("run")) == [8, 12]


@pytest.mark.slow
def test_an_upload_that_never_works_leaves_a_whole_run_here_a_warning_and_a_failure(
    s3, store, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(remote_files, "_ATTEMPTS", 1)
    s3.breaks["step-0000012/ema.safetensors"] = 10**6
    assert train(store, tmp_path / "run", *KEEP, "--mirror", f"{s3.url}/run") == 2
    said = capsys.readouterr().err
    assert "its copy at --mirror is behind" in said and "ema.safetensors cannot be written" in said
    assert checkpoints(tmp_path / "run") == ["step-0000008", "step-0000012"]
    assert 12 not in whole_steps(s3.names("run")), "what cannot be finished counts for nothing"
    s3.breaks.clear()
    assert train(store, tmp_path / "run", *KEEP, "--mirror", f"{s3.url}/run") == 0, "the same command brings it up"
    assert whole_steps(s3.names("run")) == [8, 12]


@pytest.mark.slow
def test_credentials_that_expire_on_the_way_end_in_a_sentence(s3, store, tmp_path, capsys):
    def expire(method, path):
        s3.expired = s3.expired or (method == "PUT" and "step-0000008" in path)

    s3.before_answer = expire
    assert train(store, tmp_path / "run", *KEEP, "--mirror", f"{s3.url}/run") == 2
    said = capsys.readouterr().err
    assert "access is refused" in said and "check the credentials" in said
    s3.before_answer, s3.expired = None, False
    assert whole_steps(s3.names("run")) in ([4], [])
    assert train(store, tmp_path / "fresh", *KEEP, "--mirror", f"{s3.url}/run") == 0
    assert train(store, tmp_path / "straight", *KEEP) == 0
    assert_same_run(tmp_path / "fresh", tmp_path / "straight", 12)


def test_what_cannot_be_used_is_refused_before_training(s3, store, mirrored, tmp_path, capsys):
    for flags, words in (
        (["--mirror", "s3://no-such-bucket/run"], "there is no such bucket"),
        (["--mirror", "folder"], "folder is no URL"),
        (["--mirror", f"{s3.url}/run", "--lr", "0.5"], "--mirror .* holds a run with other settings: --lr was 0.0001"),
        (["--mirror", f"{s3.url}/run", "--overwrite"], "--overwrite removes nothing there"),
        (["--mirror", "http://127.0.0.1:9/run"], "http://127.0.0.1:9/run cannot be written: HTTP has no way to"),
    ):
        assert train(store, tmp_path / "other", *flags) == 2
        assert re.search(words, capsys.readouterr().err)
        assert not (tmp_path / "other" / "metrics.jsonl").exists()
    assert whole_steps(s3.names("run")) == [8, 12]


def test_parts_of_a_checkpoint_that_never_counted_go_at_the_next_start(s3, store, mirrored):
    s3.files().pipe_file(f"{s3.bucket}/run/checkpoints/step-0000011/model.safetensors", b"half")
    assert train(store, mirrored, *KEEP, "--mirror", f"{s3.url}/run", steps=13) == 0
    assert not [name for name in s3.names("run") if "step-0000011" in name]


@pytest.mark.parametrize("here", [[], [8]])
def test_a_checkpoint_that_is_there_and_not_here_stays_when_a_run_begins(tmp_path, here):
    for folder, steps in (("far", [4, 8]), ("run", here)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        for name in (f"{folder}/checkpoints/step-{step:07d}/{file}" for step in steps for file in FILES):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name.split("/")[-1])
    mirror = Mirror(f"file://{tmp_path}/far", tmp_path / "run", lambda _steps, _read: [])
    mirror.begin()
    mirror.close()
    assert all((tmp_path / f"far/checkpoints/step-{step:07d}/{file}").is_file() for step in (4, 8) for file in FILES)


def test_a_folder_of_someones_own_among_the_checkpoints_there_stays_and_is_in_nobodys_way(s3, store, mirrored):
    s3.files().pipe_file(f"{s3.bucket}/run/checkpoints/step-best/notes.txt", b"mine")
    assert train(store, mirrored, *KEEP, "--mirror", f"{s3.url}/run", steps=16) == 0
    assert s3.read("run/checkpoints/step-best/notes.txt") == b"mine"
    assert whole_steps(s3.names("run")) == [12, 16]


@pytest.mark.slow
def test_snapshots_of_averages_go_up_with_their_records(s3, store, tmp_path):
    flags = [*KEEP, "--ema-sigma", "0.05,0.10", "--mirror", f"{s3.url}/run"]
    assert train(store, tmp_path / "run", *flags) == 0
    here = sorted(path.name for path in (tmp_path / "run" / "averages").iterdir())
    assert s3.names("run/averages") == here and len(here) == 12
    run = localized(f"{s3.url}/run", averages=True).parents[1]
    assert sorted(path.name for path in (run / "averages").iterdir() if not path.name.startswith(".")) == here


def test_a_checkpoint_behind_a_url_is_copied_once_without_what_resuming_needs(s3, mirrored, tmp_path):
    folder = localized(f"{s3.url}/run")
    newest = mirrored / "checkpoints" / "step-0000012"
    for name in ("config.json", "model.safetensors", "ema.safetensors"):
        assert sha256_of(folder / name) == sha256_of(newest / name)
    assert not (folder / "state" / "optimizer.safetensors").exists()
    s3.asked.clear()
    assert localized(f"{s3.url}/run") == folder
    assert not [path for _, path in s3.asked if path.endswith("safetensors")]
    assert localized(f"{s3.url}/run/checkpoints/step-0000008").name == "checkpoint"
    assert (localized(f"{s3.url}/run", whole=True) / "state" / "optimizer.safetensors").exists()
    assert json.loads((folder / "state" / "files.json").read_bytes())["files"]


def test_a_mirror_may_be_another_disk(store, tmp_path):
    flags = [*KEEP, "--mirror", f"file://{tmp_path}/disk/run"]
    assert train(store, tmp_path / "run", *flags) == 0
    assert checkpoints(tmp_path / "disk" / "run") == ["step-0000008", "step-0000012"]
    shutil.rmtree(tmp_path / "run")
    assert train(store, tmp_path / "run", *flags, steps=16) == 0
    assert train(store, tmp_path / "straight", *KEEP, steps=16) == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight", 16)


def test_whatever_reads_a_checkpoint_takes_its_url(s3, store, mirrored):
    run = f"{s3.url}/run"
    network, config = load_checkpoint(run)
    same, same_config = load_checkpoint(mirrored)
    assert config == same_config
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in network.state_dict().items())
    said = "\n".join(describe_checkpoint(f"{run}/checkpoints/step-0000008", verify=True))
    assert "verified: raw and ema" in said or "verified: ema and raw" in said
    assert kind_of(run, "--samples") == "checkpoint"
    s3.files().put(str(store), f"{s3.bucket}/latents", recursive=True)
    assert kind_of(f"{s3.url}/latents", "--samples") == "store"
    with pytest.raises(UserError, match=r"there is no whole checkpoint at s3://.*/nothing"):
        load_checkpoint(f"{s3.url}/nothing")
