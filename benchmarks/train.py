"""The whole training step, data, optimizer and average included, against a loop written as the reference writes it.

A GPU may not hold a loop's batch: then that loop gets the largest half, quarter, … of it that fits, rates are compared
per image, and memory is compared at the smaller of the two. Networks are taken one after the other, and the
turns of one network are long enough (several steps) that handing memory over between them does not count.
"""

import contextlib
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import Setting
from benchmarks.plain_dit import PlainDiT
from benchmarks.report import Pieces, Row
from benchmarks.stores import CLASSES, write_store
from benchmarks.timing import CPU, Work, finish, interleaved, peak_bytes, rates, ratios, release, seconds_of
from pipeline.diffusion import GaussianDiffusion
from pipeline.dit import DiTConfig
from pipeline.dit.macs import count_macs
from pipeline.runtime.devices import is_out_of_memory
from train import distributed, options
from train.loop import reader_of, train_step
from train.run import assemble

Build = Callable[[int], AbstractContextManager[Work]]
"""Something to train with, by batch size."""
SAMPLES = 512
PROFILED_STEPS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One network and its aims."""

    model: str
    side: int = 32
    """Latent cells along one side."""
    batch_size: int
    wanted_ratio: float | None = None
    wanted_share: float | None = None
    wanted_memory: float | None = None
    memory: bool = True
    """Whether to measure memory too."""
    eager: bool = False
    """Whether to leave compilation out on a GPU, too."""
    optimizer: str | None = None
    """As in dit-train; None is its default."""

    @property
    def name(self) -> str:
        variation = ", eager" * self.eager + (f", {self.optimizer}" if self.optimizer else "")
        return f"{self.model} at {8 * self.side} px{variation}"


def cases(setting: Setting) -> list[Case]:
    """What is measured on this device."""
    if setting.quick:
        return [Case(model="DiT-Ti/2", side=8, batch_size=4)]
    if setting.on_gpu:
        return [
            Case(model="DiT-XL/2", batch_size=256, wanted_ratio=2.5, wanted_share=0.55, wanted_memory=0.5),
            Case(model="DiT-XL/2", batch_size=256, memory=False, eager=True),
            Case(model="DiT-XL/2", batch_size=256, memory=False, optimizer="muon"),
            Case(model="DiT-XL/2", side=64, batch_size=64),
            Case(model="DiT-L/2", batch_size=256, memory=False),
            Case(model="DiT-B/2", batch_size=256, memory=False),
            Case(model="DiT-S/2", batch_size=256, memory=False),
        ]
    return [
        Case(model="DiT-S/2", batch_size=4, wanted_ratio=0.95),
        Case(model="DiT-B/4", batch_size=4, wanted_ratio=0.95, memory=False),
        Case(model="DiT-B/4", batch_size=4, memory=False, optimizer="muon"),
    ]


def pieces(setting: Setting) -> Pieces:
    """One row per network, on a GPU also eager."""
    return {case.name: partial(_compare, case, setting) for case in cases(setting)}


def _compare(case: Case, setting: Setting) -> list[Row]:
    """Our step against the plain one, each at its batch size or, where memory ends, at the largest half that fits."""
    data = setting.folder / f"train-{case.side}"
    if not data.exists():
        data.mkdir()
        write_data(data, case.side)
    ours, plain = builders(case, data, setting)
    our_batch = plain_batch = case.batch_size
    if setting.on_gpu:
        our_batch, plain_batch = (largest_that_fits(build, case.batch_size, setting.device) for build in (ours, plain))
    while True:
        try:
            return [_race(case, (ours, our_batch), (plain, plain_batch), setting)]
        except RuntimeError as error:  # each fits alone, but not beside what the other keeps
            if not is_out_of_memory(error) or max(our_batch, plain_batch) == 1:
                raise
        release(setting.device)
        if our_batch > plain_batch:
            our_batch //= 2
        else:
            plain_batch = max(1, plain_batch // 2)


def _race(case: Case, ours: tuple[Build, int], plain: tuple[Build, int], setting: Setting) -> Row:
    (build_ours, our_batch), (build_plain, plain_batch) = ours, plain
    at = min(our_batch, plain_batch)
    builds = (build_ours, build_plain) if case.memory else ()
    memory = [peak_bytes(partial(build, at), setting.device) for build in builds]
    with build_ours(our_batch) as our_work, build_plain(plain_batch) as plain_work:
        times = interleaved(
            {"plain": plain_work, "ours": our_work},
            rounds=setting.rounds(5 if setting.on_gpu else 7),
            device=setting.device,
            warm_ups=2,
            calls=3 if setting.on_gpu and not setting.quick else 1,
            hand_over=setting.on_gpu,
        )
        release(setting.device)
        wait = data_wait(our_work, setting)
    release(setting.device)

    flops = 6.0 * count_macs(DiTConfig.from_preset(case.model, input_size=case.side))
    precision = "bf16" if setting.on_gpu else "fp32"
    batches = {"ours": our_batch, "plain": plain_batch}
    smaller = [f"{name} at {batch}, what fits" for name, batch in batches.items() if batch != case.batch_size]
    if smaller:
        smaller.append(f"memory at {at}")
    return Row(
        what=f"{case.name}, batch {case.batch_size}",
        unit="images/s",
        ours=rates(times["ours"], our_batch),
        plain=rates(times["plain"], plain_batch),
        ratio=ratios(times, per_plain=plain_batch, per_ours=our_batch),
        limit=setting.ceilings.matmul(precision) / flops,
        limit_name=f"{precision} matmul",
        wanted_ratio=case.wanted_ratio,
        wanted_share=case.wanted_share,
        wanted_memory=case.wanted_memory,
        ours_bytes=memory[0] if memory else None,
        plain_bytes=memory[1] if memory else None,
        note=", ".join([*smaller, f"waits for data {wait:.1%} of the time"]),
        more={"data_wait_share": wait, "our_batch": our_batch, "plain_batch": plain_batch, "memory_batch": at},
    )


def data_wait(our_work: Work, setting: Setting) -> float:
    """The share of the time that our loop waits for data."""
    steps = 10 if setting.on_gpu and not setting.quick else 3

    def waited() -> float:
        seconds = our_work()
        assert isinstance(seconds, float)
        return seconds

    before = waited()
    taken = steps * seconds_of(our_work, setting.device, calls=steps)
    return (waited() - before) / taken * steps / (steps + 1)


def builders(case: Case, data: Path, setting: Setting) -> tuple[Build, Build]:
    """Ours and the plain loop."""
    compiled = setting.on_gpu and not case.eager
    ours = partial(our_step, case.model, data, device=setting.device, compiled=compiled, optimizer=case.optimizer)
    plain = partial(plain_step, case.model, data, device=setting.device, side=case.side)
    return ours, plain


def largest_that_fits(build: Build, batch_size: int, device: torch.device) -> int:
    """The batch size, halved until a step fits into memory; 1 where nothing does."""
    while batch_size > 1 and not _fits(build, batch_size, device):
        batch_size //= 2
    return batch_size


def _fits(build: Build, batch_size: int, device: torch.device) -> bool:
    try:
        with build(batch_size) as work:
            seconds_of(work, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        release(device)
    return True


def measure_profile(setting: Setting, *, top: int = 14) -> list[dict[str, Any]]:
    """The operations of the first case's step by their own time on the device, with their share of all of it."""
    case = cases(setting)[0]
    data = setting.folder / f"profile-{case.side}"
    data.mkdir()
    write_data(data, case.side)
    build, _ = builders(case, data, setting)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    with build(case.batch_size) as step:
        for _ in range(3):
            step()
        finish(setting.device)
        with profile(activities=activities) as recorded:
            for _ in range(PROFILED_STEPS):
                step()
            finish(setting.device)
    release(setting.device)
    events = [event for event in recorded.key_averages() if not setting.on_gpu or event.device_type == DeviceType.CUDA]
    own = partial(_own_time, on_gpu=setting.on_gpu)
    whole = sum(own(event) for event in events) or 1.0
    chosen = sorted(events, key=own, reverse=True)[:top]
    return [
        {"name": event.key[:100], "share": own(event) / whole, "calls": round(event.count / PROFILED_STEPS, 1)}
        for event in chosen
        if own(event) > 0
    ]


def _own_time(event: Any, *, on_gpu: bool) -> float:
    """Microseconds in the operation itself: kernels on a GPU, else the CPU's."""
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)


def write_data(folder: Path, side: int = 32) -> None:
    """The same random samples as a store and as one .npy file each."""
    latents = write_store(folder / "store", samples=SAMPLES, side=side)
    (folder / "files").mkdir()
    for k, moments in enumerate(latents):
        np.save(folder / "files" / f"{k}.npy", moments[0].numpy())
        np.save(folder / "files" / f"{k}-label.npy", np.int64(k % CLASSES))


@contextlib.contextmanager
def our_step(
    name: str,
    data: Path,
    batch_size: int,
    *,
    device: torch.device = CPU,
    compiled: bool = False,
    optimizer: str | None = None,
    checkpointing: bool = False,
) -> Iterator[Work]:
    """One step as `dit-train` makes it: in float32 on a CPU, in the default precision on a GPU."""
    on_gpu = device.type == "cuda"
    torch.compiler.reset()  # a run compiles for one shape, and so must each of ours
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the device of an earlier one
    chosen: dict[str, Any] = {"optimizer": optimizer} if optimizer else {}
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as run:
        wanted = options.TrainOptions(
            data=options.DataOptions(latents=str(data / "store")),
            run=options.RunOptions(out=Path(run) / "run", tensorboard=False),
            model=options.ModelOptions(model=name, compile=compiled, gradient_checkpointing=checkpointing),
            optimizer=options.OptimizerOptions(batch_size=batch_size, **chosen),
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
def plain_step(name: str, data: Path, batch_size: int, *, device: torch.device = CPU, side: int = 32) -> Iterator[Work]:
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
