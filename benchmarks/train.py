"""Is a whole training step as fast as a plain loop? Run `python -m benchmarks.train [--quick]`.

Per model: the median over interleaved rounds of (plain time / our time) for whole steps in float32, with data, AdamW
and EMA (above 1 ours is faster), and the peak memory of each in a process of its own. The plain loop is written as the
reference writes it: one file per sample, draws in the loop, `AdamW`, the average parameter by parameter, `.item()` in
every step. Then: how long the batch at a far position of the data order takes, against the first.

With `--compile` instead: our step compiled against our step as it is, and how long its first step takes.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from benchmarks.plain_dit import PlainDiT
from benchmarks.stores import CLASSES, write_store
from benchmarks.timing import CPU
from pipeline.diffusion import GaussianDiffusion
from pipeline.dit import DiTConfig
from train import distributed, options
from train.data import BatchShard, DataOrder
from train.loop import reader_of, train_step
from train.run import assemble

BOUND = 0.95
SAMPLES = 512
Step = Callable[[], object]
"""Trains one step; ours gives the seconds it has waited for data so far."""


def main() -> int:
    """Exit status 0 if every bound is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="S/2 alone, batch 2, 7 rounds of one step")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per model (default 9)")
    parser.add_argument("--steps", type=int, default=2, help="steps per round (default 2)")
    parser.add_argument("--batch-size", type=int, default=4, help="samples per step (default 4)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2; 1 measures CPU time)")
    parser.add_argument("--memory-of", choices=["plain", "ours"], help="run that loop alone and print its peak memory")
    parser.add_argument("--compile", action="store_true", help="time our step compiled against our step eager")
    parser.add_argument("--models", nargs="+", default=["DiT-S/2", "DiT-B/4"], help="models")
    parser.add_argument("--data", type=Path, help="folder of an earlier process's data")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.models, chosen.batch_size, chosen.steps, chosen.rounds = ["DiT-S/2"], 2, 1, 7
    torch.set_num_threads(chosen.threads)
    if chosen.memory_of:
        return _print_memory(chosen.memory_of, chosen.models[0], chosen.data, chosen.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data)
        if chosen.compile:
            for name in chosen.models:
                _compare_compiled(name, data, chosen)
            return 0
        fine = [_compare(name, data, chosen) for name in chosen.models]
        return 0 if all(fine) and _compare_positions() else 1


def write_data(folder: Path, side: int = 32) -> None:
    """The same random samples as a store and as one .npy file each."""
    latents = write_store(folder / "store", samples=SAMPLES, side=side)
    (folder / "files").mkdir()
    for k, moments in enumerate(latents):
        np.save(folder / "files" / f"{k}.npy", moments[0].numpy())
        np.save(folder / "files" / f"{k}-label.npy", np.int64(k % CLASSES))


@contextlib.contextmanager
def our_step(
    name: str, data: Path, batch_size: int, *, device: torch.device = CPU, compiled: bool = False
) -> Iterator[Step]:
    """One step as `dit-train` makes it: in float32 on a CPU, compiled and in the default precision on a GPU.

    Args:
        compiled: compile on a CPU, too.
    """
    on_gpu = device.type == "cuda"
    torch.compiler.reset()  # a run compiles for one shape, and so must each of ours
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the device of an earlier one
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as run:
        wanted = options.TrainOptions(
            data=options.DataOptions(latents=str(data / "store")),
            run=options.RunOptions(out=Path(run) / "run", tensorboard=False),
            model=options.ModelOptions(model=name, compile=on_gpu or compiled),
            optimizer=options.OptimizerOptions(batch_size=batch_size),
            hardware=options.HardwareOptions(
                device="auto" if on_gpu else "cpu", mixed_precision=None if on_gpu else "no"
            ),
            preview=options.PreviewOptions(sample_every=0),
        )
        trainer = assemble(wanted, distributed.start(wanted.hardware), stack, time.monotonic())
        reader = stack.enter_context(reader_of(trainer))
        batches = iter(reader)

        def step() -> float:
            train_step(trainer, next(batches), with_losses=trainer.state.step % 10 == 0)
            trainer.state.step += 1
            return reader.waited_seconds

        yield step


class PlainFiles(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """One file per sample, as feature extractors leave them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        moments = np.load(self.folder / f"{index}.npy")
        return torch.from_numpy(moments), torch.from_numpy(np.load(self.folder / f"{index}-label.npy"))


@contextlib.contextmanager
def plain_step(name: str, data: Path, batch_size: int, *, device: torch.device = CPU, side: int = 32) -> Iterator[Step]:
    """One step as the reference's training script makes it; on a GPU with workers, pinned memory and TF32."""
    on_gpu = device.type == "cuda"
    model = PlainDiT(DiTConfig.from_preset(name, input_size=side)).to(device)
    average = deepcopy(model).eval()
    for parameter in average.parameters():
        parameter.requires_grad_(False)
    diffusion = GaussianDiffusion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    loader = torch.utils.data.DataLoader(
        PlainFiles(data / "files"),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=4 if on_gpu else 0,
        pin_memory=on_gpu,
        persistent_workers=on_gpu,
    )
    running = [0.0]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    endless = batches()

    def step() -> None:
        moments, y = (tensor.to(device) for tensor in next(endless))
        mean, log_variance = moments.float().chunk(2, dim=1)
        x = (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)) * 0.18215
        y = torch.where(torch.rand(len(y), device=device) < 0.1, CLASSES, y)
        t = torch.randint(0, diffusion.num_timesteps, (len(x),), device=device)
        losses = diffusion.training_losses(lambda x_t, s: model(x_t, s, y), x, t, torch.randn_like(x))
        loss = losses["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_average(average, model)
        running[0] += loss.item()

    yield step


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float = 0.9999) -> None:
    """The average, one parameter after the other."""
    averages, parameters = OrderedDict(average.named_parameters()), OrderedDict(model.named_parameters())
    for name, parameter in parameters.items():
        averages[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


def _compare(name: str, data: Path, chosen: argparse.Namespace) -> bool:
    with our_step(name, data, chosen.batch_size) as ours, plain_step(name, data, chosen.batch_size) as plain:
        median, found = _race({"plain": plain, "ours": ours}, chosen)
    print(f"{name}  {found}; at least {BOUND} wanted", flush=True)
    plain_mb, ours_mb = (_memory_of(loop, name, data, chosen) for loop in ("plain", "ours"))
    print(f"{name}  peak memory beyond the imports: plain {plain_mb:.0f} MB  ours {ours_mb:.0f} MB", flush=True)
    return median >= BOUND and ours_mb <= plain_mb


def _compare_compiled(name: str, data: Path, chosen: argparse.Namespace) -> None:
    size = chosen.batch_size
    with our_step(name, data, size) as eager, our_step(name, data, size, compiled=True) as compiled:
        first_step_seconds = _seconds(compiled, 1)
        _, found = _race({"eager": eager, "compiled": compiled}, chosen)
    print(f"{name}  {found}; first compiled step {first_step_seconds:.0f} s", flush=True)


def _race(steps: dict[str, Step], chosen: argparse.Namespace) -> tuple[float, str]:
    """(median ratio of the first one's time to the second one's, what was found in words); a round to warm up."""
    names, (first, second) = list(steps), steps.values()
    times = [_round(first, second, chosen.steps, plain_first=k % 2 == 0) for k in range(chosen.rounds + 1)][1:]
    ratios = [of_first / of_second for of_first, of_second in times]
    median = statistics.median(ratios)
    step_ms = (1000 * statistics.median(column) / chosen.steps for column in zip(*times, strict=True))
    each = "  ".join(f"{name} {ms:.0f} ms" for name, ms in zip(names, step_ms, strict=True))
    return median, (
        f"batch {chosen.batch_size}  {chosen.threads} threads  whole step: {each}  ratio {median:.3f} "
        f"({min(ratios):.3f} … {max(ratios):.3f}, {len(ratios)} rounds)"
    )


def _round(plain: Step, ours: Step, steps: int, *, plain_first: bool) -> tuple[float, float]:
    """(plain, our) seconds; the order alternates, so that a machine that slows down favours neither."""
    if plain_first:
        return _seconds(plain, steps), _seconds(ours, steps)
    of_ours = _seconds(ours, steps)
    return _seconds(plain, steps), of_ours


def _seconds(step: Step, steps: int) -> float:
    """Time of some steps; on one thread CPU time, which leaves out what other programs take."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(steps):
        step()
    return clock() - start


def _memory_of(loop: str, name: str, data: Path, chosen: argparse.Namespace) -> float:
    words = [sys.executable, "-m", "benchmarks.train", "--memory-of", loop, "--models", name, "--data", str(data)]
    words += ["--batch-size", str(chosen.batch_size), "--threads", str(chosen.threads)]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(result.stdout)


def _print_memory(loop: str, name: str, data: Path, batch_size: int) -> int:
    """Peak memory of three steps beyond what the imports take, in MB."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).step()  # imports what the first optimizer imports
    before = distributed.peak_resident_bytes()
    with plain_step(name, data, batch_size) if loop == "plain" else our_step(name, data, batch_size) as step:
        for _ in range(3):
            step()
    print((distributed.peak_resident_bytes() - before) / 1e6)
    return 0


def _compare_positions() -> bool:
    """Whether the batch a billion epochs away costs what the first one costs."""
    shard = BatchShard(batch_size=256)
    seconds = {}
    for number in (0, 10**9 * 5005):
        times = []
        for k in range(100):
            started = time.perf_counter()
            DataOrder(1_281_167, seed=k).batch(number, shard)
            times.append(time.perf_counter() - started)
        seconds[number] = statistics.median(times)
    first, far = seconds.values()
    print(
        f"indices of a batch of 256 of 1,281,167 samples: first {1e6 * first:.0f} µs  "
        f"a billion epochs away {1e6 * far:.0f} µs"
    )
    return far < 3 * first


if __name__ == "__main__":
    sys.exit(main())
