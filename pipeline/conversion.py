"""One form of checkpoint into another: written beside its target, read back, compared, and only then put in place."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.checkpoint import Stored, build_model, read_stored, write_model_files
from pipeline.console import say, warn
from pipeline.convert import ConvertOptions
from pipeline.diffusers_export import recorded_vae, write_diffusers
from pipeline.dit import DiT, DiTConfig
from pipeline.errors import UserError
from pipeline.files import explained_writes, flush_file, flush_folder, make_folder, publish_folder, remove_folder
from pipeline.foreign import save_pickled_tensors, save_safetensors
from pipeline.parity import TOLERANCE, diffusers_difference, forward_difference

MENDING = "norm1.emb.time_proj.downscale_freq_shift = 0 and norm3.eps = 1e-6 in every block"


def convert(options: ConvertOptions) -> list[str]:
    """Convert as the options say; the lines to print, which state the parity of the forward pass.

    Raises:
        UserError: the source cannot be read, the target exists or cannot hold the network, or the converted network
            does not compute the same, in which case nothing is left behind.
    """
    target = Path(options.to)
    _check_target(options, target)
    stored = read_stored(options.from_, weights=options.weights, num_heads=options.num_heads)
    stored = stored._replace(info={**stored.info, **_given_names(options, stored.config)})
    model = build_model(stored, origin=options.from_)
    lines = [_summary(stored)]
    if stored.diffusers is not None:
        lines += _diffusers_lines(model, stored.diffusers)
    with _work_folder(target) as work:
        lines += _WRITERS[options.format](work / target.name, stored, model, options)
        _put_in_place(work / target.name, target)
    say(f"written: {target}")
    return lines


def import_store(options: ConvertOptions) -> list[str]:
    """Turn a folder of other people's features into a latent store; the lines to print.

    Raises:
        UserError: the folders do not fit together, or the target holds something else.
    """
    from pipeline.latents.imports import STABLE_DIFFUSION, import_numpy_features
    from pipeline.latents.manifest import MANIFEST_FILE, read_manifest
    from pipeline.latents.records import SKIPPED_FILE
    from pipeline.vae import load_vae

    target = Path(options.to)
    if options.overwrite and (target / MANIFEST_FILE).is_file():
        for name in (MANIFEST_FILE, *(shard.file for shard in read_manifest(target).shards), SKIPPED_FILE):
            for file in (target / name, (target / name).with_suffix(".json")):
                file.unlink(missing_ok=True)
    vae = load_vae(options.vae) if options.vae else None
    names = _read_names(options.class_names) if options.class_names else None
    manifest = import_numpy_features(
        options.from_,
        options.to,
        vae=vae.describe() if vae else STABLE_DIFFUSION,
        downsample=vae.downsample if vae else 8,
        class_names=names,
    )
    latent, known_vae = manifest.latent, manifest["vae"]
    what = f"{manifest.samples:,} points of {latent.channels}×{latent.height}×{latent.width}"
    how = f"unscaled by {known_vae['scaling_factor']} ({known_vae['name']})"
    return [f"{what} in {len(manifest.shards)} shards, {len(manifest['classes'])} classes, {how}"]


def _summary(stored: Stored) -> str:
    config = stored.config
    return (
        f"{stored.weights} weights: {config.conditioning}, width {config.hidden_size}, depth {config.depth}, "
        f"{config.num_heads} heads, patch {config.patch_size}, latent {config.in_channels}×{config.height}×"
        f"{config.width}, {config.num_classes} classes"
    )


def _diffusers_lines(model: DiT, folder: Path) -> list[str]:
    as_is, mended = diffusers_difference(model, folder)
    return [
        f"diffusers as it is: max abs difference {as_is:.3g} (its timestep frequencies differ from the release's)",
        f"with {MENDING}: {_checked(mended)}",
    ]


def _checked(difference: float) -> str:
    if not difference < TOLERANCE:
        raise UserError(
            f"the converted network does not compute the same: max abs difference {difference:.3g} is not below "
            f"{TOLERANCE:g}; nothing was written, please report it"
        )
    return f"max abs difference {difference:.3g} (below {TOLERANCE:g})"


def _write_dit(path: Path, stored: Stored, model: DiT, options: ConvertOptions) -> list[str]:
    make_folder(path)
    info = {**stored.info, "vae": _vae_to_record(stored.info["vae"], options.vae)}
    name = "model" if stored.weights == "raw" else stored.weights
    state = model.state_dict()
    raw = state if name == "model" else None
    write_model_files(path, info=info, model=raw, averages={} if name == "model" else {name: state})
    return _read_back(path, model, options)


def _write_release(path: Path, stored: Stored, model: DiT, options: ConvertOptions) -> list[str]:
    config = stored.config
    reasons = {
        f"its conditioning is {config.conditioning}, not adaln-zero": config.conditioning != "adaln-zero",
        f"its latent is {config.height}×{config.width}, not square": config.height != config.width,
        "its queries and keys are normalised": config.qk_norm,
    }
    wrong = [reason for reason, applies in reasons.items() if applies]
    if wrong:
        raise UserError(f"the public release cannot hold this network: {'; '.join(wrong)}; keep it with --format dit")
    if stored.info["diffusion"].get("objective") != "ddpm":
        warn(
            "a bare state dict does not say that this network's objective is flow; the release's samplers are not "
            "for it"
        )
    tensors = {**model.state_dict(), "pos_embed": model.pos_embed}
    (save_pickled_tensors if path.suffix == ".pt" else save_safetensors)(path, tensors)
    return _read_back(path, model, options, num_heads=config.num_heads)


def _write_diffusers(path: Path, stored: Stored, model: DiT, options: ConvertOptions) -> list[str]:
    make_folder(path)
    write_diffusers(path, stored, vae=options.vae)
    return [*_diffusers_lines(model, path / "transformer"), *_read_back(path, model, options)]


_Writer = Callable[[Path, Stored, DiT, ConvertOptions], list[str]]
_WRITERS: dict[str, _Writer] = {"dit": _write_dit, "facebook": _write_release, "diffusers": _write_diffusers}


def _read_back(path: Path, model: DiT, options: ConvertOptions, num_heads: int | None = None) -> list[str]:
    again = build_model(read_stored(path, weights=options.weights, num_heads=num_heads), origin=path)
    return [f"read back: {_checked(forward_difference(model, again))}"]


def _vae_to_record(recorded: dict[str, Any], override: str | None) -> dict[str, Any]:
    """What the new checkpoint says of its VAE: the one given, or the recorded one wherever it came from."""
    from pipeline.vae import load_vae

    name = str(recorded.get("name") or "")
    if override is not None:
        return load_vae(override).describe()
    known = recorded.get("recorded", {})
    needed = Path(name).is_dir() and "sha256" not in known
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
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {path} cannot be read as text: {error}") from error


def _check_target(options: ConvertOptions, target: Path) -> None:
    """Refuse to replace anything but an earlier conversion, and that only when asked to."""
    if not target.exists():
        return
    if not options.overwrite:
        raise UserError(f"{target} exists; choose another --to, or pass --overwrite to replace it")
    source = Path(options.from_).resolve()
    if source == target.resolve() or target.resolve() in source.parents:
        raise UserError(f"--to {target} is, or holds, what --from {options.from_} reads; choose another --to")
    if options.format == "facebook":
        if target.is_dir():
            raise UserError(f"{target} is a folder, but --format facebook writes one file; choose another --to")
        return
    known = [target / "config.json", target / "model_index.json"]
    if not any(file.is_file() for file in known) or (target / "state").exists():
        raise UserError(f"{target} is not what a conversion leaves, so it is not replaced; choose another --to")


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, gone when the block ends."""
    make_folder(target.absolute().parent)
    work = target.absolute().with_name(f".{target.name}.{os.getpid()}.partial")
    remove_folder(work)
    make_folder(work)
    try:
        yield work
    finally:
        remove_folder(work)


def _put_in_place(finished: Path, target: Path) -> None:
    """Rename what is finished to its final name; what stood there goes once the new one is whole."""
    if not finished.is_dir():
        with explained_writes(target):
            flush_file(finished)
            finished.replace(target)
            flush_folder(target.absolute().parent)
        return
    replaced = finished.with_name(f"{target.name}.replaced") if target.exists() else None
    with explained_writes(target):
        if replaced:
            target.rename(replaced)
        try:
            publish_folder(finished, target)
        except BaseException:
            if replaced:
                replaced.rename(target)
            raise
