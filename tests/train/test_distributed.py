import dataclasses
import re

import pytest
import torch

from pipeline.runtime.errors import UserError
from train.distributed import explain_lost_peer, peak_resident_bytes, refuse_lonely_ranks, start
from train.options import HardwareOptions
from train.parallel import shard_processes


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_believe_they_are_alone_are_refused(name):
    with pytest.raises(
        UserError, match=f"started 2 processes \\({name}=2\\), but this one sees 1: each would train alone"
    ):
        refuse_lonely_ranks({name: "2"}, 1)
    refuse_lonely_ranks({name: "2"}, 2)
    refuse_lonely_ranks({}, 1)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("ACCELERATE_USE_FSDP", "--sharding fsdp"), ("ACCELERATE_USE_DEEPSPEED", "does not drive")],
)
def test_a_launcher_that_asks_accelerate_for_other_sharding_is_refused(name, instead):
    with pytest.raises(UserError, match=f"{name}.*{instead}"):
        start(HardwareOptions(), {name: "true"})


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="--mixed-precision fp16 needs a GPU"):
        start(HardwareOptions(device="cpu", mixed_precision="fp16"), {})


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_as_the_flag_says(monkeypatch, tf32):
    said = []
    monkeypatch.setattr("train.distributed.set_tf32", lambda device, on: said.append((device.type, on)))
    start(HardwareOptions(device="cpu", tf32=tf32), {})
    assert said == [("cpu", tf32)]


def test_a_cpu_computes_in_float32_unless_told_otherwise_and_says_why():
    alone = start(HardwareOptions(device="cpu"), {})
    assert (alone.precision, alone.processes, alone.rank, alone.device.type) == ("no", 1, 0, "cpu")
    assert alone.reason == "CPU (--device cpu), precision no (default here)"
    assert alone.broadcast("x") == "x" and alone.on_main(lambda: 3) == 3


@pytest.mark.parametrize(("processes", "waited"), [(1, []), (2, ["hosts"]), (3, ["hosts"])])
def test_from_two_processes_on_a_barrier_waits_for_the_others(monkeypatch, processes, waited):
    asked = []

    def noted(group):
        asked.append(group)

    monkeypatch.setattr("train.distributed.dist.barrier", noted)
    alone = start(HardwareOptions(device="cpu"), {})
    dataclasses.replace(alone, processes=processes, hosts="hosts").barrier()
    assert asked == waited


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", "has ended, and has said why"),
        ("NCCL communicator was aborted on rank 1.", "has ended, and has said why"),
        (
            "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)",
            r"waited 30 minutes in vain for one of them \(--process-timeout\)",
        ),
        (
            "Timed out waiting 1800000ms for recv operation to complete",
            r"waited 30 minutes in vain for one of them \(--process-timeout\)",
        ),
        (  # of what is asked over the same connection after something else has waited too long
            "Application timeout caused pair closure",
            r"waited 30 minutes in vain for one of them \(--process-timeout\)",
        ),
        ("wait timeout after 1800000ms, keys: /default_pg/0//1//cuda:0", r"waited 30 minutes in vain"),
        ("shapes differ", None),
    ],
)
def test_what_libraries_say_of_a_lost_process_is_one_sentence(said, sentence):
    found = explain_lost_peer(RuntimeError(said), 30.0)
    assert found is None if sentence is None else re.search(sentence, found)


@pytest.mark.parametrize("wanted", ["cuda", "mps", "toaster"])
def test_a_device_that_is_not_there_is_refused(wanted):
    with pytest.raises(UserError, match=f"--device {wanted}"):
        start(HardwareOptions(device=wanted), {})


def test_peak_memory_counts_what_was_freed():
    before = peak_resident_bytes()
    torch.ones(40_000_000)
    assert peak_resident_bytes() >= before + 100_000_000 or before > 300_000_000


def test_the_processes_of_one_copy_are_the_machines_unless_told_and_must_divide_all():
    hybrid = HardwareOptions(sharding="hsdp")
    assert shard_processes(hybrid, 16, {"LOCAL_WORLD_SIZE": "8"}) == 8
    assert shard_processes(HardwareOptions(sharding="hsdp", shard_processes=2), 16, {"LOCAL_WORLD_SIZE": "8"}) == 2
    assert [shard_processes(HardwareOptions(sharding=kind), 16, {}) for kind in ("none", "fsdp")] == [1, 16]
    assert shard_processes(hybrid, 1, {}) == 1
    with pytest.raises(UserError, match="does not say how many these are .*--shard-processes"):
        shard_processes(hybrid, 16, {})
    with pytest.raises(UserError, match="--shard-processes 3 does not divide the 16 processes"):
        shard_processes(HardwareOptions(sharding="hsdp", shard_processes=3), 16, {})
    with pytest.raises(UserError, match="--shard-processes is for --sharding hsdp, not fsdp"):
        HardwareOptions(sharding="fsdp", shard_processes=3)
