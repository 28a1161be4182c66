"""One choice of device, one rule of precision, one way to say that memory ended."""

import dataclasses

import pytest
import torch

from pipeline.diffusion.schedules import tables_of
from pipeline.runtime.devices import (
    choose_device,
    default_precision,
    float32_products,
    is_out_of_memory,
    memory_explained,
    peak_flops,
    widest_float,
)
from pipeline.runtime.errors import UserError
from pipeline.runtime.processes import Launch


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))


def test_each_process_takes_its_own_gpu(two_gpus):
    for wanted in ("auto", "cuda"):
        found = [str(choose_device(wanted, Launch(rank=r, world_size=4, local_rank=r))[0]) for r in range(4)]
        assert found == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert str(choose_device("cuda:1", Launch())[0]) == "cuda:1"
    assert str(choose_device("cpu", Launch())[0]) == "cpu"
    with pytest.raises(UserError, match="there are 2 CUDA GPUs here"):
        choose_device("cuda:2", Launch())


def test_without_an_accelerator_auto_is_the_cpu():
    assert choose_device("auto", Launch()) == (torch.device("cpu"), "no CUDA GPU was found")


@pytest.mark.parametrize("said", ["true", "1", "YES"])
def test_auto_stays_on_the_cpu_where_accelerates_launcher_was_told_to(two_gpus, monkeypatch, said):
    monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    assert choose_device("auto", Launch()) == (torch.device("cpu"), "the launcher asks for the CPU")
    assert choose_device("cuda:1", Launch())[0] == torch.device("cuda:1")


def test_another_accelerator_may_be_asked_for_and_is_said_to_be_untried(monkeypatch):
    said = []
    monkeypatch.setattr("pipeline.runtime.devices.warn", said.append)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True, raising=False)
    assert choose_device("mps", Launch())[0] == torch.device("mps:0")
    assert "never tried on MPS devices" in said[0]


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("toaster", "--device toaster is not a device"),
        ("meta", "--device meta is not supported"),
        ("cuda:7", "--device cuda:7: there are 0 CUDA GPUs here"),
        ("mps", "--device mps: there are 0 MPS devices here"),
    ],
)
def test_what_is_not_there_is_refused_by_name(wanted, sentence):
    with pytest.raises(UserError, match=sentence):
        choose_device(wanted, Launch())


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "no"), ((7, 5), "no"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_bf16_is_the_default_where_the_gpu_has_units_for_it(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # it counts emulation
    assert default_precision(torch.device("cuda", 0))[0] == precision
    assert default_precision(torch.device("cpu"))[0] == "no"


def test_apples_gpus_get_tables_in_float32_that_are_those_of_others_rounded(monkeypatch):
    assert widest_float(torch.device("mps")) is torch.float32 and widest_float(torch.device("cuda")) is torch.float64
    made = {}
    for dtype in (torch.float64, torch.float32):
        monkeypatch.setattr("pipeline.diffusion.schedules.widest_float", lambda _, dtype=dtype: dtype)
        made[dtype] = vars_of(tables_of.__wrapped__("linear", 1000, None, torch.device("cpu")))
    for name, values in made[torch.float32].items():
        exact = made[torch.float64][name]
        assert values.dtype is (torch.float32 if exact.is_floating_point() else exact.dtype), name
        torch.testing.assert_close(values, exact.to(values.dtype), rtol=0, atol=0)


def vars_of(tables):
    return {field.name: getattr(tables, field.name) for field in dataclasses.fields(tables)}


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H200", "no", None),
        ("Unknown 1", "bf16", None),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "bf16", 181e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("Tesla T4", "fp16", 65e12),
        ("NVIDIA T400 4GB", "fp16", None),
        ("A100-SXM4-40GB", "bf16", 312e12),
    ],
)
def test_a_peak_is_known_by_the_whole_name_of_a_device(monkeypatch, name, precision, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0), precision) == peak


@pytest.mark.parametrize("tf32", [True, False])
def test_one_switch_sets_tf32_for_products_and_convolutions_alike(tf32):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with float32_products(torch.device("cuda"), tf32=tf32):
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 is tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
    ],
)
def test_every_library_s_way_of_running_out_of_memory_becomes_the_command_s_sentence(error):
    assert is_out_of_memory(error)
    with pytest.raises(UserError, match="lower --batch-size"), memory_explained(lambda: "lower --batch-size"):
        raise error


def test_other_errors_pass():
    assert not is_out_of_memory(ValueError("out of memory of what"))
    with pytest.raises(RuntimeError, match="shapes differ"), memory_explained(lambda: "lower"):
        raise RuntimeError("shapes differ")
