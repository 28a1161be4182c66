"""Options and a checkpoint into a job with every default filled in, and the recipe that describes it."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint, read_checkpoint
from pipeline.checkpoint.info import make_info
from pipeline.classes import brief, short_name
from pipeline.diffusion.samplers import SAMPLERS, check_request, default_sampler, samplers_for
from pipeline.dit import compile_blocks
from pipeline.image_grid import can_be_drawn
from pipeline.recorded import LatentGrid
from pipeline.runtime.cli import nearest
from pipeline.runtime.console import say
from pipeline.runtime.devices import choose_device, default_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.launchers import say_unfollowed
from pipeline.vae import Vae, check_latents, find_vae
from sample.edits import Source, describe_edit, make_edit, read_source, steps_from
from sample.generate import Generator, ReversePlan
from sample.guide import read_guide
from sample.labels import ChosenLabels, KnownClasses, choose_labels, labels_of
from sample.options import GRID_PIXELS, ComputeOptions, ImageOptions, ReverseOptions, SampleOptions
from sample.sidecar import versions, weights_fingerprint

PAPER_GUIDANCE, AUTOGUIDANCE, PAPER_STEPS = 4.0, 2.0, 250
FAST: dict[str, dict[str, Any]] = {
    "ddpm": {"sampler": "dpm++", "steps": 15, "guidance_interval": "0.2:0.8"},
    "flow": {"sampler": "dpm++2m", "steps": 15, "guidance_interval": "0.2:0.8"},
}
"""What --quality fast stands for, by the objective whose samplers a process takes (docs/sample.md has the figures)."""
LARGEST_BATCH = {"cpu": 64, "cuda": 128}
_LONGEST_FOLDER = 200
"""Bytes of a name; disks take 255."""
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

    @property
    def columns(self) -> int | None:
        """Images in one row of a grid; None for a square, where rows by class would be of one image each."""
        columns = int(self.labels.rule.get("samples_per_class", 1))
        return columns if columns > 1 else None

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
        """A class's sub-folder: its folder name or synset, else its label; nothing where there are no classes.

        Names are a stranger's: none with ../ in it or control characters, too long for a disk, or of two classes.
        """
        if label < 0:
            return ""
        name = self.known.ids[label] if label < len(self.known.ids) else ""
        is_one_folder = name not in {"", ".", ".."} and Path(name).name == name and name.isprintable()
        is_its_own = self.known.ids.count(name) == 1 and len(name.encode()) <= _LONGEST_FOLDER
        return name if is_one_folder and is_its_own else f"{label:04d}"


def resolve(options: SampleOptions) -> SamplingJob:
    """Read the checkpoint and the VAE, and settle every choice that the command line left open.

    Raises:
        UserError: something asked for does not exist or does not fit the checkpoint.
    """
    how: dict[str, Any] = {"objective": options.reverse.objective, "verify": options.verify_weights}
    checkpoint = read_checkpoint(
        options.checkpoint, weights=options.weights, num_heads=options.reverse.num_heads, **how
    )
    guide = None if options.reverse.guide is None else read_guide(options.reverse.guide, checkpoint, **how)
    say_unfollowed({"precision": "--mixed-precision", "dynamo": "--compile"})
    device = str(choose_device(options.compute.device)[0])
    source = read_source(options.edit, checkpoint)
    labels, plan = _labels_and_plan(options, checkpoint, device, source)
    vae = _decoder(options, checkpoint, device)
    checkpoint = _with_factors(checkpoint, vae if options.vae is not None else None)
    described = {"checkpoint": _describe_network(checkpoint)}
    if guide is not None:
        described["guide"] = _describe_network(guide)
    compiled = options.compute.compile and device != "cpu"
    if compiled:
        for network in (checkpoint, guide):
            if network is not None:
                compile_blocks(network.model)
    elif options.compute.compile:
        say("--compile is left out: on a CPU it would let only one part of a batch run at a time, which is slower")
    decoder = None if options.kind == "latents" else vae
    in_a_row = labels.rule.get("samples_per_class", 1)
    edit = make_edit(options.edit, source, checkpoint, first=(plan.timesteps or (0.0,))[0], in_a_row=in_a_row)
    generator = Generator(
        checkpoint, plan, device=device, vae=decoder, guide=None if guide is None else guide.model, edit=edit
    )
    described |= describe_edit(options.edit, source, edit)
    return _job(options, generator, labels, described, compiled=compiled)


def resolve_again(options: SampleOptions, job: SamplingJob) -> SamplingJob:
    """Another job for the networks of one before: its images and its reverse process may be others, not the guide.

    Raises:
        UserError: something asked for does not fit the checkpoint.
    """
    before = job.generator
    device = str(before.device)
    labels, plan = _labels_and_plan(options, before.checkpoint, device)
    generator = Generator(before.checkpoint, plan, device=device, vae=before.vae, guide=before.guide)
    described: dict[str, Any] = {name: job.recipe[name] for name in ("checkpoint", "guide") if name in job.recipe}
    return _job(options, generator, labels, described, compiled=job.recipe["compile"])


def _labels_and_plan(
    options: SampleOptions, checkpoint: Checkpoint, device: str, source: Source | None = None
) -> tuple[ChosenLabels, ReversePlan]:
    known = _known_classes(checkpoint)
    if options.kind == "grid":
        _check_grid(options.images.num_samples or 0, checkpoint.info.latent)  # before a class is drawn for each
    if source is not None and source.labels is not None and options.images == ImageOptions():
        labels = labels_of(source.labels, known)
    else:
        labels = choose_labels(options.images, known, seed=options.reverse.seed)
    if options.edit.interpolates and labels.rule.get("samples_per_class", 1) < 2:
        flag = "--interpolate" if options.edit.interpolate is not None else "--interpolate-class"
        raise UserError(f"{flag} makes a row of each class; give --samples-per-class 2 or more")
    if options.kind == "grid":
        _check_grid(len(labels), checkpoint.info.latent)
    plan = resolve_plan(options.reverse, options.compute, checkpoint, samples=len(labels), device=device)
    if options.edit.vary is not None:
        begun = steps_from(options.edit.share, checkpoint.process, plan.steps, plan.timesteps)
        plan = replace(plan, timesteps=begun, steps=len(begun))
    if options.trajectory is not None and options.trajectory > plan.steps + 1:
        raise UserError(
            f"--trajectory {options.trajectory} is more than the {plan.steps} steps and the result have moments; use "
            f"at most {plan.steps + 1}, or more --steps"
        )
    return labels, plan


def _known_classes(checkpoint: Checkpoint) -> KnownClasses:
    info = checkpoint.info
    return KnownClasses(count=checkpoint.config.num_classes, names=info.classes, ids=info.class_ids)


def _job(
    options: SampleOptions, generator: Generator, labels: ChosenLabels, described: dict[str, Any], *, compiled: bool
) -> SamplingJob:
    info, known = generator.checkpoint.info, _known_classes(generator.checkpoint)
    vae, device = generator.vae, str(generator.device)
    recipe = {
        **described,
        **_describe_plan(generator.plan),
        "labels": labels.rule if options.kind not in {"grid", "folder"} else labels.with_values(),
        "classes": _names_of_used(labels, known),
        "vae": None if vae is None else vae.describe(),
        "scaling": {name: getattr(info.vae, name) for name in ("scaling_factor", "shift_factor")},
        "latent": asdict(info.latent),
        "image": dict(info.image),
        "output": {"kind": options.kind, "samples": len(labels), "trajectory": options.trajectory},
        "device": _describe_device(device),
        "mixed_precision": generator.plan.precision,
        "decode_dtype": options.compute.decode_dtype if vae is not None else None,
        "compile": compiled,
        # not on a CPU, where it follows from the batch size as ever
        **({} if vae is None or device == "cpu" else {"decode_lane": generator.decode_lane}),
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
    reverse = _with_quality(reverse, checkpoint)
    names = samplers_for(checkpoint.process)
    sampler = reverse.sampler or default_sampler(checkpoint.process)
    if sampler not in names:
        close = nearest(sampler, names, count=1)
        hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(names)}"
        raise UserError(f"--sampler {sampler} does not fit this checkpoint's process; {hint}")
    timesteps = reverse.times
    steps = reverse.steps or (PAPER_STEPS if timesteps is None else len(timesteps))
    check_request(SAMPLERS[sampler], checkpoint.process, steps=steps, eta=reverse.eta, timesteps=timesteps)
    kind = device.partition(":")[0]
    precision = compute.mixed_precision
    if precision == "auto":
        precision, _ = default_precision(torch.device(device))
    _check_source(reverse, checkpoint)
    guidance = _resolve_guidance(reverse, checkpoint)
    guides = guidance != 1
    return ReversePlan(
        sampler=sampler,
        steps=steps,
        eta=reverse.eta,
        guidance=guidance,
        channels=reverse.guidance_channels if guides else None,
        interval=reverse.interval if guides else None,
        seed=reverse.seed,
        batch_size=compute.batch_size or _even_batch(samples, LARGEST_BATCH.get(kind, 128)),
        precision=precision,
        source=reverse.guidance_source,
        middle_guidance=reverse.middle_guidance if reverse.guidance_source == "both" else 1.0,
        timesteps=timesteps,
    )


def _with_quality(reverse: ReverseOptions, checkpoint: Checkpoint) -> ReverseOptions:
    """The options with what --quality stands for in place of what was not said."""
    if reverse.quality is None:
        return reverse
    said = {"steps"} if reverse.timesteps is not None else set()
    fast = FAST[checkpoint.process.sampled_as].items()
    return replace(
        reverse, **{name: value for name, value in fast if getattr(reverse, name) is None and name not in said}
    )


def _check_source(reverse: ReverseOptions, checkpoint: Checkpoint) -> None:
    source, config = reverse.guidance_source, checkpoint.config
    if source == "class":
        return
    if reverse.guide is not None:
        raise UserError(f"--guide and --guidance-source {source} are two sources to guide from; give one")
    if not config.middle_head:
        raise UserError(
            f"--guidance-source {source} needs a middle head, which this checkpoint's network was not trained with "
            f"(dit-train --middle-head); use --guidance-source class"
        )
    if source == "both" and not (config.num_classes and config.has_null_class):
        raise UserError(
            "--guidance-source both needs classes and a null class, which this checkpoint's network has not; use "
            "--guidance-source middle"
        )


def _even_batch(samples: int, largest: int) -> int:
    """The batch size that makes the fewest batches with the least padding."""
    batches = -(-samples // largest)
    return -(-samples // batches)


def _resolve_guidance(reverse: ReverseOptions, checkpoint: Checkpoint) -> float:
    config = checkpoint.config
    if reverse.guidance_source == "middle":
        return reverse.middle_guidance if reverse.guidance is None else reverse.guidance
    if reverse.guide is not None:
        return AUTOGUIDANCE if reverse.guidance is None else reverse.guidance
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


def _check_grid(count: int, latent: LatentGrid) -> None:
    pixels = latent.height * latent.width * latent.downsample**2
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
        checkpoint.info.vae,
        options.vae,
        device=device,
        dtype=getattr(torch, options.compute.decode_dtype),
        allow_other=options.allow_other_vae,
    )
    known = checkpoint.folder is not None  # the down-factor of weights that came alone is a guess
    downsample = checkpoint.info.latent.downsample if known else None
    check_latents(vae, channels=checkpoint.config.in_channels, downsample=downsample)
    return vae


def _with_factors(checkpoint: Checkpoint, given: Vae | None) -> Checkpoint:
    """Weights that came alone with the scale and shift of the VAE that was given: they say nothing of their own."""
    info = checkpoint.info
    if given is None or checkpoint.folder is not None or info.vae.recorded is not None or info.vae.sha256:
        return checkpoint
    latent = replace(info.latent, downsample=given.downsample)
    image = {**info.image, "size": latent.height * given.downsample}
    return replace(checkpoint, info=make_info(info, vae=given.describe(), latent=asdict(latent), image=image))


def _describe_network(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "step": checkpoint.info.step,
        "weights": checkpoint.weights,
        "sha256": weights_fingerprint(checkpoint.model.state_dict()),
        "network": checkpoint.config.to_json(),
        "process": checkpoint.process.to_json(),
    }


def _describe_plan(plan: ReversePlan) -> dict[str, Any]:
    values = asdict(plan)
    values["guidance_channels"] = values.pop("channels")
    values["guidance_interval"] = values.pop("interval") and list(plan.interval or ())
    timesteps = values.pop("timesteps")
    if timesteps is not None:
        values["timesteps"] = list(timesteps)
    del values["precision"]
    for name, key in (("source", "guidance_source"), ("middle_guidance", "middle_guidance")):
        value = values.pop(name)
        if plan.source != "class" and (name == "source" or plan.source == "both"):
            values[key] = value
    return values


def _names_of_used(labels: ChosenLabels, known: KnownClasses) -> dict[str, str]:
    used = sorted({int(label) for label in labels.values if label >= 0})
    return {str(label): brief(known.names[label]) for label in used[:NAMED_CLASSES] if label < len(known.names)}


def _describe_device(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
