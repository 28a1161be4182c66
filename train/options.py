"""The options of `dit-train`, in the groups that the parts of the stage read. No torch: `--help` must be quick."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import tyro
from msgspec import Meta

from pipeline.diffusion.process import (
    OBJECTIVES_HELP,
    FlowPath,
    FlowPrediction,
    Loss,
    LossWeight,
    Objective,
    Schedule,
    TimestepLaw,
    Variance,
    check_whose,
)
from pipeline.dit.config import BLOCKS, BlockOptions, Blocks
from pipeline.runtime.bounds import (
    Amount,
    AmountOrNone,
    Batch,
    Decay,
    ReverseSteps,
    Scale,
    Seed,
    Share,
    Shown,
    Sigma,
    Threads,
    are_within,
    check_bounds,
)
from pipeline.runtime.cli import StandsFor, flag_values
from pipeline.runtime.config_files import BY_COMMAS
from pipeline.runtime.errors import UserError

EMA_NAME = re.compile(r"(?!(?:.*-)?\d{5}-of-\d{5}\Z)[A-Za-z0-9][A-Za-z0-9._-]*")
Order = Literal["scattered", "runs"]
ALIGN = {to: {f"align_{name}": name == to for name in ("latent", "features")} for to in ("none", "latent", "features")}
FURTHER = {"middle": "middle_head", "align": "align_latent", "features": "align_features", "class_token": "class_token"}
T = TypeVar("T")
FREE: Final = "may change when a run goes on"
START: Final = "may change once there is a checkpoint"
Free = Annotated[T, FREE]
"""Of a flag that changes what a run writes or how fast it goes, not what it learns: it may change on resuming. Of the store the contents are compared, not the path."""
Start = Annotated[T, START]
"""Of a flag that decides where the weights start: it may change once there is a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """What is learned from, and in which order."""

    latents: Free[str]
    """Latent store written by dit-extract: a folder, or a URL such as s3://bucket/store."""
    cache: Free[Path | None] = None
    """Folder that keeps local copies of a remote store's shards."""
    order: Order = "scattered"
    """scattered permutes all samples; runs reads 16 neighbours at a time, for large stores on slow disks."""
    latent_normalization: Literal["vae", "channel"] = "vae"
    """vae feeds latents by the VAE's own shift and scale; channel brings each channel of the store to mean 0 and deviation 1, for latents that no VAE scales, such as an encoder's features."""
    flip: bool = True
    """Use the store's mirrored views too, one view drawn per sample and step."""
    validation: Free[str | None] = None
    """Store of held-out images; its loss on fixed noise is logged."""
    validation_share: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    """Share of the training store to hold out for the validation loss, 0 to 0.5; none with --validation."""
    validate_every: Free[Amount] = 1000
    """Steps between two validation losses."""
    validation_samples: Free[Amount] = 1024
    """Held-out samples to use at most."""
    verify_data: Free[bool] = False
    """Compare every shard with its checksum before training."""
    prefetch: Free[Threads] = 4
    """Batches that a background thread reads ahead."""
    seed: Annotated[Seed, tyro.conf.arg(metavar="INT")] = 0
    """Data order, noise and starting weights all depend on this alone."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.validation is not None:  # a store of its own makes the share of a preset superfluous
            object.__setattr__(self, "validation_share", 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions(BlockOptions):
    """Which network, and where its weights start."""

    model: str = "DiT-XL/2"
    """Network: DiT-{S,B,L,XL}/{2,4,8}, or DiT-Ti/2, a tiny one for trying things out."""
    hidden_size: Annotated[int, Meta(ge=1, le=1 << 14)] | None = None
    """Width of a token, where it is not to be --model's; a multiple of 4 and of --num-heads."""
    depth: Threads | None = None
    """Transformer blocks, where they are not to be --model's."""
    num_heads: Threads | None = None
    """Attention heads, where they are not to be --model's."""
    patch_size: Annotated[int, Meta(ge=1, le=1 << 14)] | None = None
    """Latent cells per token along one side, where they are not to be --model's."""
    head_width: Annotated[int, Meta(ge=1, le=1 << 14)] | None = None
    """Width of a few blocks behind the network that read the noisy latent once more, for latents of more numbers to a token than the network is wide; a multiple of 4 and of the heads. Default: none."""
    head_depth: Threads | None = None
    """How many blocks those are. Default: 2."""
    blocks: Free[Annotated[Blocks, StandsFor(BLOCKS)]] = "release"
    """modern stands for --qk-norm --mlp swiglu --norm rms --rotary --value-residual; one given beside it wins."""
    middle_head: bool = False
    """Train a second final layer on the tokens after 0.3 of the blocks; dit-sample can guide from it in one pass."""
    middle_weight: Scale = 0.5
    """Weight of --middle-head's loss beside the network's own."""
    align: Free[Annotated[Literal["none", "latent", "features"], StandsFor(ALIGN)]] = "none"
    """latent stands for --align-latent, features for --align-features; those two can be given together."""
    align_latent: bool = False
    """Train the tokens there to hold the clean latent as well, by a small MLP that sampling does without."""
    align_weight: Scale = 1.0
    """Weight of --align-latent's loss beside the network's own."""
    align_features: bool = False
    """Train the tokens there to point where an encoder's features of the image do (REPA), by an MLP that sampling does without; the store has them by dit-extract --features."""
    features_weight: Scale = 0.5
    """Weight of --align-features' loss beside the network's own."""
    features_until: AmountOrNone | None = None
    """Step after which --align-features is not trained any more. Default: it is to the end."""
    class_token: bool = False
    """Denoise an encoder's class token along with the latent, as one more token (REG); the store has it by dit-extract --features."""
    class_token_weight: Scale = 0.03
    """Weight of --class-token's loss beside the network's own."""
    class_dropout: Share = 0.1
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
        check_bounds(self)
        if self.head_depth is not None and self.head_width is None:
            raise UserError("--head-depth is for --head-width; give that too")
        if self.features_until is not None and not self.align_features:
            raise UserError("--features-until is for --align-features; give that too")
        switches = {name: getattr(self, name) for name in BLOCKS["release"]}
        if self.blocks != "release" and switches == BLOCKS["release"]:
            raise UserError(f"--blocks {self.blocks} with each of its switches turned off is --blocks release")

    @property
    def sizes(self) -> dict[str, int]:
        """{field of the network's configuration: size} of those that are not --model's."""
        names = ("hidden_size", "depth", "num_heads", "patch_size", "head_width", "head_depth")
        return {name: size for name in names if (size := getattr(self, name)) is not None}

    @property
    def title(self) -> str:
        """The network for people: --model, and what is not its size."""
        return " ".join([self.model, *(f"--{name.replace('_', '-')} {size}" for name, size in self.sizes.items())])

    @property
    def further_weights(self) -> dict[str, float]:
        """{loss: weight} of what the network is trained for besides; mostly nothing."""
        return {name: getattr(self, f"{name}_weight") for name, flag in FURTHER.items() if getattr(self, flag)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveOptions:
    """What the network learns to predict, and how wrong it is told to be."""

    objective: Annotated[Objective, tyro.conf.arg(help=OBJECTIVES_HELP)] = "ddpm"
    noise_schedule: Schedule = "linear"
    """Noise schedule of ddpm over 1000 timesteps."""
    prediction: FlowPrediction = "epsilon"
    """What ddpm predicts: the noise, the clean latent, or their velocity; flow: x0, or else the velocity; sit: noise, score, or else the velocity."""
    variance: Variance = "learned-range"
    """Reverse variance of ddpm; the learned one doubles the output channels."""
    loss: Loss = "mse"
    """Loss of ddpm. mse with a learned variance is the paper's hybrid loss."""
    timestep_law: TimestepLaw = "logit-normal"
    """How flow draws its times; sit and repa draw them uniformly."""
    time_mean: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    """Mean of the normal number behind flow's logit-normal times; above 0 leads to more noise."""
    time_std: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Its standard deviation."""
    time_shift: Annotated[float, Meta(gt=0, le=10_000)] | Literal["auto"] = 1.0
    """Shift of flow's times to the noise, in training and sampling: t' = X t / (1 + (X - 1) t). auto: √(C·H·W / 4096) of the latent, at least 1."""
    flow_path: FlowPath = "linear"
    """How sit and repa mix data and noise; cosine is SiT's GVP, vp the diffusion's, for sit."""
    loss_weight: LossWeight = "none"
    """What a squared error of sit's noise or score counts: one, as much as its velocity's, or as in the likelihood."""

    def __post_init__(self) -> None:
        check_bounds(self)
        check_whose(self.objective, self)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerOptions:
    """What moves the weights, and its learning rate as a function of the step."""

    steps: Free[Amount] = 400_000
    """Optimizer steps in all, counted from the beginning of the run."""
    batch_size: Batch = 256
    """Samples per step over all processes and accumulation."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; muon moves the matrices of attention and MLP along orthogonal matrices, and all else by AdamW."""
    muon_lr: Scale | None = None
    """Learning rate of muon's matrices, on the same schedule. Default: --lr, which suits both."""
    muon_momentum: Decay = 0.95
    """Decay of muon's mean of the gradients."""
    lr: Scale = 1e-4
    """Learning rate after the warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd", "inverse-sqrt"] = "constant"
    """constant; linear, cosine and wsd fall from --lr at --decay-start to --lr-end at --decay-steps, wsd late and as 1 - sqrt; inverse-sqrt: --lr / sqrt(step / --decay-steps) from there on."""
    decay_steps: Amount | None = None
    """Length of the schedule in steps. It is not --steps, so that training longer does not change the past."""
    decay_start: AmountOrNone | None = None
    """Step from which linear, cosine and wsd fall. Default: 0, and four fifths of --decay-steps for wsd."""
    lr_end: Scale = 0.0
    """Learning rate at the end of linear, cosine and wsd."""
    lr_warmup_steps: AmountOrNone = 0
    """Steps over which the learning rate rises from 0."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay of the gradient's first and second moment."""
    adam_eps: Share = 1e-8
    """AdamW's epsilon."""
    weight_decay: Scale = 0.0
    """AdamW's weight decay; muon's matrices have none."""
    clip_norm: Annotated[float, Meta(gt=0, le=1e12)] | None = None
    """Largest gradient norm; a longer gradient is shortened to it. Default: not clipped."""
    max_skipped_in_a_row: Free[Amount] = 20
    """Steps in a row whose loss or gradient is not finite (each is skipped) before going back to a checkpoint."""
    max_rollbacks: Free[AmountOrNone] = 3
    """How often to go back before giving up."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.muon_lr is not None and (self.optimizer != "muon" or self.lr == 0):
            raise UserError(f"--muon-lr {self.muon_lr} is for --optimizer muon, with an --lr above 0")
        if self.lr_schedule != "constant" and self.decay_steps is None:
            raise UserError(f"--lr-schedule {self.lr_schedule} needs --decay-steps, the schedule's length in steps")
        if self.decay_start is not None and self.lr_schedule in ("constant", "inverse-sqrt"):
            raise UserError(f"--decay-start is for --lr-schedule linear, cosine or wsd, not {self.lr_schedule}")
        if self.decay_start is not None and self.decay_steps is not None and self.decay_start >= self.decay_steps:
            raise UserError(f"--decay-start {self.decay_start} must be below --decay-steps {self.decay_steps}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageOptions:
    """Exponential moving averages of the weights, in float32."""

    ema_decay: Decay = 0.9999
    """Decay per step of the average that sampling uses."""
    ema_warmup: bool = False
    """Begin with a smaller decay, (1 + step) / (10 + step), for short runs."""
    extra_ema: tuple[str, ...] = ()
    """Further averages, each NAME=DECAY, written as ema-NAME.safetensors."""
    ema_sigma: Annotated[str | None, BY_COMMAS] = None
    """Also keep power-function averages of these relative widths, as in 0.05,0.10, from which dit-convert --average and dit-sample --weights sigma=… make one of any width after training."""
    ema_snapshot_every: Free[AmountOrNone | None] = None
    """Steps between two snapshots of them in RUN/averages, in half precision; 0 takes none. Default: as --save-every."""

    def __post_init__(self) -> None:
        check_bounds(self)
        taken = self.decays.keys() & {f"ema-sigma-{sigma:g}" for sigma in self.sigmas}
        if taken:
            raise UserError(f"--extra-ema and --ema-sigma both name {min(taken)}; give the former another name")
        if self.ema_snapshot_every and not self.sigmas:
            raise UserError("--ema-snapshot-every is for the averages of --ema-sigma; give that too, as in 0.05,0.10")

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The relative widths of the power-function averages, rising.

        Raises:
            UserError: one is no number, or none that a power function has, or is there twice.
        """
        written = [] if self.ema_sigma is None else self.ema_sigma.split(",")
        try:
            sigmas = sorted(float(f"{float(sigma):g}") for sigma in written)
        except ValueError as error:
            raise UserError(f"--ema-sigma {self.ema_sigma} must be numbers between commas, as in 0.05,0.10") from error
        if not are_within(sigmas, Sigma) or len(set(sigmas)) < len(sigmas):
            raise UserError(f"--ema-sigma {self.ema_sigma}: the widths must differ, lie above 0 and below 0.289")
        return tuple(sigmas)

    @property
    def count(self) -> int:
        """How many averages are kept."""
        return len(self.decays) + len(self.sigmas)

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
            if not are_within([decay], Decay):
                raise UserError(f"--extra-ema {written}: the decay {decay} must lie in 0 … 1, without 1")
            decays[f"ema-{name}"] = decay
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
    grad_accumulation: Free[Batch] = 1
    """Parts that each process cuts its share of a batch into, to need less memory; the batch stays the same."""
    sharding: Free[Literal["none", "fsdp", "hsdp"]] = "none"
    """none copies the network to every process (DDP); fsdp divides weights, optimizer and averages among them (FSDP2); hsdp among the processes of one machine, with a copy on each machine."""
    shard_processes: Free[Amount | None] = None
    """Processes that divide one copy among them, for --sharding hsdp; default all of one machine."""
    process_timeout: Free[Annotated[float, Meta(ge=0.05, le=1e5)]] = 30.0
    """Minutes that a process waits for another one, as while a checkpoint is written, before it gives up and ends."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.shard_processes is not None and self.sharding != "hsdp":
            raise UserError(f"--shard-processes is for --sharding hsdp, not {self.sharding}; drop one of the two")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Where the run lives, what it keeps, and when it stops."""

    out: Free[Path]
    """Run folder. If it already holds this run, training continues from its newest checkpoint."""
    mirror: Free[str | None] = None
    """Keep a copy of the run behind this URL, as s3://bucket/run, brought up to date in the background; on a machine whose --out is empty, training goes on from there."""
    overwrite: Free[bool] = False
    """Begin anew: remove the run that --out holds."""
    dry_run: Free[bool] = False
    """Say what would be trained and what each GPU would hold, then end; nothing is written."""
    anyway: Free[bool] = False
    """Go on although the GPU's memory or the disk seems too small, or the latents have more channels than the network is wide."""
    save_every: Free[Amount] = 10_000
    """Steps between two checkpoints; one more is written at the end."""
    keep_last: Free[AmountOrNone] = 3
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: Free[Amount | None] = None
    """Keep every checkpoint at a multiple of this many steps for ever."""
    sharded_checkpoints: Free[bool] = False
    """Let every process write some tensors of a checkpoint, as NAME-00001-of-0000N.safetensors with an index, so that none holds all of it; the files still load everywhere."""
    time_limit: Free[Annotated[float, Meta(ge=0, le=1e7)] | None] = None
    """Minutes after which to save and stop, for jobs with a time limit."""
    log_every: Free[Amount] = 10
    """Steps between two lines of metrics.jsonl."""
    tensorboard: Free[bool] = True
    """Write TensorBoard events to the run folder."""
    wandb_project: Free[str | None] = None
    """Log to this Weights & Biases project too: the same as --trackers wandb --tracker-project NAME."""
    trackers: Free[str] = ""
    """Log to these too, by the names that Accelerate has for them, as mlflow,aim; they must be installed."""
    tracker_project: Free[str] = "dit"
    """The project or experiment that --trackers log to."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewOptions:
    """Pictures drawn while training goes on."""

    sample_every: Free[AmountOrNone] = 10_000
    """Steps between two preview grids in RUN/samples; 0 draws none."""
    preview_classes: Free[Shown] = 8
    """Classes in the grid, one column each."""
    preview_rows: Free[Shown] = 2
    """Images of each class, from the raw and from the averaged weights alike."""
    preview_steps: Free[ReverseSteps] = 25
    """Steps of the sampler."""
    preview_guidance: Free[Scale] = 1.5
    """Guidance scale of the previews."""
    vae: Free[str | None] = None
    """VAE that decodes previews; default: the one that the store names."""

    def __post_init__(self) -> None:
        check_bounds(self)


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


def plain_values(options: TrainOptions) -> dict[str, Any]:
    """Every flag with its value in plain YAML types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in flag_values(options).items()}
