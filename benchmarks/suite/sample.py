"""Sampling, per step and whole with decoding, against a loop written as the public release writes it."""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.network import _fill as fill_both
from benchmarks.plain_dit import PlainDiT
from benchmarks.report import Row
from benchmarks.sample import Race, our_side, plain_loop
from benchmarks.suite.setting import Setting
from benchmarks.timing import Spread, interleaved, ratios, release, spread
from pipeline.dit import DiT
from pipeline.dit.macs import count_macs
from pipeline.vae import load_vae

GPU_BOUND, CPU_BOUND = 4.0, 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One network."""

    model: str
    batch_size: int
    steps: int
    rounds: int


def cases(setting: Setting) -> list[Case]:
    """What is measured on this device."""
    if setting.quick:
        return [Case(model="DiT-Ti/2", batch_size=2, steps=2, rounds=2)]
    if setting.on_gpu:
        return [Case(model="DiT-XL/2", batch_size=64, steps=100, rounds=3)]
    return [Case(model=name, batch_size=2, steps=2, rounds=7) for name in ("DiT-S/2", "DiT-B/4")]


def measure(setting: Setting) -> list[Row]:
    """Two rows per network: the whole with decoding, and the reverse process alone."""
    return [row for case in cases(setting) for row in _compare(case, setting)]


def _compare(case: Case, setting: Setting) -> list[Row]:
    race = Race(
        model=case.model,
        batch_size=case.batch_size,
        steps=case.steps,
        rounds=case.rounds,
        device=setting.device.type,
        compiled=setting.on_gpu,
    )
    ours, plain = DiT.from_preset(case.model), PlainDiT(DiT.from_preset(case.model).config)
    fill_both(ours, plain)
    vae = load_vae("demo", device=race.device)
    labels = np.arange(case.batch_size) % ours.config.num_classes
    generator = our_side(ours, vae, race)
    plain = plain.to(race.device).eval()

    def run_plain() -> None:
        with torch.device(race.device):
            plain_loop(plain, vae, labels, race)

    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # the plain loop's TF32; nothing changes on a CPU
    try:
        times = interleaved(
            {"plain": run_plain, "ours": lambda: generator.pixels(generator.latents(0, labels))},
            rounds=case.rounds,
            device=setting.device,
        )
        alone = interleaved({"ours": lambda: generator.latents(0, labels)}, rounds=2, device=setting.device, warm_ups=0)
    finally:
        torch.set_float32_matmul_precision(kept)
        del plain
        release(setting.device)
    precision = "bf16" if setting.on_gpu else "fp32"
    passes = 2 * case.batch_size  # with guidance
    flops_per_step = 2.0 * count_macs(ours.config) * passes
    what = f"{case.model} at 256 px, batch {case.batch_size}, guidance, {case.steps} steps"
    whole = _rates(times["ours"], case)
    paper = whole.median * case.steps / 250
    return [
        Row(
            what=f"{what}, with decoding (demo VAE)",
            unit="image steps/s",
            ours=whole,
            plain=_rates(times["plain"], case),
            ratio=ratios(times),
            limit=setting.ceilings.matmul(precision) / flops_per_step * case.batch_size,
            limit_name=f"{precision} matmul",
            wanted_ratio=None if setting.quick else GPU_BOUND if setting.on_gpu else CPU_BOUND,
            note=f"at 250 steps {paper:.3g} images/s, {50_000 / paper / 3600:.3g} h for 50,000",
        ),
        Row(
            what=f"{what}, the reverse process alone",
            unit="image steps/s",
            ours=_rates(alone["ours"], case),
            limit=setting.ceilings.matmul(precision) / flops_per_step * case.batch_size,
            limit_name=f"{precision} matmul",
        ),
    ]


def _rates(seconds: list[float], case: Case) -> Spread:
    """Images times steps per second, guided steps counted once."""
    return spread([case.batch_size * case.steps / taken for taken in seconds])
