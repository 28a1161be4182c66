"""The network's forward pass, and forward and backward, against a plain writing of it.

On a CPU both are eager float32. On a GPU ours runs as training runs it, compiled by blocks under bfloat16 autocast, the
plain one eager in float32 with TF32 products.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.network import _fill as fill_both
from benchmarks.network import _inputs as draw_inputs
from benchmarks.plain_dit import PlainDiT
from benchmarks.report import Row
from benchmarks.suite.setting import Setting
from benchmarks.timing import device_seconds_of, interleaved, rates, ratios, release
from pipeline.dit import DiT, compile_blocks
from pipeline.dit.macs import count_macs

CPU_BOUND = 0.95


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


def measure(setting: Setting) -> list[Row]:
    """Two rows per network: forward, and forward with backward."""
    return [row for case in cases(setting) for row in _compare(case, setting)]


@contextlib.contextmanager
def networks(case: Case, setting: Setting) -> Iterator[tuple[DiT, PlainDiT, tuple[Tensor, Tensor, Tensor]]]:
    """Ours and the plain one with the same weights, and inputs for both, on the device."""
    ours = DiT.from_preset(case.model, input_size=case.side)
    plain = PlainDiT(ours.config)
    fill_both(ours, plain)
    inputs = tuple(tensor.to(setting.device) for tensor in draw_inputs(ours.config, case.batch_size))
    torch.compiler.reset()  # or another case's shapes would make dynamo compile for any shape, which is slower
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield ours.to(setting.device), plain.to(setting.device), inputs  # type: ignore[misc]
    finally:
        torch.set_float32_matmul_precision(kept)
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
                calls=3 if setting.on_gpu else 1,
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
