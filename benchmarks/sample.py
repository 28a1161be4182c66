"""Sampling, per step and whole with decoding, against a loop written as the public release writes it."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.machine import Setting
from benchmarks.network import fill_both
from benchmarks.plain_dit import PlainDiT
from benchmarks.report import Pieces, Row
from benchmarks.timing import Spread, interleaved, ratios, spread
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.release import default_info
from pipeline.diffusion import GaussianDiffusion
from pipeline.dit import DiT, compile_blocks
from pipeline.dit.macs import count_macs
from pipeline.randomness import normal
from pipeline.runtime.devices import float32_products
from pipeline.vae import Vae, load_vae
from sample.edits import NOISE
from sample.generate import Generator, ReversePlan

GPU_BOUND, CPU_BOUND = 4.0, 0.95
GUIDANCE, GUIDED_CHANNELS = 1.5, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Race:
    """What both sides are asked for."""

    model: str
    batch_size: int
    steps: int
    rounds: int
    device: str
    compiled: bool


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


def pieces(setting: Setting) -> Pieces:
    """Per network two rows: the whole with decoding, and the reverse process alone."""
    return {case.model: partial(_compare, case, setting) for case in cases(setting)}


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

    with float32_products(setting.device, tf32=True):  # the plain loop's
        times = interleaved(
            {
                "plain": lambda: plain_loop(plain, vae, labels, race),
                "ours": lambda: generator.pixels(generator.latents(0, labels)),
            },
            rounds=case.rounds,
            device=setting.device,
        )
        alone = interleaved({"ours": lambda: generator.latents(0, labels)}, rounds=2, device=setting.device, warm_ups=0)
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


def our_side(model: DiT, vae: Vae, race: Race) -> Generator:
    """What `dit-sample` builds on this device by default, and compiled if asked for."""
    process = GaussianDiffusion()
    info = default_info(model.config, vae=vae.describe())
    checkpoint = Checkpoint(model=model, config=model.config, info=info, process=process, weights="ema", folder=None)
    if race.compiled:
        compile_blocks(model)
    plan = ReversePlan(
        sampler="ddpm",
        steps=race.steps,
        eta=0.0,
        guidance=GUIDANCE,
        channels=GUIDED_CHANNELS,
        interval=None,
        seed=0,
        batch_size=race.batch_size,
        precision="no" if race.device == "cpu" else "bf16",
    )
    return Generator(checkpoint, plan, device=race.device, vae=vae)


@torch.no_grad()
def plain_loop(model: PlainDiT, vae: Vae, labels: NDArray[np.int64], race: Race) -> NDArray[np.uint8]:
    """Ancestral sampling on a doubled batch: NumPy tables looked up per sample, guidance on the first channels."""
    process = GaussianDiffusion().respaced(str(race.steps))
    tables = process.tables
    first = tables.posterior_mean_coef1.numpy(), tables.posterior_mean_coef2.numpy()
    smallest, largest = tables.posterior_log_variance_clipped.numpy(), np.log(tables.betas.numpy())
    alpha_bar = tables.alphas_cumprod.numpy()
    shape = (model.config.in_channels, model.config.height, model.config.width)
    x = noise(shape, race).repeat(2, 1, 1, 1)
    y = torch.from_numpy(labels).to(race.device)
    y = torch.cat([y, torch.full_like(y, model.config.null_class)])
    for k, i in enumerate(reversed(range(race.steps))):
        t = torch.full((len(x),), i, device=x.device)

        def at(table: NDArray[np.float64], t: Tensor = t) -> Tensor:
            return torch.from_numpy(table).to(t.device)[t].float()[:, None, None, None]

        half = x[: len(x) // 2]
        out = model(torch.cat([half, half]), process.timestep_map.to(t.device)[t], y)
        guided, rest = out[:, :GUIDED_CHANNELS], out[:, GUIDED_CHANNELS:]
        conditional, unconditional = guided.chunk(2)
        mixed = unconditional + GUIDANCE * (conditional - unconditional)
        out = torch.cat([torch.cat([mixed, mixed]), rest], dim=1)
        epsilon, fraction = out.chunk(2, dim=1)
        share = (fraction + 1) / 2
        log_variance = share * at(largest) + (1 - share) * at(smallest)
        start = at(np.sqrt(1 / alpha_bar)) * x - at(np.sqrt(1 / alpha_bar - 1)) * epsilon
        x = at(first[0]) * start + at(first[1]) * x
        if i:
            x = x + torch.exp(0.5 * log_variance) * noise(shape, race, k).repeat(2, 1, 1, 1)
    scale = vae.scaling_factor
    assert isinstance(scale, float)
    return vae.decode(x.chunk(2)[0] / scale).numpy()


def noise(shape: tuple[int, int, int], race: Race, *step: int) -> Tensor:
    """The draws that our side makes too, so that both make the same images."""
    return torch.stack([normal(shape, 0, NOISE, k, *step) for k in range(race.batch_size)]).to(race.device)
