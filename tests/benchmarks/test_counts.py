"""Ratios and counts that do not depend on the machine: they may not get worse unnoticed."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.counts import CPU_ONLY_READS, Recorder, graph_breaks, recorded, reverse_process
from benchmarks.stores import simulate_store, write_store
from benchmarks.train import our_step
from extract.plan import Plan
from pipeline.dit import DiT, compile_blocks
from pipeline.latents import LatentStore
from train.data import BatchShard, DataOrder

MODEL = "DiT-Ti/2"  # six blocks
OPERATIONS_PER_TRAINING_STEP = 653  # as counted with torch 2.13; other versions differ by a few
OPERATIONS_PER_SAMPLING_STEP = 170


@pytest.fixture(scope="module")
def training_step(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    write_store(data / "store", samples=16, side=8)
    with our_step(MODEL, data, 4) as step:
        for _ in range(2):
            step()
        yield recorded(step)


@pytest.fixture(scope="module")
def sampling_step():
    """What one more step of the reverse process adds."""
    fewer, more = (reverse_process(steps) for steps in (2, 3))
    return more.operations - fewer.operations, more.host_reads - fewer.host_reads


def test_a_training_step_that_logs_nothing_never_makes_the_host_wait(training_step):
    assert training_step.waits == {}
    assert set(training_step.host_reads) <= CPU_ONLY_READS


def test_a_sampling_step_never_makes_the_host_wait(sampling_step):
    _, host_reads = sampling_step
    assert set(host_reads) <= CPU_ONLY_READS


def test_steps_ask_for_no_more_operations_than_they_did(training_step, sampling_step):
    in_sampling, _ = sampling_step
    assert training_step.operations.total() <= 1.05 * OPERATIONS_PER_TRAINING_STEP, training_step.operations
    assert in_sampling.total() <= 1.05 * OPERATIONS_PER_SAMPLING_STEP, in_sampling


def test_host_reads_are_seen_whatever_asks_for_them():
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: bool(x[0]), x.nonzero, lambda: torch.equal(x, x), x.unique):
        with Recorder() as recorder:
            read()
        assert recorder.waits.total() >= 1


@pytest.mark.parametrize("conditioning", ["adaln-zero", "in-context"])
def test_a_block_compiles_in_one_piece(conditioning):
    model = DiT.from_preset(MODEL, input_size=8, conditioning=conditioning)
    condition = torch.zeros(1, 128) if conditioning == "adaln-zero" else None
    assert graph_breaks(model.blocks[0], torch.zeros(1, 16, 128), condition) == (1, 0)


# dynamo looks for .grad on every input and hides the warning when it is shown, which is too late for "error"
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_one_compilation_serves_all_blocks():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    model = compile_blocks(DiT.from_preset(MODEL, input_size=8), backend=counter)
    for _ in range(2):
        model(torch.ones(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])).sum().backward()
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_the_order_and_the_plan_of_a_hundred_million_samples_take_no_memory():
    shard = BatchShard(batch_size=256)
    tracemalloc.start()
    try:
        order = DataOrder(100_000_000, seed=0)
        batches = [order.batch(number, shard) for number in (0, 400_000, 10**12)]
        rows = Plan(inputs=100_000_000, seed=0, samples_per_shard=4096).rows(24_414)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(len(np.unique(batch)) == 256 for batch in batches)
    assert len(rows) == 100_000_000 - 24_414 * 4096
    assert peak < 2e6


def test_an_open_store_of_a_hundred_million_samples_would_take_less_than_a_gigabyte(tmp_path):
    shards = 500
    simulate_store(tmp_path / "store", samples=shards * 4096)
    tracemalloc.start()
    try:
        with LatentStore(tmp_path / "store") as store:
            for part in np.array_split(np.arange(shards) * 4096, 5):
                store.gather(part)  # every shard is opened, and its labels are kept
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / shards * (100_000_000 / 4096) < 1e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_training_step_on_a_gpu_never_makes_the_host_wait(tmp_path):
    write_store(tmp_path / "store", samples=16, side=8)
    with our_step(MODEL, tmp_path, 4, device=torch.device("cuda")) as step:
        for _ in range(3):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
