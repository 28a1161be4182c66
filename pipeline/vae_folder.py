"""Where a VAE's files lie and what they are: find the folder, know it by its fingerprint, load the model strictly.

Only safetensors are read, whatever else lies in the folder, and no code that came with the weights is ever run.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import torch
from msgspec import Meta

from pipeline.hub import POINTER_ADVICE, fetch, is_pointer, weight_patterns
from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import Finite, Passed, check_regular, shortened, typed

DEMO_FOLDER = Path(__file__).parent / "assets" / "demo-vae"
KINDS = {
    "AutoencoderKL": "moments",
    "AutoencoderTiny": "point",
    "AutoencoderDC": "point",
    "AutoencoderRAE": "point",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_SHOWN = 5
"""Tensors that are named in one sentence."""
_LONGEST = 4
"""Times its longest tensor a network may be wide: parts of one tensor stand for several in some."""


Size: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 20)]
"""Of a part of a network, of an image in pixels."""
Sizes: TypeAlias = Annotated[tuple[Size, ...], Meta(min_length=1, max_length=1000)]
Layers: TypeAlias = Annotated[int, Meta(ge=0, le=10_000)]
LayersOfBlocks: TypeAlias = Annotated[tuple[Layers, ...], Meta(min_length=1, max_length=1000)]
_AGAIN = "fetch it again, or give another folder"


@dataclass(frozen=True, kw_only=True, eq=False)
class VaeConfig(Passed):
    """A VAE's config.json: what is asked of it here, and the sizes that its library makes modules by."""

    _class_name: str = "AutoencoderKL"
    in_channels: Size = 3
    out_channels: Size = 3
    latent_channels: Size | None = None
    block_out_channels: Sizes | None = None
    encoder_block_out_channels: Sizes | None = None
    decoder_block_out_channels: Sizes | None = None
    layers_per_block: Layers | LayersOfBlocks | None = None
    encoder_layers_per_block: Layers | LayersOfBlocks | None = None
    decoder_layers_per_block: Layers | LayersOfBlocks | None = None
    norm_num_groups: Size | None = None
    sample_size: Size | Sizes | None = None
    patch_size: Size | None = None
    encoder_hidden_size: Size | None = None
    scaling_factor: Finite | None = None
    shift_factor: Finite | None = None

    @property
    def class_name(self) -> str:
        return self._class_name


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def find_folder(name: str) -> tuple[Path, str]:
    """(the folder that holds config.json and the weights, the name to remember).

    Raises:
        UserError: there is neither such a folder nor such a repository.
    """
    if name == "demo":
        return DEMO_FOLDER, name
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        inner = folder if _holds_vae(folder) or not _holds_vae(folder / "vae") else folder / "vae"
        if not (inner / "config.json").exists():
            raise UserError(
                f"the folder {name} is no VAE in diffusers' layout: it has no config.json, nor has a folder `vae` in it"
            )
        return inner, folder.resolve().name
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")) or folder.exists():
        raise UserError(
            f"there is no VAE folder {name!r}; a VAE is `demo`, a local folder in diffusers' layout, "
            "or a Hub name such as stabilityai/sd-vae-ft-ema"
        )
    return _from_hub(name), name


def _holds_vae(folder: Path) -> bool:
    """Whether the folder's config.json is one of a VAE that can be used, and not of what the VAE is part of."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() and not is_pointer(path) else None
    return isinstance(config, dict) and _is_known(config.get("_class_name"))


def _is_known(class_name: object) -> bool:
    return isinstance(class_name, str) and class_name in KINDS


def _from_hub(name: str) -> Path:
    """The VAE's folder in the Hub's local cache, from where it is taken if it is whole, else downloaded into it."""
    patterns = [*weight_patterns("", ".safetensors"), *weight_patterns("vae/", ".safetensors")]
    for offline in (True, False):  # the local cache first: no network where nothing is missing
        try:
            snapshot = fetch(name, patterns, offline=offline)
        except UserError as error:
            raise UserError(f"the VAE {error}") from error
        if snapshot is None:
            continue
        for folder in (snapshot, snapshot / "vae"):
            if _holds_vae(folder) and not _missing_weights(folder):
                return folder
            if (folder / "config.json").exists() and not offline:
                check_weights(folder, name, or_else="go online once, or give a local folder")
                return folder
    raise UserError(f"{name} on the Hub holds no VAE: it has neither config.json nor vae/config.json")


def read_config(folder: Path, name: str) -> VaeConfig:
    """The configuration.

    Raises:
        UserError: it is of no class that can be used, or its values are of other types or out of bounds.
    """
    if is_pointer(folder / "config.json"):
        raise UserError(f"{folder / 'config.json'} {POINTER_ADVICE}")
    config = read_json(folder / "config.json")
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if not _is_known(class_name):
        found = (
            f"a {shortened(class_name).strip(chr(39))}"
            if class_name
            else "not a diffusers model (its config.json has no _class_name)"
        )
        raise UserError(f"{name} is {found}; the VAEs that can be used are {', '.join(KINDS)}")
    _check_settings(config, name)
    return typed(config, VaeConfig, f"{folder / 'config.json'} is damaged", advice=_AGAIN)


def _check_settings(config: dict[str, Any], name: str) -> None:
    """Raise UserError unless the VAE takes and gives RGB, and its latents are scaled by a number."""
    for key, what in (("in_channels", "takes"), ("out_channels", "gives")):
        if config.get(key, 3) != 3:
            raise UserError(
                f"the VAE {name} {what} images of {shortened(config[key])} channels ({key} in its config.json), and "
                f"images here have the 3 of RGB; give a VAE of RGB images"
            )
    scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor")
    for key, value, may_miss in (("scaling_factor", scale, False), ("shift_factor", shift, True)):
        if not (value is None and may_miss) and not (_is_finite(value) and (may_miss or value != 0)):
            raise UserError(
                f"the VAE {name} has {key} {shortened(value)} in its config.json, where a number is needed; write "
                f"there what it was trained with (Stable Diffusion's first VAEs have a scaling_factor of 0.18215)"
            )
    for key in ("latents_mean", "latents_std"):
        values = config.get(key)
        if values is not None and not (
            isinstance(values, list) and all(_is_finite(value) and (value or key != "latents_std") for value in values)
        ):
            raise UserError(
                f"the VAE {name} has {key} {shortened(values)} in its config.json, where a list of numbers is needed"
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model folder, sorted.

    Raises:
        UserError: some are missing.
    """
    check_weights(folder, name)
    files = _named_weights(folder)
    for file in files:
        check_regular(file)
    return files


def check_weights(folder: Path, name: str, *, or_else: str = "fetch it again, or give another folder") -> None:
    """Raise UserError, naming what lies there instead, unless all safetensors files of a model folder are there."""
    pointers = [path for path in _named_weights(folder) if is_pointer(path)]
    if pointers:
        raise UserError(f"the VAE {name} is not whole: {pointers[0]} {POINTER_ADVICE}")
    missing = [path.name for path in _missing_weights(folder)]
    if not missing:
        return
    variants = sorted(path.name for path in folder.glob("diffusion_pytorch_model.*.safetensors"))
    variants = [file for file in variants if "-of-" not in file]
    if variants:
        word = variants[0].split(".")[1]
        or_else = (
            f"there is {', '.join(variants)}, in another precision: from_pretrained(…, variant={word!r}), then "
            f"save_pretrained, writes it as the other"
        )
    elif any(folder.glob("*.bin")):
        or_else = "its .bin file is a pickle, which could run code and is never loaded: convert it to safetensors"
    raise UserError(f"the VAE {name} has no {', '.join(missing)}; {or_else}")


def _named_weights(folder: Path) -> list[Path]:
    """One whole file, or what the index of shards names."""
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        return [folder / shard for shard in shard_names(folder / INDEX)]
    return [folder / WEIGHTS]


def _missing_weights(folder: Path) -> list[Path]:
    return [path for path in _named_weights(folder) if not path.exists()]


def weight_map(index: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """{tensor: the file that holds it} of an index of weights.

    Raises:
        UserError: it is damaged, or names files elsewhere.
    """
    wanted = f"must map every tensor to a {suffix} file beside it"
    places = typed(read_json(index), _Index, f"{index} {wanted}", advice="restore the file").weight_map
    names = sorted({*places.values()})
    outside = [name for name in names if not name.endswith(suffix) or Path(name).name != name or not name.isprintable()]
    if outside or not names:
        what = f"names {', '.join(map(shortened, outside[:3]))}" if outside else "names none"
        raise UserError(f"{index} {wanted}, but {what}; restore the file")
    return places


def shard_names(index: Path, suffix: str = ".safetensors") -> list[str]:
    """The files that an index of weights names, sorted; raises as `weight_map`."""
    return sorted({*weight_map(index, suffix).values()})


def load_model(folder: Path, class_name: str, name: str, dtype: torch.dtype) -> Any:
    """The diffusers model with exactly the folder's weights.

    Raises:
        UserError: the weights are damaged or do not fit the configuration.
    """
    import diffusers

    model_class = getattr(diffusers, class_name, None)
    if model_class is None:
        raise UserError(
            f"diffusers {diffusers.__version__} has no {class_name}, which the VAE {name} is; install a newer diffusers"
        )
    if class_name == "AutoencoderRAE" and find_spec("transformers") is None:  # diffusers fails with a NameError
        raise UserError(f"the VAE {name} is an {class_name}, which needs transformers; pip install transformers")
    with _explained(folder):
        model, report = model_class.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    wrong = {what: report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[what]}
    if wrong:
        details = "; ".join(f"{what.replace('_', ' ')}: {_first(keys)}" for what, keys in wrong.items())
        raise UserError(f"the weights of the VAE {name} do not fit its config.json ({details})")
    return model


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn a damaged file, a setting that fits no model or a library that is not there into a `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"the VAE in {path} needs a library that is not installed: {_one_line(error)}") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # libraries have many for files that are damaged and settings that fit no model
        raise UserError(f"the VAE in {path} cannot be loaded, its files are damaged: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:300].rstrip("."))


def _first(keys: Collection[object]) -> str:
    shown = sorted(map(str, keys))[:_SHOWN]
    return ", ".join([*shown, *([f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else [])])


def fingerprint(folder: Path) -> str:
    """SHA-256, in hexadecimal, of what a diffusers model folder computes, the same on every machine and for ever.

    Hashed are the keys of `config.json` that do not start with `_`, as one JSON object (sorted keys, separators `,`
    and `:`, ASCII only) and a newline; then for every tensor of the safetensors files, in the order of the names'
    code points, the JSON array [name, dtype, shape] (dtype by its name in safetensors: `F32`, `F16`, `BF16`, …) and a
    newline, followed by its values, row-major and little-endian. How tensors are spread over files, the files'
    metadata and the version of diffusers that wrote them do not count.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
    files = weight_files(folder, str(folder))
    with _explained(folder):
        check_sizes(config, files, str(folder))
        return fingerprint_of(config, files)


def check_sizes(config: Mapping[str, Any], files: Sequence[Path], name: str) -> None:
    """Raise UserError for settings of a network larger than its weights, before a module is made by them.

    No network has more layers than tensors, nor is it much wider than its longest tensor, nor has it more of anything
    than its weights have bytes.
    """
    from safetensors import safe_open

    shapes: list[list[int]] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            shapes += (file.get_slice(name).get_shape() for name in names)
    tensors, held = len(shapes), sum(path.stat().st_size for path in files)
    longest = max((side for shape in shapes for side in shape), default=0)
    found: list[tuple[str, Any]] = list(config.items())
    for key, value in found:
        if isinstance(value, dict | list):
            found += value.items() if isinstance(value, dict) else [(key, inner) for inner in value]
        most = tensors if re.search("layer|depth|blocks", str(key)) else held
        is_side = re.search("(hidden_sizes?|intermediate_size|out_channels|latent_channels|embed_dim)$", str(key))
        most = min(most, _LONGEST * longest) if is_side else most
        if isinstance(value, int) and abs(value) > most:
            raise UserError(
                f"{name} has {shortened(key)[1:-1]} {shortened(value)} in its config.json, but its weights are "
                f"{tensors:,} tensors of {held:,} bytes, none longer than {longest:,}; restore the files"
            )


def fingerprint_of(config: Mapping[str, Any], files: Sequence[Path]) -> str:
    """The `fingerprint` of these settings and of the tensors in these safetensors files."""
    from safetensors import safe_open

    digest = hashlib.sha256(_canonical(config))
    places = {}
    with ExitStack() as opened:  # opening a file reads the list of its tensors: once, not for each of them
        for path in files:
            file = opened.enter_context(safe_open(path, framework="pt"))
            places.update(dict.fromkeys(file.keys(), file))
        for name in sorted(places):
            view = places[name].get_slice(name)
            digest.update(_canonical([name, view.get_dtype(), view.get_shape()]))
            digest.update(places[name].get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
