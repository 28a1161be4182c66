"""One form of checkpoint into another: written out of sight, read back, compared, and only then put in place."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from pipeline.checkpoint.diffusers_write import recorded_vae, write_diffusers
from pipeline.checkpoint.folder import write_model_files
from pipeline.checkpoint.forms import Stored, build_model, read_stored
from pipeline.checkpoint.info import make_info
from pipeline.checkpoint.release import unlike_the_release
from pipeline.checkpoint.tensor_files import PROCESS, join_names, not_finite, save_safetensors
from pipeline.checkpoint.weight_files import save_pickled_tensors
from pipeline.classes import imagenet_classes
from pipeline.convert.card import write_card
from pipeline.convert.options import ConvertOptions
from pipeline.convert.parity import TOLERANCE, Difference, diffusers_difference, forward_difference
from pipeline.convert.target import check_repository, check_sources, check_target
from pipeline.diffusion.process import OF_TRAINING
from pipeline.dit import DiT, DiTConfig
from pipeline.hub import push
from pipeline.latents import Manifest
from pipeline.runtime.console import say, warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, make_folder
from pipeline.runtime.gate import read_regular, typed
from pipeline.runtime.publish import making, sweep

FIX = "norm1.emb.time_proj.downscale_freq_shift = 0 and norm3.eps = 1e-6 in every block"


def convert(options: ConvertOptions) -> list[str]:
    """Convert as the options say; the lines to print, which state the parity of the forward pass.

    Raises:
        UserError: the source cannot be read, the target exists or cannot hold the network, or the converted network
            does not compute the same, in which case nothing is left behind.
    """
    target = None if options.hub_name else Path(options.to)
    if target is None:
        check_repository(options)
    else:
        sweep(target.absolute())
        check_target(target, options.format, overwrite=options.overwrite)
        check_sources(target, [Path(options.from_)], options.from_)
    stored = read_stored(
        options.from_,
        weights=options.wanted_weights,
        num_heads=options.num_heads,
        objective=options.objective,
        verify=options.verify_weights,
    )
    if options.format != "facebook":  # which has no place for it
        stored.check_objective_is_known()
    if target is not None:
        check_sources(target, [folder for folder in (stored.folder, stored.diffusers) if folder], options.from_)
    wrong = not_finite(stored.state)
    if wrong:
        raise UserError(
            f"the {stored.weights} weights of {options.from_} hold values that are not finite: {join_names(wrong)}; "
            f"convert an earlier checkpoint"
        )
    if options.average is not None:
        stored = stored._replace(weights="ema")
    stored = stored._replace(info=make_info(stored.info, **_given_names(options, stored.config)))
    model = build_model(stored, origin=options.from_)
    lines = [_summary(stored)]
    if stored.diffusers is not None:
        lines += _diffusers_lines(model, stored.diffusers)
    with _published(options) as place:
        lines += _WRITERS[options.format](place, stored, model, options)
        if options.writes_card:
            lines += write_card(place, stored, options)
    say(f"written: {options.to}")
    return lines


@contextmanager
def _published(options: ConvertOptions) -> Iterator[Path]:
    """Where to write what then appears whole at --to: on the disk, or as one commit on the Hub."""
    if options.hub_name is None:
        target = Path(options.to)
        with explained_writes(target), making(target.absolute(), overwrite=options.overwrite) as stage:
            yield stage.place(target.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="dit-convert-") as work:
        place = Path(work) / options.hub_name.rpartition("/")[2]
        with explained_writes(place):
            yield place
        url = push(options.hub_name, place, private=options.private, message=f"dit-convert --format {options.format}")
        say(f"one commit: {url}")


def import_store(options: ConvertOptions) -> list[str]:
    """Turn other people's latents into a latent store; the lines to print.

    Raises:
        UserError: the files do not fit together, or the target holds something else.
    """
    from pipeline.convert.imports import import_latents
    from pipeline.vae import load_vae

    vae = load_vae(options.vae) if options.vae else None
    names = None
    if options.class_names:
        is_imagenet = options.class_names == "imagenet"
        names = [row.names for row in imagenet_classes()] if is_imagenet else _read_names(options.class_names)
    manifest = import_latents(
        options.from_,
        options.to,
        layout=options.layout,
        vae=vae.describe() if vae else None,
        channels=vae.channels if vae else None,
        downsample=vae.downsample if vae else None,
        class_names=names,
        overwrite=options.overwrite,
    )
    return _store_lines(manifest)


class _Told(msgspec.Struct, frozen=True):
    layout: str
    unknown: tuple[str, ...]


class _Imported(msgspec.Struct, frozen=True):
    told: _Told | None = msgspec.field(name="import", default=None)


def _store_lines(manifest: Manifest) -> list[str]:
    """What was kept, and what is not known."""
    latent, vae = manifest.latent, manifest.vae
    told = typed(dict(manifest), _Imported, "the store is damaged", advice="import it again").told
    kind = "points" if latent.kind == "point" else latent.kind
    what = f"{manifest.samples:,} {kind} of {latent.channels}×{latent.height}×{latent.width}"
    views = f" in {len(manifest.views)} views" if len(manifest.views) > 1 else ""
    size = f"in {len(manifest.shards)} shards, {len(manifest.classes)} classes"
    if told is None:
        return [f"{what}{views} {size}, unscaled by {vae.scaling_factor} ({vae.name})"]
    fed = f"training feeds (z − shift) · scale: scale {vae.scaling_factor}, shift {vae.shift_factor or 0}"
    pixels = f", of pixels in {list(vae.pixels)}" if vae.pixels else ""
    return [
        f"{what}{views} {size}, laid out as {told.layout}'s",
        f"taken for the VAE {vae.name or 'that nothing names'}{pixels}; {fed}",
        f"not known: {', '.join(told.unknown)}",
    ]


def _summary(stored: Stored) -> str:
    config = stored.config
    return (
        f"{stored.weights} weights: {config.conditioning}, width {config.hidden_size}, depth {config.depth}, "
        f"{config.num_heads} heads, patch {config.patch_size}, latent {config.in_channels}×{config.height}×"
        f"{config.width}, {config.num_classes} classes"
    )


def _diffusers_lines(model: DiT, folder: Path) -> list[str]:
    as_is, fixed = diffusers_difference(model, folder)
    why = "its timestep frequencies differ from the release's"
    return [
        f"diffusers as it is: max abs difference {as_is.largest:.3g} ({why})",
        f"with {FIX}: {_checked(fixed)}",
    ]


def _checked(difference: Difference) -> str:
    """In words, if it is small: below the tolerance, or below that share of outputs that are larger than 1."""
    largest, greatest = difference
    if largest < TOLERANCE:
        return f"max abs difference {largest:.3g} (below {TOLERANCE:g})"
    if largest < TOLERANCE * greatest:
        return f"max abs difference {largest:.3g} (below {TOLERANCE:g} of the largest output, {greatest:.3g})"
    raise UserError(
        f"the converted network does not compute the same: max abs difference {largest:.3g}, where outputs are up to "
        f"{greatest:.3g}, is not below {TOLERANCE:g}; nothing was written, please report it"
    )


def _write_dit(path: Path, stored: Stored, model: DiT, options: ConvertOptions) -> list[str]:
    make_folder(path)
    info = {**stored.info, "vae": _vae_to_record(stored, options.vae)}
    name = "model" if stored.weights == "raw" else stored.weights
    state = model.state_dict()
    raw = state if name == "model" else None
    write_model_files(path, info=info, model=raw, averages={} if name == "model" else {name: state}, sums=True)
    return _read_back(path, model, weights=stored.weights)


def _write_release(path: Path, stored: Stored, model: DiT, _: ConvertOptions) -> list[str]:
    wrong = unlike_the_release(stored.config)
    if wrong:
        raise UserError(f"the public release cannot hold this network: {'; '.join(wrong)}; keep it with --format dit")
    _refuse_what_a_flag_cannot_say(path, stored)
    unsaid = _unsaid(stored)
    if unsaid:
        objective = stored.info.process.objective
        told = f"; dit-sample has to be told, with --objective {objective}" if objective != "ddpm" else ""
        if stored.info.diffusion.get("path", "linear") != "linear":
            told += ", which takes it for the linear path: sample it as .safetensors"
        told = "" if path.suffix == ".safetensors" else told  # whose metadata says it, to us
        warn(
            f"a bare state dict does not say that {'; '.join(unsaid)}: whoever loads it, the release's samplers among "
            f"them, takes it for something else{told}; keep it with --format dit too"
        )
    tensors = {**model.state_dict(), "pos_embed": model.pos_embed}
    if path.suffix == ".pt":
        save_pickled_tensors(path, tensors)
    else:
        diffusion = stored.info.diffusion
        about = {} if diffusion["objective"] == "ddpm" else {PROCESS: json.dumps(diffusion, sort_keys=True)}
        save_safetensors(path, tensors, sealed=True, about=about)
    again = stored.info.process.objective if stored.origin.known else None
    return _read_back(path, model, num_heads=stored.config.num_heads, objective=again)


def _refuse_what_a_flag_cannot_say(path: Path, stored: Stored) -> None:
    """Raise UserError for a flow's settings that a bare .pt loses, and that --objective does not bring back."""
    diffusion = stored.info.diffusion
    names = ["prediction", "time_shift", *(["path"] if diffusion.get("path") == "vp" else [])]
    lost = [f"its {name} is {diffusion[name]}" for name in names if name in diffusion]
    if path.suffix == ".pt" and diffusion["objective"] != "ddpm" and lost:
        raise UserError(
            f"a bare .pt has no place for that {'; '.join(lost)}, and whoever loads it would sample nonsense; write "
            f"--to {path.with_suffix('.safetensors')}, whose metadata says it, or keep it with --format dit"
        )


def _unsaid(stored: Stored) -> list[str]:
    """What of a network's process and labels is not the release's, and has no place in its format."""
    from pipeline.diffusion import make_process

    variance = "learned-range" if stored.config.learn_sigma else "fixed-large"
    usual = {**make_process({"objective": "ddpm"}).to_json(), "variance": variance}
    diffusion = stored.info.process.to_json()
    unsaid = [
        f"its {name} is {value}"
        for name, value in diffusion.items()
        if name not in OF_TRAINING and value != usual.get(name)
    ]
    if not stored.config.has_null_class:
        unsaid.append("its label table has no row for no class, so its last class would be taken for it")
    return unsaid


def _write_diffusers(path: Path, stored: Stored, model: DiT, options: ConvertOptions) -> list[str]:
    make_folder(path)
    write_diffusers(path, stored, vae=options.vae)
    return [*_diffusers_lines(model, path / "transformer"), *_read_back(path, model, weights=stored.weights)]


_Writer = Callable[[Path, Stored, DiT, ConvertOptions], list[str]]
_WRITERS: dict[str, _Writer] = {"dit": _write_dit, "facebook": _write_release, "diffusers": _write_diffusers}


def _read_back(
    path: Path, model: DiT, *, weights: str = "ema", num_heads: int | None = None, objective: str | None = None
) -> list[str]:
    again = build_model(read_stored(path, weights=weights, num_heads=num_heads, objective=objective), origin=path)
    return [f"read back: {_checked(forward_difference(model, again))}"]


def _vae_to_record(stored: Stored, override: str | None) -> dict[str, Any]:
    """What the new checkpoint says of its VAE: the one given, if it can be it, or the recorded one."""
    from pipeline.vae import check_latents, find_vae, load_vae

    recorded = stored.info.vae
    name = recorded.name or ""
    if override is not None:
        vae = find_vae(recorded, override)
        check_latents(vae, channels=stored.config.in_channels)
        return vae.describe()
    known = recorded.recorded or {}
    needed = name != "" and Path(name).is_dir() and "sha256" not in known
    return recorded_vae(recorded, load_vae(name) if needed else None)


def _given_names(options: ConvertOptions, config: DiTConfig) -> dict[str, list[str]]:
    if options.class_names is None:
        return {}
    names = _read_names(options.class_names)
    if len(names) != config.num_classes or not all(names):
        raise UserError(
            f"--class-names {options.class_names} has {len(names)} lines, but one name per line is needed for each "
            f"of the {config.num_classes} classes"
        )
    return {"classes": names, "class_ids": names}


def _read_names(path: str) -> list[str]:
    try:
        return [line.strip() for line in read_regular(Path(path)).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {path} cannot be read as text: {error}") from error
