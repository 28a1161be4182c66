"""The frozen vision encoder whose features are stored: find it, know it again, load it strictly, pixels → patches.

Any encoder that transformers' AutoModel knows and whose tokens are the patches of a square image, row by row, after
whatever tokens stand before them (a class token, registers): DINOv2, DINOv3, ViT, CLIP and SigLIP, I-JEPA; or whose
last states are a map, as those of ResNet and ConvNeXt are. Only safetensors are read, whatever else lies in the folder,
and no code that came with the weights is ever run.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor, nn

from pipeline.features.manifest import Encoder
from pipeline.hub import POINTER_ADVICE, fetch, is_pointer
from pipeline.runtime.console import printable
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import Finite, Passed, check_regular, typed
from pipeline.vae_folder import Layers, LayersOfBlocks, Size, Sizes, check_sizes, fingerprint_of, shard_names

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_PATTERNS = ["*.json", WEIGHTS, "model-0*.safetensors"]
_EXAMPLE = "facebook/dinov2-base"
_AGAIN = "fetch it again, or give another folder"
_Px: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 12)]
_Settings = TypeVar("_Settings")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Network(Passed):
    """The sizes that transformers makes modules by."""

    hidden_size: Size | Sizes | None = None
    hidden_sizes: Sizes | None = None
    intermediate_size: Size | Sizes | None = None
    num_hidden_layers: Layers | None = None
    depths: LayersOfBlocks | None = None
    num_attention_heads: Size | LayersOfBlocks | None = None
    image_size: _Px | tuple[_Px, ...] | None = None
    patch_size: _Px | tuple[_Px, ...] | None = None
    num_channels: Size | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Config(_Network):
    """An encoder's config.json."""

    model_type: str
    architectures: tuple[str, ...] | None = None
    id2label: dict[str, str] | None = None
    vision_config: _Network | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Processor(Passed):
    """An encoder's preprocessor_config.json."""

    do_center_crop: bool | None = None
    do_rescale: bool | None = None
    do_normalize: bool | None = None
    size: _Px | tuple[_Px, ...] | dict[str, _Px | None] | None = None
    crop_size: _Px | tuple[_Px, ...] | dict[str, _Px | None] | None = None
    rescale_factor: Finite | None = None
    image_mean: Finite | tuple[Finite, ...] | None = None
    image_std: Finite | tuple[Finite, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderFolder:
    """An encoder's files, looked at and not loaded."""

    path: Path
    name: str
    """A Hub name, or the last component of a local folder."""
    kind: str
    """The kind of model, as its config.json has it: dinov2, clip, …"""
    sha256: str
    """As a VAE's fingerprint; the version of transformers that wrote the configuration does not count."""
    resolution: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classes: int = 0
    """How many its classifier tells apart; 0 where it has none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VisionEncoder:
    """A frozen encoder in evaluation mode, and what has to be remembered about it."""

    about: Encoder
    has_cls: bool
    """Whether a class token stands before the patches."""
    device: torch.device
    dtype: torch.dtype
    mean: Float[Tensor, "3 1 1"]
    """What is subtracted from pixels in [0, 1]; on the device, as `std`, which they are divided by then."""
    std: Float[Tensor, "3 1 1"]
    model: nn.Module = field(repr=False)

    @torch.no_grad()
    def tokens(
        self, pixels: Float[Tensor, "n 3 side side"]
    ) -> tuple[Float[Tensor, "n token width"], Float[Tensor, "n width"] | None]:
        """(the patches, row by row; the class token), float32 on the encoder's device, from RGB in [−1, 1].

        They are the encoder's last hidden states, normalised where it does that itself.
        """
        x = (((pixels.to(self.device) + 1) / 2 - self.mean) / self.std).to(self.dtype)
        states = _as_tokens(self.model(pixel_values=x).last_hidden_state).float()
        patches = math.prod(self.about.grid)
        return states[:, -patches:], states[:, 0] if self.has_cls else None


def _as_tokens(states: Tensor) -> Tensor:
    """Last states [n, token, width]; a map [n, width, h, w] row by row."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


def _mean_and_std(folder: EncoderFolder, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (folder.mean, folder.std))
    return mean, std


def find_encoder(name: str) -> EncoderFolder:
    """The folder of an encoder, in the Hub's local cache or where the name says, and what its files say.

    Raises:
        UserError: there is no such encoder, or its files are incomplete or not of an image encoder.
    """
    path, known_as = _find_folder(name)
    for file in ("config.json", "preprocessor_config.json"):
        if not (path / file).exists():
            raise UserError(
                f"the encoder {name} has no {file}; give a folder as save_pretrained of transformers writes it, "
                f"model and image processor, or a Hub name such as {_EXAMPLE}"
            )
    files = _weight_files(path, name)
    config = read_settings(path)
    kept = {key: value for key, value in config.items() if key[:1] != "_" and key != "transformers_version"}
    with _explained(name):
        check_sizes(kept, files, name)
        sha256 = fingerprint_of(kept, files)
    resolution, mean, std = _pixels(path, name)
    classifies = str((config.architectures or ("",))[-1]).endswith("ForImageClassification")
    return EncoderFolder(
        path=path,
        name=known_as,
        kind=config.model_type,
        sha256=sha256,
        resolution=resolution,
        mean=mean,
        std=std,
        classes=len(config.id2label or "01") if classifies else 0,  # two are not written
    )


def read_settings(path: Path) -> _Config:
    """The configuration of the encoder in a folder, whose other JSON files a library can read, too.

    Raises:
        UserError: one of them is damaged, or its values are of other types or out of bounds.
    """
    for beside in path.glob("*.json"):  # all that the library may look into
        read_json(beside)
    config, processor = (
        _settings(path / "config.json", _Config),
        _settings(path / "preprocessor_config.json", _Processor),
    )
    std = processor.image_std
    if 0 in (std if isinstance(std, tuple) else (std,)):
        raise UserError(f"{path / 'preprocessor_config.json'} is damaged: image_std has a 0; {_AGAIN}")
    return config


def _settings(path: Path, kind: type[_Settings]) -> _Settings:
    return typed(read_json(path), kind, f"{path} is damaged", advice=_AGAIN)


def _find_folder(name: str) -> tuple[Path, str]:
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder, folder.resolve().name
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~")) or folder.exists():
        raise UserError(
            f"there is no encoder folder {name!r}; --features takes a local folder in transformers' layout, or a Hub "
            f"name such as {_EXAMPLE}"
        )
    for offline in (True, False):  # the local cache first: no network where nothing is missing
        try:
            snapshot = fetch(name, _PATTERNS, offline=offline)
        except UserError as error:
            raise UserError(f"the encoder {error}") from error
        if snapshot is not None and ((snapshot / WEIGHTS).exists() or (snapshot / INDEX).exists() or not offline):
            return snapshot, name
    raise AssertionError("the network gives a folder or an error")


def _weight_files(folder: Path, name: str) -> list[Path]:
    is_cut = not (folder / WEIGHTS).exists() and (folder / INDEX).exists()
    files = [folder / shard for shard in shard_names(folder / INDEX)] if is_cut else [folder / WEIGHTS]
    for file in files:
        if is_pointer(file):
            raise UserError(f"the encoder {name} is not whole: {file} {POINTER_ADVICE}")
        if file.exists():
            check_regular(file)
        else:
            pickled = "; its .bin file is a pickle, which could run code and is never loaded: convert it to safetensors"
            raise UserError(f"the encoder {name} has no {file.name}{pickled if any(folder.glob('*.bin')) else ''}")
    return files


def _pixels(folder: Path, name: str) -> tuple[int, tuple[float, float, float], tuple[float, float, float]]:
    """(side in pixels, mean, std) of what the encoder's own image processor makes; without its resizing."""
    with _explained(name):
        from transformers import AutoImageProcessor

        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    sides = {side for key in ("shortest_edge", "height", "width") if (side := getattr(size, key, None)) is not None}
    if len(sides) != 1 or not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise UserError(
            f"the encoder {name} takes no square images of 0 … 1 ({size}), so its features cannot be stored"
        )
    if not processor.do_normalize:
        return int(sides.pop()), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    try:
        (red, green, blue), (r, g, b) = map(float, processor.image_mean), map(float, processor.image_std)
    except (TypeError, ValueError) as error:
        raise UserError(f"the encoder {name} takes no RGB: its image_mean is {processor.image_mean}") from error
    return int(sides.pop()), (red, green, blue), (r, g, b)


def load_encoder(folder: EncoderFolder, *, device: torch.device, dtype: torch.dtype) -> VisionEncoder:
    """The encoder with exactly the folder's weights, tried on one black image.

    Raises:
        UserError: its weights do not fit, it needs code of its own, or its tokens are no grid of patches.
    """
    model = _load(folder, "AutoModel", dtype, device)
    model = getattr(model, "vision_model", model)  # of CLIP and the like, the half that sees
    black = torch.zeros(1, 3, folder.resolution, folder.resolution, device=device, dtype=dtype)
    with _explained(folder.name), torch.no_grad():
        states = model(pixel_values=black).last_hidden_state
    patch = getattr(model.config, "patch_size", None)
    side = folder.resolution // patch if isinstance(patch, int) else 0
    side = states.shape[-1] if states.ndim == 4 else side
    states = _as_tokens(states)
    if states.ndim != 3 or not side or states.shape[1] < side * side:
        raise UserError(
            f"the encoder {folder.name} gives {list(states.shape[1:])} for an image of {folder.resolution} pixels and "
            f"patches of {patch}: no grid of patches; give an encoder such as {_EXAMPLE}"
        )
    about = Encoder(
        name=folder.name,
        class_name=type(model).__name__,
        sha256=folder.sha256,
        resolution=folder.resolution,
        grid=(side, side),
        width=states.shape[2],
        mean=folder.mean,
        std=folder.std,
    )
    mean, std = _mean_and_std(folder, device)
    has_cls = states.shape[1] > side * side
    return VisionEncoder(about=about, has_cls=has_cls, device=device, dtype=dtype, mean=mean, std=std, model=model)


def load_image_embedder(
    folder: EncoderFolder, *, device: torch.device
) -> Callable[[Float[Tensor, "n 3 side side"]], Float[Tensor, "n width"]]:
    """CLIP's image half with its projection: RGB in [−1, 1] to embeddings of length 1, float32.

    Raises:
        UserError: the weights are not CLIP's, or do not fit.
    """
    embed = _with_head(folder, "CLIPVisionModelWithProjection", device)
    return lambda pixels: torch.nn.functional.normalize(embed(pixels).image_embeds, dim=1)


def load_classifier(
    folder: EncoderFolder, *, device: torch.device
) -> Callable[[Float[Tensor, "n 3 side side"]], Float[Tensor, "n class"]]:
    """An encoder with its classifier: RGB in [−1, 1] to class scores, float32.

    Raises:
        UserError: the weights do not fit.
    """
    classify = _with_head(folder, "AutoModelForImageClassification", device)
    return lambda pixels: classify(pixels).logits


def _with_head(folder: EncoderFolder, class_name: str, device: torch.device) -> Callable[[Tensor], Any]:
    """What a model of transformers says of RGB in [−1, 1]."""
    model = _load(folder, class_name, torch.float32, device)
    mean, std = _mean_and_std(folder, device)

    @torch.no_grad()
    def say(pixels: Tensor) -> Any:
        return model(pixel_values=((pixels.to(device) + 1) / 2 - mean) / std)

    return say


def _load(folder: EncoderFolder, class_name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model of transformers with exactly the folder's weights, frozen, on the device.

    Raises:
        UserError: its weights do not fit, or it needs code of its own.
    """
    with _explained(folder.name), quiet():
        import transformers

        model, report = getattr(transformers, class_name).from_pretrained(
            folder.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing or report["mismatched_keys"]:
        wrong = ", ".join(map(str, [*missing, *report["mismatched_keys"]][:3]))
        raise UserError(
            f"the weights of the encoder {folder.name} do not fit its config.json ({wrong}); fetch it again"
        )
    return model.requires_grad_(False).eval().to(device)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn a damaged file, a setting that fits no model or a library that is not there into a `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"the encoder {name} needs a library that is not installed ({_one_line(error)}); "
            "pip install 'dit-pipeline[features]'"
        ) from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # libraries have many for files that are damaged and settings that fit no model
        raise UserError(f"the encoder {name} cannot be used: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:300].rstrip("."))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars and remarks, which are about settings that are ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
