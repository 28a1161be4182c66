"""Does a device compute what a CPU computes in float64? The network's outputs, its gradients and the losses.

Every row is the greatest difference, as a share of the greatest value, between the device in one precision and float64
on the CPU. What each must stay below follows from its rounding (2⁻²⁴, 2⁻¹¹, 2⁻⁹) and the network's depth.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.machine import Setting
from benchmarks.report import Pieces, Row
from benchmarks.timing import release, spread
from pipeline import randomness
from pipeline.diffusion.process import OBJECTIVES, make_process
from pipeline.dit import DiT, compile_blocks
from pipeline.runtime.devices import float32_products

BOUNDS = {"float32": 1e-4, "TF32": 2e-2, "bf16": 5e-2}


def pieces(setting: Setting) -> Pieces:
    """Per network and precision: forward, backward, and the losses of every objective."""
    model = "DiT-XL/2" if setting.on_gpu and not setting.quick else "DiT-Ti/2"
    precisions = ("float32", "TF32", "bf16", "bf16, compiled") if setting.on_gpu else ("float32", "bf16")
    return {f"{model} {precision}": partial(_compare, model, precision, setting) for precision in precisions}


def _compare(model: str, precision: str, setting: Setting) -> list[Row]:
    exact_network = DiT.from_preset(model, input_size=8 if setting.quick else 32)
    _fill(exact_network)
    network = DiT(exact_network.config, seed=None).to(setting.device)
    network.load_state_dict(exact_network.state_dict())
    if precision.endswith("compiled"):
        compile_blocks(network)
    arithmetic = precision.partition(",")[0]
    exact = _results(exact_network.double(), torch.device("cpu"))
    with (
        float32_products(setting.device, tf32=arithmetic == "TF32"),
        torch.autocast(setting.device.type, torch.bfloat16, enabled=arithmetic == "bf16"),
    ):
        found = _results(network, setting.device)
    release(setting.device)
    return [
        Row(
            what=f"{model}, {precision} on {setting.device.type} against float64: {name}",
            unit="",
            ours=spread([_difference(found[name], exact[name])]),
            wanted_at_most=BOUNDS[arithmetic],
        )
        for name in exact
    ]


def _fill(network: DiT) -> None:
    """Random weights, none of them zero, so that every branch counts."""
    draws = randomness.generator(0, "parity weights")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draws, device="cpu"))


def _results(network: DiT, device: torch.device) -> dict[str, Tensor]:
    """What is compared, of inputs that are the same everywhere."""
    config = network.config
    dtype = next(network.parameters()).dtype
    shape = (2, config.in_channels, config.height, config.width)
    x, noise = (randomness.normal(shape, 0, "parity", k).to(device, dtype) for k in range(2))
    t, y = torch.tensor([10, 700], device=device), torch.tensor([1, 3], device=device)
    found = {}
    out = network(x, t, y)
    found["forward"] = out.detach().double().cpu()
    out.double().square().mean().backward()
    gradients = [p.grad.detach().double().flatten().cpu() for p in network.parameters() if p.grad is not None]
    found["gradients"] = torch.cat(gradients)
    with torch.no_grad():
        for name in OBJECTIVES:
            process = make_process({"objective": name})
            channels = (2 if process.learns_variance else 1) * config.in_channels
            drawn = process.draw_timesteps(2, randomness.generator(0, "parity timesteps")).to(device)

            def denoise(x_t: Tensor, s: Tensor, channels: int = channels) -> Tensor:
                return network(x_t.to(dtype), s, y)[:, :channels]

            losses = process.training_losses(denoise, x, drawn, noise)
            found[f"loss of {name}"] = losses["loss"].double().cpu()
    return found


def _difference(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())
