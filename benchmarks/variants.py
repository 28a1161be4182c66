"""What was tried for the network's forward and backward pass on a GPU, each against the way training takes.

Every entry is a prediction put to the test: compilation and CUDA graphs, the attention kernels, activations computed
again. On a CPU only compilation is tried, which gave no resolved gain there.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import Setting
from benchmarks.network import Case, networks, precision_of_ours
from benchmarks.report import Pieces, Row
from benchmarks.timing import device_seconds_of, interleaved, peak_bytes, rates, ratios, release, seconds_of
from benchmarks.train import our_step, write_data
from pipeline.dit import DiT, compile_blocks

Around = Callable[[], AbstractContextManager[Any]]
BASE = "blocks compiled"


def variants() -> dict[str, tuple[dict[str, Any] | None, Around, bool]]:
    """Name → (options of torch.compile or None, what to compute within, whether to compute activations again)."""

    def attention(backend: SDPBackend) -> Around:
        return lambda: sdpa_kernel(backend)

    none = contextlib.nullcontext
    # Without an option of its own a variant would be given the code that was compiled for the usual way.
    own = {"options": {"triton.unique_kernel_names": True}}
    return {
        BASE: ({}, none, False),
        "eager": (None, none, False),
        "CUDA graphs (reduce-overhead)": ({"mode": "reduce-overhead"}, none, False),
        "tuned products (max-autotune-no-cudagraphs)": ({"mode": "max-autotune-no-cudagraphs"}, none, False),
        "attention: flash": (own, attention(SDPBackend.FLASH_ATTENTION), False),
        "attention: cuDNN": (own, attention(SDPBackend.CUDNN_ATTENTION), False),
        "attention: memory-efficient": (own, attention(SDPBackend.EFFICIENT_ATTENTION), False),
        "gradient checkpointing": ({}, none, True),
    }


def pieces(setting: Setting) -> Pieces:
    """Per variant its rate, and the rate of the usual way in the same rounds; on a CPU the compiled training step."""
    if not setting.on_gpu:
        return {} if setting.quick else {"training step compiled": partial(_compiled_step, setting)}
    case = Case(model="DiT-Ti/2", batch_size=4) if setting.quick else Case(model="DiT-XL/2", batch_size=64)
    return {name: partial(_against_base, name, case, setting) for name in variants() if name != BASE}


def _compiled_step(setting: Setting) -> list[Row]:
    """The whole step of S/2 compiled, beside the eager one."""
    model, size = "DiT-S/2", 4
    write_data(setting.folder)
    with (
        our_step(model, setting.folder, size) as eager,
        our_step(model, setting.folder, size, compiled=True) as compiled,
    ):
        first_seconds = seconds_of(compiled)
        times = interleaved({"plain": eager, "ours": compiled}, rounds=9)
    return [
        Row(
            what=f"{model} at 256 px, batch {size}, whole training step: compiled",
            unit="images/s",
            ours=rates(times["ours"], size),
            plain=rates(times["plain"], size),
            ratio=ratios(times),
            note=f"“plain” is: eager; the first step takes {first_seconds:.0f} s",
        )
    ]


def _against_base(name: str, case: Case, setting: Setting) -> list[Row]:
    with networks(case, setting) as (base, _, inputs):
        other = DiT(base.config, seed=None).to(setting.device)
        other.load_state_dict(base.state_dict())
        works = {}
        for role, network, variant in (("plain", base, BASE), ("ours", other, name)):
            options, around, again = variants()[variant]
            network.gradient_checkpointing = again
            if options is not None:
                compile_blocks(network, **options)
            works[role] = _both_ways(network, inputs, around, setting)
        times = interleaved(
            works,
            rounds=setting.rounds(3),
            device=setting.device,
            warm_ups=2,
            calls=1 if setting.quick else 3,
            clock=device_seconds_of,
        )
        peaks = [
            peak_bytes(lambda role=role: contextlib.nullcontext(works[role]), setting.device)  # type: ignore[misc]
            for role in ("ours", "plain")
        ]
    release(setting.device)
    row = Row(
        what=f"{case.model} at 256 px, batch {case.batch_size}, forward and backward: {name}",
        unit="images/s",
        ours=rates(times["ours"], case.batch_size),
        plain=rates(times["plain"], case.batch_size),
        ratio=ratios(times),
        ours_bytes=peaks[0],
        plain_bytes=peaks[1],
        note=f"“plain” is: {BASE}",
    )
    return [row]


def _both_ways(network: DiT, inputs: Any, around: Around, setting: Setting) -> Callable[[], None]:
    def work() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        network.zero_grad(set_to_none=True)
        with around():
            with precision_of_ours(setting):
                out = network(*inputs)
            out.float().square().mean().backward()

    return work
