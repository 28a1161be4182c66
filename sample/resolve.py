"""Options and a checkpoint into a job with every default filled in, and the recipe that describes it."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint, read_checkpoint
from pipeline.classes import short_name
from pipeline.diffusion.samplers import SAMPLERS, check_request, default_sampler, samplers_for
from pipeline.dit import compile_blocks
from pipeline.image_grid import can_be_drawn
from pipeline.runtime.cli import nearest
from pipeline.runtime.console import say
from pipeline.runtime.devices import choose_device, default_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.launchers import say_unfollowed
from pipeline.vae import Vae, check_latents, find_vae
from sample.generate import Generator, ReversePlan
from sample.labels import ChosenLabels, KnownClasses, choose_labels
from sample.options import GRID_PIXELS, ComputeOptions, ReverseOptions, SampleOptions
from sample.sidecar import versions, weights_fingerprint

PAPER_GUIDANCE = 4.0
LARGEST_BATCH = {"cpu": 64, "cuda": 128}
NAMED_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """A job, complete."""

    generator: Generator
    labels: ChosenLabels
    known: KnownClasses
    recipe: dict[str, Any]
    """All that the pixels depend on, in JSON; equal recipes make equal outputs."""

    @property
    def batch_size(self) -> int:
        return self.generator.plan.batch_size

    @property
    def chunks(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def class_name(self, label: int) -> str:
        """What a picture calls the class: its short name; with its folder name or label where that says too little."""
        name = short_name(label, self.known.names, self.known.ids)
        if label < 0:
            return name
        identifier = self.known.ids[label] if label < len(self.known.ids) else ""
        other = identifier if identifier not in {"", name} and can_be_drawn(identifier) else str(label)
        if not can_be_drawn(name):
            return other
        return f"{name} ({other})" if name in self._shared_names else name

    @cached_property
    def _shared_names(self) -> set[str]:
        """Short names that several classes have."""
        names = Counter(short_name(label, self.known.names, self.known.ids) for label in range(self.known.count))
        return {name for name, count in names.items() if count > 1}

    def folder_name(self, label: int) -> str:
        """A class's sub-folder: its folder name or synset, else its label; nothing where there are no classes."""
        if label < 0:
            return ""
        name = self.known.ids[label] if label < len(self.known.ids) else ""
        is_one_folder = name not in {"", ".", ".."} and Path(name).name == name  # names are a stranger's: no ../
        return name if is_one_folder else f"{label:04d}"


def resolve(options: SampleOptions) -> SamplingJob:
    """Read the checkpoint and the VAE, and settle every choice that the command line left open.

    Raises:
        UserError: something asked for does not exist or does not fit the checkpoint.
    """
    checkpoint = read_checkpoint(
        options.checkpoint,
        weights=options.weights,
        num_heads=options.reverse.num_heads,
        objective=options.reverse.objective,
        verify=options.verify_weights,
    )
    known = KnownClasses(
        count=checkpoint.config.num_classes, names=checkpoint.info["classes"], ids=checkpoint.info["class_ids"]
    )
    labels = choose_labels(options.images, known, seed=options.reverse.seed)
    if options.kind == "grid":
        _check_grid(len(labels), checkpoint.info["latent"])
    if options.trajectory is not None and options.trajectory > options.reverse.steps + 1:
        raise UserError(
            f"--trajectory {options.trajectory} is more than the {options.reverse.steps} steps and the result have "
            f"moments; use at most {options.reverse.steps + 1}, or more --steps"
        )
    say_unfollowed({"precision": "--mixed-precision", "dynamo": "--compile"})
    device = str(choose_device(options.compute.device)[0])
    plan = resolve_plan(options.reverse, options.compute, checkpoint, samples=len(labels), device=device)
    vae = _decoder(options, checkpoint, device)
    checkpoint = _with_factors(checkpoint, vae if options.vae is not None else None)
    fingerprint = weights_fingerprint(checkpoint.model.state_dict())
    compiled = options.compute.compile and device != "cpu"
    if compiled:
        compile_blocks(checkpoint.model)
    elif options.compute.compile:
        say("--compile is left out: on a CPU it would let only one part of a batch run at a time, which is slower")
    decoder = None if options.kind == "latents" else vae
    generator = Generator(checkpoint, plan, device=device, vae=decoder)
    recipe = {
        "checkpoint": {
            "step": checkpoint.info["step"],
            "weights": checkpoint.weights,
            "sha256": fingerprint,
            "network": checkpoint.config.to_json(),
            "process": checkpoint.process.to_json(),
        },
        **_describe_plan(plan),
        "labels": labels.rule if options.kind not in {"grid", "folder"} else labels.with_values(),
        "classes": _names_of_used(labels, known),
        "vae": None if decoder is None else decoder.describe(),
        "scaling": {name: checkpoint.info["vae"].get(name) for name in ("scaling_factor", "shift_factor")},
        "latent": checkpoint.info["latent"],
        "image": checkpoint.info["image"],
        "output": {"kind": options.kind, "samples": len(labels), "trajectory": options.trajectory},
        "device": _describe_device(device),
        "mixed_precision": plan.precision,
        "decode_dtype": options.compute.decode_dtype if decoder is not None else None,
        "compile": compiled,
        # not on a CPU, where it follows from the batch size as ever
        **({} if decoder is None or device == "cpu" else {"decode_lane": generator.decode_lane}),
        "versions": versions(),
    }
    return SamplingJob(generator=generator, labels=labels, known=known, recipe=recipe)


def resolve_plan(
    reverse: ReverseOptions, compute: ComputeOptions, checkpoint: Checkpoint, *, samples: int, device: str
) -> ReversePlan:
    """The reverse process with every default filled in.

    Raises:
        UserError: the sampler or the guidance does not fit the checkpoint.
    """
    names = samplers_for(checkpoint.process)
    sampler = reverse.sampler or default_sampler(checkpoint.process)
    if sampler not in names:
        close = nearest(sampler, names, count=1)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(names)}"
        raise UserError(f"--sampler {sampler} does not fit this checkpoint's process; {hint}")
    check_request(SAMPLERS[sampler], checkpoint.process, steps=reverse.steps, eta=reverse.eta)
    kind = device.partition(":")[0]
    precision = compute.mixed_precision
    if precision == "auto":
        precision, _ = default_precision(torch.device(device))
    guidance = _resolve_guidance(reverse, checkpoint)
    guides = guidance != 1
    return ReversePlan(
        sampler=sampler,
        steps=reverse.steps,
        eta=reverse.eta,
        guidance=guidance,
        channels=reverse.guidance_channels if guides else None,
        interval=reverse.interval if guides else None,
        seed=reverse.seed,
        batch_size=compute.batch_size or _even_batch(samples, LARGEST_BATCH.get(kind, 128)),
        precision=precision,
    )


def _even_batch(samples: int, largest: int) -> int:
    """The batch size that makes the fewest batches with the least padding."""
    batches = -(-samples // largest)
    return -(-samples // batches)


def _resolve_guidance(reverse: ReverseOptions, checkpoint: Checkpoint) -> float:
    config = checkpoint.config
    if config.num_classes and config.has_null_class:
        return PAPER_GUIDANCE if reverse.guidance is None else reverse.guidance
    why = (
        "is unconditional: it has no classes to guide towards"
        if config.num_classes == 0
        else "was trained without label dropout, so it has no null class to guide away from"
    )
    if reverse.guidance not in {None, 1.0}:
        raise UserError(f"--guidance {reverse.guidance} cannot apply: this checkpoint {why}; use --guidance 1")
    if reverse.guidance is None and config.num_classes:
        say(f"note: sampling without guidance, because this checkpoint {why}")
    return 1.0


def _check_grid(count: int, latent: dict[str, Any]) -> None:
    pixels = latent["height"] * latent["width"] * latent["downsample"] ** 2
    if count * pixels > GRID_PIXELS:
        raise UserError(
            f"a grid of {count} images is too large to look at; choose at most {GRID_PIXELS // pixels}, "
            f"or --out FOLDER/ or PATH.npz"
        )


def _decoder(options: SampleOptions, checkpoint: Checkpoint, device: str) -> Vae | None:
    """The VAE; None where raw latents are asked for and nothing has to be known of it."""
    if options.kind == "latents" and options.vae is None:
        return None
    vae = find_vae(
        checkpoint.info["vae"],
        options.vae,
        device=device,
        dtype=getattr(torch, options.compute.decode_dtype),
        allow_other=options.allow_other_vae,
    )
    known = checkpoint.folder is not None  # the down-factor of weights that came alone is a guess
    downsample = checkpoint.info["latent"]["downsample"] if known else None
    check_latents(vae, channels=checkpoint.config.in_channels, downsample=downsample)
    return vae


def _with_factors(checkpoint: Checkpoint, given: Vae | None) -> Checkpoint:
    """Weights that came alone with the scale and shift of the VAE that was given: they say nothing of their own."""
    recorded = checkpoint.info["vae"]
    if given is None or checkpoint.folder is not None or "recorded" in recorded or recorded.get("sha256"):
        return checkpoint
    latent = {**checkpoint.info["latent"], "downsample": given.downsample}
    image = {**checkpoint.info["image"], "size": latent["height"] * given.downsample}
    return replace(checkpoint, info={**checkpoint.info, "vae": given.describe(), "latent": latent, "image": image})


def _describe_plan(plan: ReversePlan) -> dict[str, Any]:
    values = asdict(plan)
    values["guidance_channels"] = values.pop("channels")
    values["guidance_interval"] = values.pop("interval") and list(plan.interval or ())
    del values["precision"]
    return values


def _names_of_used(labels: ChosenLabels, known: KnownClasses) -> dict[str, str]:
    used = sorted({int(label) for label in labels.values if label >= 0})
    return {str(label): known.names[label] for label in used[:NAMED_CLASSES] if label < len(known.names)}


def _describe_device(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
