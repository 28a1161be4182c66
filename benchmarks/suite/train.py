"""The whole training step, data, optimizer and average included, against a loop written as the reference writes it.

A GPU may not hold the plain loop's batch: then the plain loop gets the largest half, quarter, … of it that fits, rates
are compared per image, and memory is compared at that smaller batch. Networks are taken one after the other, and the
turns of one network are long enough (several steps) that handing memory over between them does not count.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.report import Row
from benchmarks.suite.setting import Setting
from benchmarks.timing import Work, interleaved, peak_bytes, rates, ratios, release, seconds_of
from benchmarks.train import our_step, plain_step, write_data
from pipeline.dit import DiTConfig
from pipeline.dit.macs import count_macs

Build = Callable[[int], AbstractContextManager[Work]]
"""Something to train with, by batch size."""


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


def cases(setting: Setting) -> list[Case]:
    """What is measured on this device."""
    if setting.quick:
        return [Case(model="DiT-Ti/2", side=8, batch_size=4)]
    if setting.on_gpu:
        return [
            Case(model="DiT-XL/2", batch_size=256, wanted_ratio=2.5, wanted_share=0.55, wanted_memory=0.5),
            Case(model="DiT-XL/2", side=64, batch_size=64),
            Case(model="DiT-L/2", batch_size=256, memory=False),
            Case(model="DiT-B/2", batch_size=256, memory=False),
            Case(model="DiT-S/2", batch_size=256, memory=False),
        ]
    return [
        Case(model="DiT-S/2", batch_size=4, wanted_ratio=0.95),
        Case(model="DiT-B/4", batch_size=4, wanted_ratio=0.95, memory=False),
    ]


def measure(setting: Setting) -> list[Row]:
    """One row per network."""
    return [_compare(case, setting) for case in cases(setting)]


def _compare(case: Case, setting: Setting) -> Row:
    data = setting.folder / f"train-{case.side}"
    if not data.exists():
        data.mkdir()
        write_data(data, case.side)
    ours, plain = builders(case, data, setting)
    plain_batch = largest_that_fits(plain, case.batch_size, setting)
    memory = [peak_bytes(partial(build, plain_batch), setting.device) for build in (ours, plain)] if case.memory else []
    calls = 3 if setting.on_gpu else 1
    with ours(case.batch_size) as our_work, plain(plain_batch) as plain_work:
        times = interleaved(
            {"plain": plain_work, "ours": our_work},
            rounds=setting.rounds(5 if setting.on_gpu else 7),
            device=setting.device,
            warm_ups=2,
            calls=calls,
            hand_over=setting.on_gpu,
        )
        release(setting.device)
        wait = data_wait(our_work, setting)
    release(setting.device)
    flops = 6.0 * count_macs(DiTConfig.from_preset(case.model, input_size=case.side))
    precision = "bf16" if setting.on_gpu else "fp32"
    smaller = "" if plain_batch == case.batch_size else f"plain at {plain_batch}, the largest that fits, and memory too"
    return Row(
        what=f"{case.model} at {8 * case.side} px, batch {case.batch_size}",
        unit="images/s",
        ours=rates(times["ours"], case.batch_size),
        plain=rates(times["plain"], plain_batch),
        ratio=ratios(times, per_plain=plain_batch, per_ours=case.batch_size),
        limit=setting.ceilings.matmul(precision) / flops,
        limit_name=f"{precision} matmul",
        wanted_ratio=case.wanted_ratio,
        wanted_share=case.wanted_share,
        wanted_memory=case.wanted_memory,
        ours_bytes=memory[0] if memory else None,
        plain_bytes=memory[1] if memory else None,
        note=", ".join(text for text in (smaller, f"waits for data {wait:.1%} of the time") if text),
        more={"data_wait_share": wait},
    )


def data_wait(our_work: Work, setting: Setting) -> float:
    """The share of the time that our loop waits for data."""
    steps = 10 if setting.on_gpu else 3

    def waited() -> float:
        seconds = our_work()
        assert isinstance(seconds, float)
        return seconds

    before = waited()
    taken = steps * seconds_of(our_work, setting.device, calls=steps)
    return (waited() - before) / taken * steps / (steps + 1)


def builders(case: Case, data: Path, setting: Setting) -> tuple[Build, Build]:
    """Ours and the plain loop."""
    ours = partial(our_step, case.model, data, device=setting.device)
    plain = partial(plain_step, case.model, data, device=setting.device, side=case.side)
    return ours, plain


def largest_that_fits(build: Build, batch_size: int, setting: Setting) -> int:
    """The batch size, halved until a step fits into the GPU's memory."""
    while setting.on_gpu and batch_size > 1:
        with contextlib.suppress(torch.OutOfMemoryError), build(batch_size) as work:
            seconds_of(work, setting.device)
            release(setting.device)
            return batch_size
        release(setting.device)
        batch_size //= 2
    return batch_size
