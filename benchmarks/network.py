"""Is the network as fast as a plain PyTorch writing of it? Run `python -m benchmarks.network [--quick]`.

Prints, per model, the median over interleaved pairs of (plain time / our time) for one forward and backward pass in
float32 on this machine: above 1 ours is faster. Both hold the same weights, and their outputs are compared first.
"""

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor, nn

from benchmarks.plain_dit import PlainDiT
from pipeline import randomness
from pipeline.dit import DiT, DiTConfig

BOUND = 0.95
_NAMES = {
    "x_embedder.proj": "patches",
    "t_embedder.mlp": "time",
    "y_embedder.embedding_table": "label",
    "final_layer.adaLN_modulation": "modulation",
    "final_layer.linear": "out",
    "adaLN_modulation": "modulation",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


def main() -> int:
    """Exit status 0 if every median reaches the bound, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="S/2 alone, 7 pairs")
    parser.add_argument("--pairs", type=int, default=11, help="interleaved pairs per model (default 11)")
    parser.add_argument("--batch-size", type=int, default=2, help="samples per pass (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1, which other work disturbs least)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = ("DiT-S/2",) if arguments.quick else ("DiT-S/2", "DiT-B/4")
    pairs = 7 if arguments.quick else arguments.pairs
    medians = [compare(name, pairs, arguments.batch_size) for name in models]
    return 0 if min(medians) >= BOUND else 1


def compare(name: str, pairs: int, batch_size: int) -> float:
    """The median ratio for one model, printed with its spread."""
    ours = DiT.from_preset(name)
    plain = PlainDiT(ours.config)
    _fill(ours, plain)
    inputs = _inputs(ours.config, batch_size)
    difference = (ours(*inputs) - plain(*inputs)).abs().max().item()
    times = [_pair(plain, ours, inputs, plain_first=i % 2 == 0) for i in range(pairs + 1)][1:]  # the first warms up
    ratios = [of_plain / of_ours for of_plain, of_ours in times]
    plain_ms, ours_ms = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    median = statistics.median(ratios)
    print(
        f"{name}  batch {batch_size}  plain {plain_ms:.0f} ms  ours {ours_ms:.0f} ms  ratio {median:.3f} "
        f"({min(ratios):.3f} … {max(ratios):.3f}, {pairs} pairs; at least {BOUND} wanted)  "
        f"outputs differ by {difference:.1e}",
        flush=True,
    )
    return median


def _fill(ours: DiT, plain: PlainDiT) -> None:
    """Random weights in both, none of them zero, so that nothing is skipped and the outputs can be compared."""
    draws = randomness.generator(0, "benchmark weights")
    weights = {name: 0.02 * torch.randn(p.shape, generator=draws) for name, p in ours.named_parameters()}
    ours.load_state_dict(weights)
    renamed = {_plain_name(name): value for name, value in weights.items()}
    plain.load_state_dict({**renamed, "position": ours.pos_embed})


def _plain_name(name: str) -> str:
    for part, replacement in _NAMES.items():
        if part in name:
            return name.replace(part, replacement)
    return name


def _inputs(config: DiTConfig, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = randomness.generator(0, "benchmark inputs")
    x = torch.randn(batch_size, config.in_channels, config.height, config.width, generator=draws)
    t = torch.randint(1000, (batch_size,), generator=draws)
    return x, t, torch.randint(config.num_classes, (batch_size,), generator=draws)


def _pair(
    plain: PlainDiT, ours: DiT, inputs: tuple[Tensor, Tensor, Tensor], *, plain_first: bool
) -> tuple[float, float]:
    """(plain, our) seconds; the order alternates, so that a machine that slows down favours neither."""
    if plain_first:
        return _seconds(plain, inputs), _seconds(ours, inputs)
    of_ours = _seconds(ours, inputs)
    return _seconds(plain, inputs), of_ours


def _seconds(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Time of one forward and backward pass; on one thread CPU time, which leaves out what other programs take."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    model.zero_grad(set_to_none=True)
    start = clock()
    model(*inputs).square().mean().backward()
    return clock() - start


if __name__ == "__main__":
    sys.exit(main())
