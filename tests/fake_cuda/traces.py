"""Training steps traced on the card that computes nothing; the findings as JSON.

python traces.py LIBGUARD.so [item|cpu|double]     with one of the three, a fault is put into the training step
"""

import json
import sys
from types import SimpleNamespace

# isort: off
from card import CARD, FakeTensor, FakeTensorMode, Trace, keyed_generators_on_the_card, moved, torch  # before torch

# isort: on
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipeline import randomness
from pipeline.checkpoint.averages import MovingAverage, PowerAverage
from pipeline.diffusion import make_process
from pipeline.diffusion.schedules import tables_of
from pipeline.dit import DiT, DiTConfig
from pipeline.dit.config import BLOCKS
from pipeline.dit.memory import StepSettings, step_memory
from pipeline.features.pca import Projection
from pipeline.features.targets import FeatureTargets, TokenNormalization
from train import loop, losses
from train.checkpointing import TrainState
from train.data import Batch, BatchShard
from train.distributed import Hardware
from train.optimizer import Optimizer
from train.options import ModelOptions, OptimizerOptions
from train.parallel import parallelize

SPOILED = sys.argv[2] if len(sys.argv) > 2 else None
MODERN = BLOCKS["modern"]
VARIANTS = {
    "as it is": {},
    "fp16": {"precision": "fp16"},
    "float32": {"precision": "no"},
    "not clipped": {"clip": None},
    "muon": {"muon": True},
    "accumulation": {"accumulation": 2},
    "checkpointing": {"checkpointing": True},
    "flow": {"objective": "flow"},
    "cross-attention": {"conditioning": "cross-attention"},
    "in-context": {"conditioning": "in-context"},
    "adaln": {"conditioning": "adaln"},
    "qk-norm": {"qk_norm": True},
    "modern": MODERN,
    "middle head and alignment": {"middle_head": True, "align_latent": True},
    "class token": {"class_token": 768},
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
    "XL/2 by Muon": {"preset": "DiT-XL/2", "muon": True},
    "L/2 by Muon, checkpointing": {"preset": "DiT-L/2", "muon": True, "checkpointing": True},
    "qk-norm in float32": {"batch": 32, "precision": "no", "qk_norm": True},
    "modern in float32": {"batch": 32, "precision": "no", **MODERN},
    "modern XL/2, checkpointing": {"preset": "DiT-XL/2", "checkpointing": True, **MODERN},
    "modern by Muon": {"batch": 32, "muon": True, **MODERN},
    "wide head": {"batch": 16, "head_width": 1536},
    "wide head in float32": {"batch": 16, "precision": "no", "head_width": 1536, "head_depth": 3},
    "wide head, checkpointing": {"batch": 16, "checkpointing": True, "head_width": 1536, "head_depth": 3},
    "B/2 in float32, checkpointing": {"preset": "DiT-B/2", "batch": 32, "precision": "no", "checkpointing": True},
}
"""Steps beside VARIANTS whose memory is compared with the formula."""


def trainer(
    *, preset="DiT-S/2", side=32, precision="bf16", clip=1.0, accumulation=1, checkpointing=False, objective="ddpm",
    batch=8, muon=False, more=False, **config,
):  # fmt: skip
    """A run's parts on the card; with `more` what is read off an encoder too, another average, factors per channel."""
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
    placement = parallelize(made, hardware, 1)
    options = OptimizerOptions(batch_size=batch, clip_norm=clip, optimizer="muon" if muon else "adamw")
    optimizer = Optimizer(
        placement.weights, options, scaled=precision == "fp16", add_up=placement.add_up, shapes=placement.shapes,
        shared_out=placement.shared_out,
    )  # fmt: skip
    averages = {"ema": MovingAverage(placement.weights, decay=0.9999)}
    if more:
        averages["power"] = PowerAverage(placement.weights, sigma=0.05)
    return SimpleNamespace(
        options=SimpleNamespace(
            data=SimpleNamespace(seed=0),
            optimizer=options,
            model=ModelOptions(
                middle_head=config.middle_head,
                align_latent=config.align_latent,
                align_features=config.align_features > 0,
                class_token=config.class_token > 0,
            ),
        ),
        hardware=hardware,
        process=process,
        normalization=losses.LatentNormalization(
            kind="moments",
            scaling_factor=torch.empty(4, device=CARD) if more else 0.18215,
            shift_factor=torch.empty(4, device=CARD) if more else None,
        ),
        state=TrainState(placement=placement, optimizer=optimizer, averages=averages),
        shard=BatchShard(batch_size=batch, accumulation=accumulation),
        features_of=lambda batch, rows: targets().of(batch.features[rows]) if more else None,
        class_token_of=lambda batch, rows: fed(config).of(batch.cls[rows]) if config.class_token else None,
        config=config,
    )


def targets():
    """DINOv2-S/14's 16 × 16 patches of 64 numbers, for the network's tokens."""
    projection = Projection(mean=torch.empty(384, device=CARD), components=torch.empty(64, 384, device=CARD))
    encoder = SimpleNamespace(grid=(16, 16))
    return FeatureTargets(
        store=SimpleNamespace(manifest=SimpleNamespace(encoder=encoder)), projection=projection, grid=(8, 8)
    )


def fed(config):
    return TokenNormalization(mean=torch.empty(config.class_token, device=CARD), std=torch.empty((), device=CARD))


def batch_of(made, number):
    rows, side = made.shard.local_size, made.config.height
    latents = torch.empty(rows, 8, side, side, dtype=torch.float16, device=CARD)
    features = torch.empty(rows, 256, 64, dtype=torch.float16, device=CARD)
    labels = torch.empty(rows, dtype=torch.int64, device=CARD)
    cls = torch.empty(rows, made.config.class_token, dtype=torch.float16, device=CARD)
    return Batch(number=number, latents=latents, labels=labels, features=features, cls=cls)


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
            held = made.state.optimizer.state_tensors().values()
            trace.hold([[tensor for tensor in tensors if tensor is not None] for tensors in held])
            fixed = trace.alive
            result = loop.train_step(made, batch_of(made, 2), with_losses=with_losses)
        asked = numbers_asked_for(lambda: loop._read(made, result)) if with_losses else []
        images = made.shard.micro_size
    settings = {
        name: value for name, value in variant.items() if name in {"precision", "accumulation", "checkpointing", "muon"}
    }
    formula = sum(step_memory(made.config, StepSettings(images=images, **settings)).values())
    return found(trace) | {
        "fixed": fixed,
        "formula": formula,
        "averaging": trace.kernels["aten._fused_sgd_.default"],
        "asked": asked,
    }


def numbers_asked_for(work):
    """The devices whose values Python reads as lists; anything else that it reads ends the trace."""
    real, devices = FakeTensor.tolist, []

    def tolist(tensor):
        devices.append(tensor.device.type)
        return [1.0] * tensor.numel()

    FakeTensor.tolist = tolist
    with Trace() as trace:
        work()
    FakeTensor.tolist = real
    assert not trace.reads and not trace.uploads
    return devices


def found(trace):
    return {
        "kernels": trace.kernels.total(),
        "reads": dict(trace.reads),
        "uploads": dict(trace.uploads),
        "peak": trace.peak,
    }


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
        logged = training_step(with_losses=True)
        more = training_step(more=True, preset="DiT-S/4", align_features=384, muon=True, **MODERN)
        fits = {name: training_step(**settings) for name, settings in FITS.items()}
        print(json.dumps({"steps": steps, "logged": logged, "more": more, "fits": fits}))
