"""Is sampling as fast as a loop written the way the release writes it? Run `python -m benchmarks.sample [--quick]`.

Both make the same images from the same weights and the same noise, with the same steps and guidance; the plain loop in
float32 with PyTorch's own threads, ours with what `dit-sample` takes on this device. They take turns, and the ratio of
the medians is printed with the time that 50,000 images at 250 steps would take.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.network import _fill as fill_both
from benchmarks.plain_dit import PlainDiT
from pipeline.checkpoint import Checkpoint
from pipeline.diffusion import GaussianDiffusion
from pipeline.dit import DiT, compile_blocks
from pipeline.randomness import normal
from pipeline.vae import Vae, load_vae
from sample.generate import NOISE, Generator, ReversePlan

FIFTY_THOUSAND = 50_000
PAPER_STEPS = 250
CPU_BOUND, GPU_BOUND = 1.0, 4.0
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


def main() -> int:
    """Exit status 0 if ours reaches the bound of this device, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--quick", action="store_true", help="2 steps, 3 rounds")
    parser.add_argument("--model", default="DiT-XL/2" if gpu else "DiT-S/2", help="preset, 4×32×32 latents")
    parser.add_argument("--batch-size", type=int, default=64 if gpu else 4)
    parser.add_argument("--steps", type=int, default=20 if gpu else 3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu)
    given = parser.parse_args()
    race = Race(
        model=given.model,
        batch_size=given.batch_size,
        steps=2 if given.quick else given.steps,
        rounds=3 if given.quick else given.rounds,
        device=given.device,
        compiled=given.compile,
    )
    bound = CPU_BOUND if race.device == "cpu" else GPU_BOUND
    return 0 if run(race) >= bound else 1


def run(race: Race) -> float:
    """The ratio of the plain loop's median time to ours, printed with what it means."""
    ours, plain = DiT.from_preset(race.model), PlainDiT(DiT.from_preset(race.model).config)
    fill_both(ours, plain)
    vae = load_vae("demo", device=race.device)
    labels = np.arange(race.batch_size) % ours.config.num_classes
    share = modulation_share(ours)
    generator = our_side(ours, vae, race)
    plain = plain.to(race.device).eval()

    def run_ours() -> NDArray[np.uint8]:
        return generator.pixels(generator.latents(0, labels))

    def run_plain() -> NDArray[np.uint8]:
        with torch.device(race.device):
            return plain_loop(plain, vae, labels, race)

    apart = np.abs(run_ours().astype(int) - run_plain()).max()  # this also warms both up
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for i in range(race.rounds):
        for name in ("plain", "ours") if i % 2 == 0 else ("ours", "plain"):
            times[name].append(seconds(run_plain if name == "plain" else run_ours))
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = median["plain"] / median["ours"]
    print(f"{race.model}, batch {race.batch_size}, {race.steps} steps, guidance {GUIDANCE} on {race.device}")
    for name in ("plain", "ours"):
        per_image = median[name] / race.steps * PAPER_STEPS / race.batch_size
        hours = per_image * FIFTY_THOUSAND / 3600
        print(
            f"  {name:5}  {median[name]:8.2f} s ({min(times[name]):.2f} … {max(times[name]):.2f})   "
            f"{1 / per_image:10.4f} images/s at {PAPER_STEPS} steps   {hours:10.1f} h for 50k"
        )
    print(f"  ratio  {ratio:.2f} over {race.rounds} rounds in turns; pixels differ by at most {apart} levels")
    print(f"  modulation and conditioning are {share:.1%} of a forward pass: the most that sharing them could save")
    return ratio


def our_side(model: DiT, vae: Vae, race: Race) -> Generator:
    """What `dit-sample` builds on this device by default, and compiled if asked for."""
    process = GaussianDiffusion()
    info = {"vae": vae.describe()}
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
        t = torch.tensor([i] * len(x))

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


def modulation_share(model: DiT) -> float:
    """Share of a forward pass that depends on (timestep, class) alone, by multiply-adds."""
    config = model.config
    parameters = dict(model.named_parameters())
    shared = sum(p.numel() for name, p in parameters.items() if "modulation" in name or "t_embedder" in name)
    per_token = sum(p.numel() for name, p in parameters.items() if "attn" in name or "mlp.fc" in name)
    attention = config.depth * 2 * config.tokens * config.hidden_size
    return shared / (shared + config.tokens * (per_token + attention))


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call; it ends with the pixels on the CPU."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
