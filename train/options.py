"""The options of `dit-train`, in the groups that the parts of the stage read. No torch: `--help` must be quick."""

import math
import re
import typing
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import tyro

from pipeline.diffusion.process import (
    OBJECTIVES_HELP,
    FlowPath,
    Loss,
    Objective,
    Prediction,
    Schedule,
    TimestepLaw,
    Variance,
)
from pipeline.dit.config import BlockOptions
from pipeline.runtime.cli import flag_values
from pipeline.runtime.errors import UserError

EMA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Order = Literal["scattered", "runs"]
Sharding = Literal["none", "fsdp"]

T = TypeVar("T")
_FREE: Final = "may change when a run goes on"
_START: Final = "may change once there is a checkpoint"
Free = Annotated[T, _FREE]
"""Of a flag that changes what a run writes or how fast it goes, not what it learns: it may change on resuming. Of the
store the contents are compared, not the path."""
Start = Annotated[T, _START]
"""Of a flag that decides where the weights start: it may change once there is a checkpoint."""


def _at_least(low: float, **values: float | None) -> None:
    """Refuse every value below `low`; None stands for "not given"."""
    for name, value in values.items():
        if value is not None and not value >= low:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least {low}")
        if value == math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} must be a finite number")


def _within(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} must lie between {low} and {high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """What is learned from, and in which order."""

    latents: Free[str]
    """Latent store written by dit-extract: a folder, or a URL such as s3://bucket/store."""
    cache: Free[Path | None] = None
    """Folder that keeps local copies of a remote store's shards."""
    order: Order = "scattered"
    """scattered permutes all samples; runs reads 16 neighbours at a time, for large stores on slow disks."""
    flip: bool = True
    """Use the store's mirrored views too, one view drawn per sample and step."""
    validation: Free[str | None] = None
    """Store of held-out images; its loss on fixed noise is logged."""
    validation_share: float = 0.0
    """Share of the training store to hold out for the validation loss, 0 to 0.5; none with --validation."""
    validate_every: Free[int] = 1000
    """Steps between two validation losses."""
    validation_samples: Free[int] = 1024
    """Held-out samples to use at most."""
    verify_data: Free[bool] = False
    """Compare every shard with its checksum before training."""
    prefetch: Free[int] = 4
    """Batches that a background thread reads ahead."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Data order, noise and starting weights all depend on this alone."""

    def __post_init__(self) -> None:
        _at_least(1, validate_every=self.validate_every, validation_samples=self.validation_samples)
        _at_least(1, prefetch=self.prefetch)
        _within(0, 0.5, validation_share=self.validation_share)
        if self.validation is not None:  # a store of its own makes the share of a preset superfluous
            object.__setattr__(self, "validation_share", 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions(BlockOptions):
    """Which network, and where its weights start."""

    model: str = "DiT-XL/2"
    """Network: DiT-{S,B,L,XL}/{2,4,8}, or DiT-Ti/2, a tiny one for trying things out."""
    class_dropout: float = 0.1
    """Share of labels replaced by the null class; guidance needs some. 0 for none."""
    init_from: Start[str | None] = None
    """Start from this checkpoint's weights: a run, a checkpoint folder, or any file dit-convert knows."""
    init_weights: Start[str] = "ema"
    """Which weights of --init-from to start from: ema, raw, or the NAME of another average."""
    verify_weights: Start[bool] = True
    """Compare the weights of --init-from with the checksums that were recorded for them."""
    allow_other_vae: Start[bool] = False
    """Accept an --init-from checkpoint made with another VAE or another latent scaling than the store's."""
    gradient_checkpointing: Free[bool] = False
    """Keep less of the forward pass and compute it again: about 30 % slower, much less memory."""
    compile: Free[bool] = False
    """Compile each block with torch.compile."""

    def __post_init__(self) -> None:
        _within(0, 1, class_dropout=self.class_dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveOptions:
    """What the network learns to predict, and how wrong it is told to be."""

    objective: Annotated[Objective, tyro.conf.arg(help=OBJECTIVES_HELP)] = "ddpm"
    noise_schedule: Schedule = "linear"
    """Noise schedule of ddpm over 1000 timesteps."""
    prediction: Prediction = "epsilon"
    """What ddpm predicts: the noise, the clean latent, or their velocity."""
    variance: Variance = "learned-range"
    """Reverse variance of ddpm; the learned one doubles the output channels."""
    loss: Loss = "mse"
    """Loss of ddpm. mse with a learned variance is the paper's hybrid loss."""
    timestep_law: TimestepLaw = "logit-normal"
    """How flow draws its times; sit and repa draw them uniformly."""
    flow_path: FlowPath = "linear"
    """How sit and repa mix data and noise; cosine is SiT's GVP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerOptions:
    """AdamW and its learning rate as a function of the step."""

    steps: Free[int] = 400_000
    """Optimizer steps in all, counted from the beginning of the run."""
    batch_size: int = 256
    """Samples per step over all processes and accumulation."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    lr_schedule: Literal["constant", "cosine", "inverse-sqrt"] = "constant"
    """constant; cosine from --lr to --lr-end over --decay-steps; inverse-sqrt: --lr / sqrt(step / --decay-steps) from there on."""
    decay_steps: int | None = None
    """Length of the schedule in steps. It is not --steps, so that training longer does not change the past."""
    lr_end: float = 0.0
    """Learning rate at the end of a cosine."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the gradient's first and second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip_norm: float | None = None
    """Largest gradient norm; a longer gradient is shortened to it. Default: not clipped."""
    max_skipped_in_a_row: Free[int] = 20
    """Steps in a row whose loss or gradient is not finite (each is skipped) before going back to a checkpoint."""
    max_rollbacks: Free[int] = 3
    """How often to go back before giving up."""

    def __post_init__(self) -> None:
        _at_least(1, steps=self.steps, batch_size=self.batch_size, decay_steps=self.decay_steps)
        _at_least(1, max_skipped_in_a_row=self.max_skipped_in_a_row)
        _at_least(0, lr=self.lr, lr_end=self.lr_end, lr_warmup_steps=self.lr_warmup_steps)
        _at_least(0, weight_decay=self.weight_decay, adam_eps=self.adam_eps, max_rollbacks=self.max_rollbacks)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"--clip-norm {self.clip_norm} must be above 0; leave the flag out for no clipping")
        if self.lr_schedule != "constant" and self.decay_steps is None:
            raise UserError(f"--lr-schedule {self.lr_schedule} needs --decay-steps, the schedule's length in steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas {self.betas[0]} {self.betas[1]} must both lie in 0 … 1, without 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageOptions:
    """Exponential moving averages of the weights, in float32."""

    ema_decay: float = 0.9999
    """Decay per step of the average that sampling uses."""
    ema_warmup: bool = False
    """Begin with a smaller decay, (1 + step) / (10 + step), for short runs."""
    extra_ema: tuple[str, ...] = ()
    """Further averages, each NAME=DECAY, written as ema-NAME.safetensors."""

    def __post_init__(self) -> None:
        _ = self.decays

    @property
    def decays(self) -> dict[str, float]:
        """{"ema": decay, "ema-NAME": decay, …}, the stems of the checkpoint's files."""
        decays = {"ema": self.ema_decay}
        for written in self.extra_ema:
            name, _, number = written.partition("=")
            try:
                decay = float(number)
            except ValueError as error:
                raise UserError(f"--extra-ema {written} must be NAME=DECAY, as in slow=0.99995") from error
            if not EMA_NAME.fullmatch(name) or name in {"raw", "ema"} or f"ema-{name}" in decays:
                raise UserError(f"--extra-ema {written}: the name {name!r} is taken or is no plain file name")
            decays[f"ema-{name}"] = decay
        for name, decay in decays.items():
            if not 0 <= decay < 1:
                raise UserError(f"the decay {decay} of {name} must lie in 0 … 1, without 1; see --ema-decay")
        return decays


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareOptions:
    """Where and how precisely the network is computed."""

    device: Free[str] = "auto"
    """auto takes an accelerator if there is one; else cpu, cuda or cuda:N (or another that PyTorch names: mps, xpu)."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the forward and backward pass; weights stay float32. Default bf16 on a GPU that has it, else no."""
    tf32: Free[bool] = True
    """Let float32 products on a GPU use TF32."""
    grad_accumulation: Free[int] = 1
    """Parts that each process cuts its share of a batch into, to need less memory; the batch stays the same."""
    sharding: Free[Sharding] = "none"
    """none copies the network to every process (DDP); fsdp divides weights, optimizer and averages among them (FSDP2)."""

    def __post_init__(self) -> None:
        _at_least(1, grad_accumulation=self.grad_accumulation)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Where the run lives, what it keeps, and when it stops."""

    out: Free[Path]
    """Run folder. If it already holds this run, training continues from its newest checkpoint."""
    overwrite: Free[bool] = False
    """Begin anew: remove the run that --out holds."""
    dry_run: Free[bool] = False
    """Say what would be trained and what each GPU would hold, then end; nothing is written."""
    anyway: Free[bool] = False
    """Go on although the GPU's memory or the disk seems too small."""
    save_every: Free[int] = 10_000
    """Steps between two checkpoints; one more is written at the end."""
    keep_last: Free[int] = 3
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: Free[int | None] = None
    """Keep every checkpoint at a multiple of this many steps for ever."""
    time_limit: Free[float | None] = None
    """Minutes after which to save and stop, for jobs with a time limit."""
    log_every: Free[int] = 10
    """Steps between two lines of metrics.jsonl."""
    tensorboard: Free[bool] = True
    """Write TensorBoard events to the run folder."""
    wandb_project: Free[str | None] = None
    """Log to this Weights & Biases project too."""

    def __post_init__(self) -> None:
        _at_least(1, save_every=self.save_every, keep_every=self.keep_every, log_every=self.log_every)
        _at_least(0, keep_last=self.keep_last, time_limit=self.time_limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewOptions:
    """Pictures drawn while training goes on."""

    sample_every: Free[int] = 10_000
    """Steps between two preview grids in RUN/samples; 0 draws none."""
    preview_classes: Free[int] = 8
    """Classes in the grid, one column each."""
    preview_rows: Free[int] = 2
    """Images of each class, from the raw and from the averaged weights alike."""
    preview_steps: Free[int] = 25
    """Steps of the sampler."""
    preview_guidance: Free[float] = 1.5
    """Guidance scale of the previews."""
    vae: Free[str | None] = None
    """VAE that decodes previews; default: the one that the store names."""

    def __post_init__(self) -> None:
        _at_least(0, sample_every=self.sample_every, preview_guidance=self.preview_guidance)
        _at_least(1, preview_classes=self.preview_classes, preview_rows=self.preview_rows)
        _at_least(1, preview_steps=self.preview_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Everything `dit-train` can be told."""

    data: DataOptions
    run: RunOptions
    model: ModelOptions = field(default_factory=ModelOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    average: AverageOptions = field(default_factory=AverageOptions)
    hardware: HardwareOptions = field(default_factory=HardwareOptions)
    preview: PreviewOptions = field(default_factory=PreviewOptions)
    recipe: Free[str | None] = None
    """Name of the packaged preset these settings follow; --config NAME sets it. Differences from it are reported."""


def may_change(options_class: type, *, with_checkpoint: bool) -> set[str]:
    """The flags that may have other values when a run goes on; each field says so itself."""
    marks = (_FREE, _START) if with_checkpoint else (_FREE,)
    names: set[str] = set()
    for name, hint in typing.get_type_hints(options_class, include_extras=True).items():
        if is_dataclass(hint):
            names |= may_change(typing.cast("type", hint), with_checkpoint=with_checkpoint)
        elif any(mark in marks for mark in getattr(hint, "__metadata__", ())):
            names.add(name.replace("_", "-"))
    return names


def plain_values(options: TrainOptions) -> dict[str, Any]:
    """Every flag with its value in plain YAML types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in flag_values(options).items()}
