import dataclasses

import pytest
import torch

from pipeline.runtime.errors import UserError
from train.distributed import peak_resident_bytes, refuse_lonely_ranks, start
from train.options import HardwareOptions


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


def test_a_cpu_computes_in_float32_unless_told_otherwise_and_says_why():
    alone = start(HardwareOptions(device="cpu"), {})
    assert (alone.precision, alone.processes, alone.rank, alone.device.type) == ("no", 1, 0, "cpu")
    assert alone.reason == "CPU (--device cpu), precision no (default here)"
    assert alone.all_reduce_max(7) == 7 and alone.broadcast("x") == "x" and alone.on_main(lambda: 3) == 3


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200", "no", None),
        ("Unknown 1", "bf16", None),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
    ],
)
def test_the_peak_is_known_by_the_devices_name(monkeypatch, name, precision, peak):
    alone = start(HardwareOptions(device="cpu"), {})
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    elsewhere = dataclasses.replace(alone, device=torch.device("cuda", 0), precision=precision)
    assert elsewhere.peak_flops() == peak


def test_peak_memory_counts_what_was_freed():
    before = peak_resident_bytes()
    torch.ones(40_000_000)
    assert peak_resident_bytes() >= before + 100_000_000 or before > 300_000_000
