"""What --samples and --reference may be, told apart by what lies there: images to look at, statistics to take."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from pipeline.checkpoint.folder import is_inside
from pipeline.hub import HUB, HUB_NAME
from pipeline.image_names import named_like_image
from pipeline.latents.names import MANIFEST_FILE, is_store
from pipeline.latents.remote import cache_folder
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, replacing
from pipeline.runtime.gate import typed
from pipeline.runtime.publish import finish
from pipeline.runtime.remote_copies import fetch, local_place
from pipeline.runtime.remote_files import UrlFolder, is_url
from sample.evaluate.folder import FolderImages
from sample.evaluate.image_set import ImageSet
from sample.evaluate.npz import NpzImages, list_arrays
from sample.evaluate.options import EvaluateOptions
from sample.evaluate.reference import StatisticsFile
from sample.sidecar import Recipe, Sidecar, parse_sidecar, read_sidecar, sidecar_of

_OF_CHECKPOINTS = ("checkpoints", "config.yaml", "config.json", "model_index.json")
WEIGHT_SUFFIXES = frozenset({".safetensors", ".pt", ".pth", ".bin", ".ckpt"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Input:
    """One side of the comparison."""

    flag: str
    """--samples or --reference."""
    path: str
    images: ImageSet | None
    statistics: StatisticsFile | None
    made_by: Sidecar | None
    """The sidecar that dit-sample wrote beside it."""

    @property
    def count(self) -> int | None:
        """How many images the statistics are of, or there are; None where a file does not say."""
        if self.statistics is not None:
            return self.statistics.count
        return None if self.images is None else self.images.count

    @cached_property
    def recipe(self) -> Recipe:
        """What dit-sample says that the images were made of, or would, of those made here; empty where nothing does."""
        if self.made_by is not None:
            return self.made_by.recipe
        said = {} if self.images is None else self.images.describe()
        return typed(said.get("recipe", {}), Recipe, "this is no recipe", advice="")


def open_inputs(options: EvaluateOptions) -> dict[str, Input]:
    """What --samples and --reference name, by flag; folders come last, as they may take the other side's image size.

    With --repeat what a checkpoint gives by further seeds follows.

    Raises:
        UserError: a path is missing or of no kind that is known here, or is no checkpoint where one is needed.
    """
    named = {"--samples": options.samples, "--reference": options.reference}
    given = {flag: path for flag, path in named.items() if path is not None}
    for path in given.values():
        finish(Path(path))  # of several files of one output, a kill may have left some without their names
    kinds = {flag: kind_of(path, flag) for flag, path in given.items()}
    if options.repeat > 1 and kinds.get("--samples") != "checkpoint":
        raise UserError(
            f"--repeat {options.repeat} samples with so many seeds, but --samples {options.samples} is no run or "
            f"checkpoint; leave it away, or give the checkpoint itself"
        )
    inputs: dict[str, Input] = {}
    for flag in sorted(given, key=lambda flag: kinds[flag] == "folder"):
        size = options.image_size or _square_size_of_others(inputs, kinds)
        inputs[flag] = _open(flag, given[flag], kinds[flag], size, options)
    ordered = {flag: inputs[flag] for flag in given}
    for seed in range(options.reverse.seed + 1, options.reverse.seed + options.repeat):
        from sample.evaluate.generated import CheckpointImages, with_settings

        first = inputs["--samples"]
        assert isinstance(first.images, CheckpointImages)
        asked = replace(options, reverse=replace(options.reverse, seed=seed))
        ordered[f"--samples, seed {seed}"] = replace(first, images=with_settings(first.images, asked))
    return ordered


def kind_of(path: str, flag: str) -> str:
    """One of "npz", "store", "checkpoint" or "folder".

    Raises:
        UserError: nothing is there, or a file of no known kind.
    """
    place = Path(path)
    if is_url(path) and place.suffix.lower() == ".npz":
        return "npz"
    if is_url(path) and images_behind(path.rstrip("/")):
        return "folder"
    if is_store(path):
        return "store"
    if is_url(path):
        return "checkpoint"
    if place.is_dir():
        is_checkpoint = place.name == "checkpoints" or any((place / name).exists() for name in _OF_CHECKPOINTS)
        return "checkpoint" if is_checkpoint else "folder"
    if not place.exists():
        if HUB_NAME.fullmatch(path.removeprefix(HUB)):
            return "checkpoint"
        raise UserError(f"{flag} {path} does not exist; check the path")
    if place.suffix.lower() == ".npz":
        return "npz"
    if place.suffix.lower() in WEIGHT_SUFFIXES:
        return "checkpoint"
    raise UserError(
        f"{flag} {path} is of no kind that is known here; give a folder of images, an .npz, a latent store, or a run"
    )


def _square_size_of_others(inputs: Mapping[str, "Input"], kinds: Mapping[str, str]) -> int | None:
    """The side of the other side's images where they have one square size of their own; folders have none."""
    for flag, other in inputs.items():
        if kinds[flag] != "folder" and other.images is not None and other.images.size[0] == other.images.size[1]:
            return other.images.size[0]
    return None


def _open(flag: str, path: str, kind: str, image_size: int | None, options: EvaluateOptions) -> Input:
    images: ImageSet | None
    statistics = None
    if kind == "npz":
        file = copy_of(path) if is_url(path) else Path(path)
        arrays = list_arrays(file)
        if "arr_0" not in arrays and "mu" not in arrays:
            raise UserError(
                f"{flag} {path} holds {', '.join(sorted(arrays)) or 'no arrays'}, but images (arr_0) or statistics "
                f"(mu and sigma) are needed; check the file"
            )
        images = NpzImages(file) if "arr_0" in arrays else None
        statistics = StatisticsFile(file) if "mu" in arrays else None
    elif kind == "folder":
        folder = folder_of_copies(path) if is_url(path) else Path(path)
        images = FolderImages(folder, image_size=image_size, workers=options.workers)
    else:
        from sample.evaluate import generated

        images = generated.open_store(path, options) if kind == "store" else generated.open_checkpoint(path, options)
    made_by = None
    if kind in {"npz", "folder"}:
        made_by = sidecar_behind(path) if is_url(path) else read_sidecar(Path(path))
    return Input(flag=flag, path=path, images=images, statistics=statistics, made_by=made_by)


def copy_of(url: str) -> Path:
    """A copy of a file behind a URL, made once for the bytes that the server has.

    Raises:
        UserError: it cannot be fetched.
    """
    folder = cache_folder(None) / "files"
    fetch([url], folder)
    return local_place(url, folder)


@cache
def images_behind(url: str) -> tuple[str, ...]:
    """The names of the images in a folder behind a URL, sorted; none where it is a store, a run or a checkpoint.

    Asked once: what it is and what is to be copied are two questions, and a listing may be long.

    Raises:
        UserError: the server cannot be asked.
    """
    far = UrlFolder(url)
    if any(far.size(name) is not None for name in (MANIFEST_FILE, *_OF_CHECKPOINTS)):
        return ()  # nor listed, which not every server does
    return tuple(sorted(name for name in far.names() if named_like_image(name) and is_inside(name)))


def folder_of_copies(url: str) -> Path:
    """A folder with a copy of every image behind a URL, made once for the bytes that the server has.

    Raises:
        UserError: one cannot be fetched.
    """
    url, kept = url.rstrip("/"), cache_folder(None)
    names = images_behind(url)
    addresses = [f"{url}/{name}" for name in names]
    fetch(addresses, kept / "files")
    copies = {name: local_place(address, kept / "files") for name, address in zip(names, addresses, strict=True)}
    digest = hashlib.sha256(repr([(name, copy.name) for name, copy in copies.items()]).encode()).hexdigest()
    folder = kept / "images" / f"{digest[:16]}-{url.rpartition('/')[2]}"
    for name, copy in copies.items():
        place = folder / name
        if place.exists():
            continue
        make_folder(place.parent)
        try:
            place.hardlink_to(copy)
        except FileExistsError:
            continue  # by another command
        except OSError:  # a disk without links
            with replacing(place) as part:
                shutil.copyfile(copy, part)
    return folder


def sidecar_behind(url: str) -> Sidecar | None:
    """The JSON that dit-sample has put beside a file or folder behind a URL; None where there is none of ours.

    Raises:
        UserError: it was written by a newer version, or its values are of other types.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    place = sidecar_of(Path(name)).name
    data = UrlFolder(parent).read(place)
    return None if data is None else parse_sidecar(data, f"{parent}/{place}")
