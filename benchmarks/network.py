"""The network's forward pass, and forward and backward, against a plain writing of it.

On a CPU both are eager float32. On a GPU ours runs as training runs it, compiled by blocks under bfloat16 autocast, the
plain one eager in float32 with TF32 products.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.machine import Setting
from benchmarks.plain_dit import PlainDiT
from benchmarks.report import Pieces, Row
from benchmarks.timing import device_seconds_of, interleaved, rates, ratios, release
from pipeline import randomness
from pipeline.dit import DiT, DiTConfig, compile_blocks
from pipeline.dit.macs import count_macs
from pipeline.runtime.devices import float32_products

CPU_BOUND = 0.95
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One network."""

    model: str
    side: int = 32
    """Latent cells along one side."""
    batch_size: int


def cases(setting: Setting) -> list[Case]:
    """What is measured on this device."""
    if setting.quick:
        return [Case(model="DiT-Ti/2", side=16, batch_size=2)]
    if setting.on_gpu:
        return [Case(model="DiT-XL/2", batch_size=64), Case(model="DiT-XL/2", side=64, batch_size=16)]
    return [Case(model="DiT-S/2", batch_size=2), Case(model="DiT-B/4", batch_size=2)]


def pieces(setting: Setting) -> Pieces:
    """Per network two rows: forward, and forward with backward."""
    return {f"{case.model} at {8 * case.side} px": partial(_compare, case, setting) for case in cases(setting)}


@contextlib.contextmanager
def networks(case: Case, setting: Setting) -> Iterator[tuple[DiT, PlainDiT, tuple[Tensor, Tensor, Tensor]]]:
    """Ours and the plain one with the same weights, and inputs for both, on the device."""
    ours = DiT.from_preset(case.model, input_size=case.side)
    plain = PlainDiT(ours.config)
    fill_both(ours, plain)
    inputs = tuple(tensor.to(setting.device) for tensor in draw_inputs(ours.config, case.batch_size))
    torch.compiler.reset()  # or another case's shapes would make dynamo compile for any shape, which is slower
    try:
        with float32_products(setting.device, tf32=True):
            yield ours.to(setting.device), plain.to(setting.device), inputs  # type: ignore[misc]
    finally:
        del ours, plain
        release(setting.device)


def precision_of_ours(setting: Setting) -> contextlib.AbstractContextManager[object]:
    """The arithmetic that training takes on this device by default."""
    return torch.autocast("cuda", torch.bfloat16) if setting.on_gpu else contextlib.nullcontext()


def _compare(case: Case, setting: Setting) -> list[Row]:
    flops = 2.0 * count_macs(DiT.from_preset(case.model, input_size=case.side).config)
    precision = "bf16" if setting.on_gpu else "fp32"
    rows = []
    with networks(case, setting) as (ours, plain, inputs):
        if setting.on_gpu:
            compile_blocks(ours)

        def forward(model: nn.Module) -> None:
            with torch.no_grad(), precision_of_ours(setting) if model is ours else contextlib.nullcontext():
                model(*inputs)

        def both_ways(model: nn.Module) -> None:
            model.zero_grad(set_to_none=True)
            with precision_of_ours(setting) if model is ours else contextlib.nullcontext():
                out = model(*inputs)
            out.float().square().mean().backward()

        for name, work, passes in (("forward", forward, 1), ("forward and backward", both_ways, 3)):
            times = interleaved(
                {"plain": lambda work=work: work(plain), "ours": lambda work=work: work(ours)},  # type: ignore[misc]
                rounds=setting.rounds(7),
                device=setting.device,
                warm_ups=2 if setting.on_gpu else 1,
                calls=3 if setting.on_gpu and not setting.quick else 1,
                clock=device_seconds_of,
            )
            rows.append(
                Row(
                    what=f"{case.model} at {8 * case.side} px, batch {case.batch_size}, {name}",
                    unit="images/s",
                    ours=rates(times["ours"], case.batch_size),
                    plain=rates(times["plain"], case.batch_size),
                    ratio=ratios(times),
                    limit=setting.ceilings.matmul(precision) / (passes * flops),
                    limit_name=f"{precision} matmul",
                    wanted_ratio=None if setting.on_gpu or setting.quick or passes == 1 else CPU_BOUND,
                )
            )
    return rows


def fill_both(ours: DiT, plain: PlainDiT) -> None:
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


def draw_inputs(config: DiTConfig, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = randomness.generator(0, "benchmark inputs")
    x = torch.randn(batch_size, config.in_channels, config.height, config.width, generator=draws)
    t = torch.randint(1000, (batch_size,), generator=draws)
    return x, t, torch.randint(config.num_classes, (batch_size,), generator=draws)
