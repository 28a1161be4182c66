"""Every form of a trained DiT that exists, read the same way and strictly.

Our own folders come through `folder`, bare state dicts through `release`, diffusers' through `diffusers_read`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.checkpoint.diffusers_read import read_diffusers, recorded_weights, transformer_folder, weight_paths
from pipeline.checkpoint.folder import FORMAT, find_damage, newest_checkpoint, recorded_files, weight_files
from pipeline.checkpoint.info import CheckpointInfo, make_info, read_info
from pipeline.checkpoint.origins import Origin, check_objective, origin_of, plain_network
from pipeline.checkpoint.release import default_info, infer_config
from pipeline.checkpoint.remote import localized
from pipeline.checkpoint.snapshots import asked_average, reconstruct
from pipeline.checkpoint.tensor_files import files_of, find_changed, index_path, join_names, read_tensors, whole_file
from pipeline.checkpoint.weight_files import SUFFIXES, read_weight_file
from pipeline.diffusion.process import Process
from pipeline.dit import DiT, DiTConfig
from pipeline.dit.config import ConfigError
from pipeline.hub import HUB, HUB_NAME, fetch_network
from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.publish import finish


class Stored(NamedTuple):
    """A network's weights as they lie on disk, in the release's names, and what is known of them."""

    state: dict[str, Tensor]
    config: DiTConfig
    info: CheckpointInfo
    """The content of a checkpoint's config.json; the release's facts for weights that came without one."""
    weights: str
    """Which weights these are: "raw", "ema", "ema-NAME"."""
    folder: Path | None
    """The checkpoint folder they came from; None for other people's forms."""
    diffusers: Path | None = None
    """The diffusers transformer folder they came from, if they did."""
    origin: Origin = Origin(diffusion=None)
    """What is known of what they were trained for."""
    checks: tuple[Callable[[], str | None], ...] = ()
    """Each reads one of the files again and says what differs from what was written, if anything does."""

    def check_objective_is_known(self) -> None:
        """Say what was taken for granted of what the network was trained for.

        Raises:
            UserError: it cannot be known, and was not given.
        """
        if not self.origin.known:
            raise UserError(str(self.origin.note))
        if self.origin.note is not None:
            say(f"note: {self.origin.note}")

    def damage(self) -> str | None:
        """What differs from what was written in the files that these weights were read from, or None."""
        return "; ".join(fault for check in self.checks if (fault := check())) or None


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A network ready to use, in eval mode on the CPU, and all that sampling needs to know."""

    model: DiT
    config: DiTConfig
    info: CheckpointInfo
    process: Process
    weights: str
    folder: Path | None


def load_checkpoint(path: str | Path, num_heads: int | None = None) -> tuple[DiT, DiTConfig]:
    """A network in eval mode and its configuration, from any form of checkpoint (see `read_checkpoint`); EMA weights.

    Args:
        num_heads: attention heads; needed only for a bare state dict of unknown width.

    Raises:
        UserError: as `read_checkpoint`.
    """
    stored = _find(path, "ema", num_heads, None)
    with _checked_meanwhile(stored, path, verify=True):
        return build_model(stored, origin=path), stored.config


def read_checkpoint(
    path: str | Path,
    *,
    weights: str = "ema",
    num_heads: int | None = None,
    objective: str | None = None,
    verify: bool = True,
) -> Checkpoint:
    """A network in eval mode with all that sampling needs, from any form that exists.

    Forms: a run folder (its newest checkpoint) or a checkpoint folder, also behind a URL, one weight file of it, a bare
    state dict in the release's names (.pt, .pth, .safetensors), a diffusers DiT folder (pipeline or transformer), and
    by its name on the Hub, OWNER/NAME or hf:OWNER/NAME, a checkpoint folder or a diffusers pipeline.

    Args:
        weights: "ema", "raw", the NAME of a further average, or "sigma=S" for the power-function average of that
            width, made of those that a run keeps ("sigma=S@STEP" at a step other than the checkpoint's).
        objective: what bare weights were trained for, which they do not say.
        verify: compare the files that are read with the checksums that were recorded, while they are read.

    Raises:
        UserError: nothing is there, it is damaged or of an unknown version, the weights are not in it, or its tensors
            are not exactly those of its configuration; or what it was trained for is neither known nor given.
    """
    stored = _find(path, weights, num_heads, objective)
    stored.check_objective_is_known()
    with _checked_meanwhile(stored, path, verify=verify):
        model = build_model(stored, origin=path)
    return Checkpoint(
        model=model,
        config=stored.config,
        info=stored.info,
        process=stored.info.process,
        weights=stored.weights,
        folder=stored.folder,
    )


def build_model(stored: Stored, *, origin: object) -> DiT:
    """The network of these weights, in eval mode.

    Raises:
        UserError: tensors are missing, surplus or of another shape; every one is listed.
    """
    _check_magnitude(stored, origin)
    try:
        model = DiT(stored.config, seed=None)
    except ConfigError as error:
        raise UserError(f"{origin}: {error}") from error
    load_strictly(model, stored.state, origin=origin)
    return model.eval()


def _check_magnitude(stored: Stored, origin: object) -> None:
    """Raise UserError for a network that is many times its weights, before a module or memory is made for it.

    Whatever is closer is compared tensor by tensor later.
    """
    config, held = stored.config, sum(tensor.numel() for tensor in stored.state.values())
    described = config.least_parameters
    if described > 8 * held + 10**8:
        raise UserError(
            f"{origin} describes a network of at least {described:.3g} parameters (depth {config.depth:,}, "
            f"hidden_size {config.hidden_size:,}), but its weights hold {held:,}; it is damaged, restore it"
        )


def load_strictly(model: DiT, state: Mapping[str, Tensor], *, origin: object) -> None:
    """Copy a state dict into a network, if it has exactly the network's tensors; `pos_embed` is passed over.

    Raises:
        UserError: tensors are missing, surplus or of another shape; every one is listed.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in state.items() if name != "pos_embed"}
    shapes = [
        f"{name} {found[name]} instead of {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    faults = {
        "of no floating-point type": [
            f"{name} {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()
        ],
        "missing": wanted.keys() - found.keys(),
        "surplus": found.keys() - wanted.keys(),
        "of another shape": shapes,
    }
    if any(faults.values()):
        lists = "; ".join(f"{len(names)} {kind}: {join_names(names)}" for kind, names in faults.items() if names)
        raise UserError(f"{origin} does not fit its network and is not loaded: {lists}")
    model.load_state_dict({name: state[name] for name in wanted})


def read_stored(
    path: str | Path,
    *,
    weights: str = "ema",
    num_heads: int | None = None,
    objective: str | None = None,
    verify: bool = True,
) -> Stored:
    """Weights and what is known of them, from any form, without building the network.

    Args:
        objective: what bare weights were trained for, which they do not say.
        verify: compare the files that are read with the checksums that were recorded.

    Raises:
        UserError: nothing is there, it is damaged or of an unknown version, or the weights are not in it.
    """
    stored = _find(path, weights, num_heads, objective)
    with _checked_meanwhile(stored, path, verify=verify):
        return stored


@contextmanager
def _checked_meanwhile(stored: Stored, origin: object, *, verify: bool) -> Iterator[None]:
    """Look at the checksums in another thread while the block reads the same files; say what has none.

    Raises:
        UserError: a file differs from what was written. That comes before whatever the block found wrong.
    """
    if not verify:
        yield
        return
    if not stored.checks and stored.folder is not None:
        say(f"{origin} has no checksums, so that its weights are not checked for damage")
    with ThreadPoolExecutor(1, "checksums") as pool:
        damage = pool.submit(stored.damage)
        try:
            yield
        finally:
            if damage.result():
                raise UserError(
                    f"{origin} is damaged: {damage.result()}; restore it or take another one (or pass "
                    f"--no-verify-weights, if it was changed on purpose)"
                )


def _find(path: str | Path, weights: str, num_heads: int | None, objective: str | None) -> Stored:
    place = localized(path, averages=asked_average(weights) is not None)
    finish(place.absolute())
    if place.is_dir():
        return _says_itself(_from_folder(place, weights, num_heads), objective, path)
    place = whole_file(place)
    if place.is_file() or index_path(place).is_file():
        return _from_file(place, weights, num_heads, objective)
    name = str(path).removeprefix(HUB)
    if HUB_NAME.fullmatch(name) and (name != str(path) or place.suffix not in SUFFIXES):
        return _says_itself(_from_hub(name, weights, num_heads), objective, path)
    raise UserError(
        f"there is no checkpoint at {path}; give a run folder, a checkpoint folder, a weight file "
        f"({', '.join(SUFFIXES)}), a diffusers folder or a Hub name (OWNER/NAME, or hf:OWNER/NAME)"
    )


def _from_hub(name: str, weights: str, num_heads: int | None) -> Stored:
    wanted = "model" if weights == "raw" else weights
    folder = fetch_network(
        name, [f"{stem}{part}.safetensors" for stem in (wanted, f"ema-{weights}") for part in ("", "-?????-of-?????")]
    )
    if (folder / "model_index.json").is_file():
        return _from_diffusers(folder, weights, num_heads, hub_name=name)
    read_info(folder)
    names = {weights, f"ema-{weights}"}
    if asked_average(weights) is None and not names & weight_files(folder).keys():
        known = [file.removesuffix(".safetensors").replace("model", "raw") for file in recorded_files(folder) or ()]
        if names & {*known}:
            raise UserError(
                f"the {weights} weights of {name} are not in the local Hub cache, and the Hub does not give them; go "
                f"online once, or give a local folder"
            )
        advice = f"--weights {' or '.join(known)}" if known else "other --weights"
        raise UserError(f"{name} on the Hub has no {weights} weights; pass {advice} (--init-weights to dit-train)")
    return _from_checkpoint(folder, weights, num_heads)


def _from_folder(folder: Path, weights: str, num_heads: int | None) -> Stored:
    if (folder / "model_index.json").is_file() or _is_diffusers_config(folder / "config.json"):
        return _from_diffusers(folder, weights, num_heads)
    if (folder / "config.json").is_file():
        return _from_checkpoint(folder, weights, num_heads)
    run = folder.parent if folder.name == "checkpoints" else folder
    newest = newest_checkpoint(run)
    if newest is not None:
        return _from_checkpoint(newest, weights, num_heads)
    if (run / "checkpoints").is_dir() or (run / "config.yaml").is_file():
        raise UserError(f"{run} is a run without a checkpoint yet; let dit-train go on until it has saved one")
    raise UserError(
        f"{folder} is no checkpoint: it has neither config.json, nor checkpoints/step-… inside, nor model_index.json"
    )


def _from_checkpoint(folder: Path, weights: str, num_heads: int | None) -> Stored:
    asked = asked_average(weights)
    if asked is not None:
        return _reconstructed(folder, *asked, weights, num_heads)
    have = weight_files(folder)
    name = weights if weights in have else f"ema-{weights}"
    if name not in have:
        read_info(folder)
        names = [known.removeprefix("ema-") for known in have]
        raise UserError(
            f"{folder} has no {weights} weights; pass --weights {' or '.join(names)} (--init-weights to dit-train)"
            if names
            else f"{folder} has no weights (*.safetensors); the checkpoint is not whole, restore it"
        )
    return _own_weights(folder, have[name], name, num_heads)


def _reconstructed(folder: Path, sigma: float, step: int | None, weights: str, num_heads: int | None) -> Stored:
    """The power-function average of a width, made of those that the run keeps."""
    info, config = _own_settings(folder, num_heads)
    state, about, checks = reconstruct(folder, sigma, step, own_step=info.step, held=info.training.ema_sigma)
    state, config, info = _without_aligners(state, config, info)
    training = {**info.training, "average": about}
    averages = [file for name, file in weight_files(folder).items() if name.startswith("ema-sigma-")]
    names = ("config.json", *(part.name for file in averages for part in files_of(file)))
    own = [] if recorded_files(folder) is None else [partial(find_damage, folder, names)]
    return Stored(
        state, config, make_info(info, step=about["step"], training=training), weights, folder, checks=(*own, *checks)
    )


def _own_settings(folder: Path, num_heads: int | None) -> tuple[CheckpointInfo, DiTConfig]:
    info = read_info(folder)
    _check_heads(num_heads, info.network, folder)
    return info, info.network


def _own_weights(folder: Path, file: Path, weights: str, num_heads: int | None) -> Stored:
    info, config = _own_settings(folder, num_heads)
    names = ("config.json", *(part.name for part in files_of(file)))
    checks = () if recorded_files(folder) is None else (partial(find_damage, folder, names),)
    state = read_tensors(file)
    state, config, info = _without_aligners(state, config, info)
    return Stored(state, config, info, weights, folder, checks=checks)


def _without_aligners(
    state: dict[str, Tensor], config: DiTConfig, info: CheckpointInfo
) -> tuple[dict[str, Tensor], DiTConfig, CheckpointInfo]:
    """Without what served training alone."""
    if not config.align_latent and not config.align_features:
        return state, config, info
    config = dataclasses.replace(config, align_latent=False, align_features=0)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(("aligner.", "projector."))}
    return kept, config, make_info(info, model=config.to_json())


def _says_itself(stored: Stored, objective: str | None, origin: object) -> Stored:
    """The weights of a form that says what they were trained for, if the user does not say something else."""
    check_objective(objective, stored.info.process.objective, origin)
    return stored


def _from_file(file: Path, weights: str, num_heads: int | None, objective: str | None) -> Stored:
    beside = file.with_name("config.json")
    if file.suffix == ".safetensors" and _is_diffusers_config(beside):
        return _says_itself(_from_diffusers(file.parent, weights, num_heads), objective, file)
    if file.suffix == ".safetensors" and beside.is_file() and _format_of(beside) == FORMAT:
        stored = _own_weights(file.parent, file, file.stem.replace("model", "raw"), num_heads)
        return _says_itself(stored, objective, file)
    if weights not in {"ema", "raw"}:
        raise UserError(
            f"{file} has no {weights} weights, only its own; pass --weights ema or raw (--init-weights to dit-train)"
        )
    content = read_weight_file(file, weights=weights)
    state, projectors = plain_network(content.tensors)
    if projectors:
        say(f"{projectors} tensors of REPA's projectors in {file} are set aside; sampling has no use for them")
    config = infer_config(state, num_heads=num_heads, origin=file)
    origin = origin_of(file, content.arguments, config, projectors=bool(projectors), objective=objective)
    info = make_info(default_info(config, diffusion=origin.diffusion), origin=file, step=content.step)
    checks = tuple(partial(find_changed, part) for part in files_of(file))
    return Stored(state, config, info, weights, None, origin=origin, checks=checks)


def _from_diffusers(folder: Path, weights: str, num_heads: int | None, *, hub_name: str | None = None) -> Stored:
    state, config, info = read_diffusers(folder, hub_name=hub_name)
    _check_heads(num_heads, config, hub_name or folder)
    transformer = transformer_folder(folder)
    checks = tuple(partial(find_changed, file) for file in weight_paths(transformer))
    weights = recorded_weights(folder) or weights
    return Stored(state, config, info, weights, None, diffusers=transformer, checks=checks)


def _check_heads(num_heads: int | None, config: DiTConfig, origin: object) -> None:
    if num_heads not in {None, config.num_heads}:
        raise UserError(f"--num-heads {num_heads} contradicts {origin}, whose network has {config.num_heads}; drop it")


def _format_of(path: Path) -> object:
    content = read_json(path)
    return content.get("format") if isinstance(content, dict) else None


def _is_diffusers_config(path: Path) -> bool:
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and "_class_name" in content
