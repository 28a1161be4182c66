"""Training steps, samplers and the decoder traced on the card that computes nothing; the findings as JSON.

python traces.py LIBGUARD.so [item|cpu|double]     with one of the three, a fault is put into the training step
"""

import json
import sys
from types import SimpleNamespace

# isort: off
from card import CARD, FakeTensorMode, RealOnCpu, Trace, keyed_generators_on_the_card, moved, torch  # before torch

# isort: on
import numpy as np
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipeline import randomness
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoint.averages import MovingAverage
from pipeline.diffusion import GaussianDiffusion, RectifiedFlow, make_process
from pipeline.diffusion.samplers import SAMPLERS
from pipeline.diffusion.schedules import tables_of
from pipeline.dit import DiT, DiTConfig
from pipeline.dit.memory import StepSettings, step_memory
from sample import generate
from train import loop, losses
from train.checkpointing import TrainState
from train.data import Batch, BatchShard
from train.distributed import Hardware
from train.optimizer import Optimizer
from train.options import OptimizerOptions
from train.parallel import parallelize

SPOILED = sys.argv[2] if len(sys.argv) > 2 else None
VARIANTS = {
    "as it is": {},
    "fp16": {"precision": "fp16"},
    "float32": {"precision": "no"},
    "not clipped": {"clip": None},
    "accumulation": {"accumulation": 2},
    "checkpointing": {"checkpointing": True},
    "flow": {"objective": "flow"},
    "cross-attention": {"conditioning": "cross-attention"},
    "in-context": {"conditioning": "in-context"},
    "adaln": {"conditioning": "adaln"},
    "qk-norm": {"qk_norm": True},
}


def network(config):
    with unset_fake_temporarily(), torch.device("meta"):
        made = DiT(config, seed=None)
    return moved(made)


FITS = {
    "XL/2": {"preset": "DiT-XL/2"},
    "XL/2 at 512 px, checkpointing": {"preset": "DiT-XL/2", "side": 64, "batch": 4, "checkpointing": True},
    "L/4": {"preset": "DiT-L/4", "batch": 64},
    "B/8 in float32": {"preset": "DiT-B/8", "batch": 256, "precision": "no"},
    "cross-attention in float32": {"batch": 32, "precision": "no", "conditioning": "cross-attention"},
    "adaln in float32": {"batch": 32, "precision": "no", "conditioning": "adaln"},
    "in-context in float32": {"batch": 32, "precision": "no", "conditioning": "in-context"},
    "qk-norm in float32": {"batch": 32, "precision": "no", "qk_norm": True},
    "B/2 in float32, checkpointing": {"preset": "DiT-B/2", "batch": 32, "precision": "no", "checkpointing": True},
}
"""Steps beside VARIANTS whose memory is compared with the formula."""


def trainer(
    *, preset="DiT-S/2", side=32, precision="bf16", clip=1.0, accumulation=1, checkpointing=False, objective="ddpm",
    batch=8, **config,
):  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="no", device_placement=False)
    PartialState._shared_state["device"] = AcceleratorState._shared_state["device"] = CARD
    AcceleratorState._shared_state["_mixed_precision"] = precision
    accelerator.native_amp = precision != "no"
    hardware = Hardware(
        accelerator=accelerator, device=CARD, precision=precision, reason="", rank=0, processes=1, hosts=None
    )
    process = make_process({"objective": objective})
    config = DiTConfig.from_preset(preset, input_size=side, learn_sigma=process.learns_variance, **config)
    made = network(config)
    made.gradient_checkpointing = checkpointing
    placement = parallelize(made, hardware, "none")
    options = OptimizerOptions(batch_size=batch, clip_norm=clip)
    optimizer = Optimizer(placement.weights, options, scaled=precision == "fp16", add_up=placement.add_up)
    averages = {"ema": MovingAverage(placement.weights, decay=0.9999)}
    return SimpleNamespace(
        options=SimpleNamespace(data=SimpleNamespace(seed=0), optimizer=options),
        hardware=hardware,
        process=process,
        normalization=losses.LatentNormalization(kind="moments", scaling_factor=0.18215, shift_factor=None),
        state=TrainState(placement=placement, optimizer=optimizer, averages=averages),
        shard=BatchShard(batch_size=batch, accumulation=accumulation),
        config=config,
    )


def batch_of(made, number):
    rows, side = made.shard.local_size, made.config.height
    latents = torch.empty(rows, 8, side, side, dtype=torch.float16, device=CARD)
    return Batch(number=number, latents=latents, labels=torch.empty(rows, dtype=torch.int64, device=CARD))


def training_step(*, with_losses=False, **variant):
    """A step after two others: what it launches, reads and uploads, and the most bytes that were alive in it."""
    tables_of.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=False):
        made = trainer(**variant)
        for number in range(2):
            loop.train_step(made, batch_of(made, number), with_losses=False)
            made.state.step += 1
        with Trace() as trace:
            trace.hold(made.state.placement.weights, made.state.averages["ema"].tensors)
            trace.hold(list(made.state.optimizer.adam_state().values()))
            fixed = trace.alive
            loop.train_step(made, batch_of(made, 2), with_losses=with_losses)
        images = made.shard.micro_size
    settings = {
        name: value for name, value in variant.items() if name in {"precision", "accumulation", "checkpointing"}
    }
    formula = sum(step_memory(made.config, StepSettings(images=images, **settings)).values())
    return found(trace) | {"fixed": fixed, "formula": formula}


def found(trace):
    return {
        "kernels": trace.kernels.total(),
        "reads": dict(trace.reads),
        "uploads": dict(trace.uploads),
        "peak": trace.peak,
    }


def sampling(name, steps):
    """The latents of four images on the card: waits and kernels."""
    tables_of.cache_clear()
    with RealOnCpu():
        process = RectifiedFlow() if SAMPLERS[name].objective == "flow" else GaussianDiffusion()
        config = DiTConfig.from_preset("DiT-S/2", learn_sigma=process.learns_variance)
        made = network(config).requires_grad_(False)
        made.to = lambda *_, **__: made
        info = {"vae": {"scaling_factor": 0.18215, "shift_factor": None}}
        checkpoint = Checkpoint(model=made, config=config, info=info, process=process, weights="ema", folder=None)
        plan = generate.ReversePlan(
            sampler=name, steps=steps, eta=0.0, guidance=4.0, channels=None, interval=None, seed=0, batch_size=4,
            precision="bf16",
        )  # fmt: skip
        generator = generate.Generator(checkpoint, plan, device="cuda:0", vae=None)
        with Trace() as trace:
            try:
                generator.latents(0, np.zeros(4, dtype=np.int64))
            except Exception as error:
                if type(error).__name__ not in {"DataDependentOutputException", "DynamicOutputShapeException"}:
                    raise
    return found(trace)


def spoil(how):
    real = losses.sample_losses

    def spoiled(model, process, *rest, **options):
        made = real(model, process, *rest, **options)
        if how == "item":
            made["loss"].mean().item()
        elif how == "cpu":
            made = {**made, "loss": made["loss"] * torch.ones(len(made["loss"]))}
        else:
            kept.extend(torch.empty(1 << 27, device=CARD) for _ in range(2))
        return made

    kept = []
    loop.sample_losses = spoiled


if __name__ == "__main__":
    keyed_generators_on_the_card(randomness, losses)
    if SPOILED is not None:
        spoil(SPOILED)
        print(json.dumps(training_step()))
    else:
        steps = {name: training_step(**variant) for name, variant in VARIANTS.items()}
        samplers = {name: [sampling(name, steps) for steps in (4, 5)] for name in SAMPLERS}
        logged = training_step(with_losses=True)
        fits = {name: training_step(**settings) for name, settings in FITS.items()}
        print(json.dumps({"steps": steps, "logged": logged, "samplers": samplers, "fits": fits}))
