"""The options of `dit-extract`, in the groups that its parts read. No torch: `--help` must be quick."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from msgspec import Meta

from extract.sources.selection import data_help
from pipeline.latents.names import FeatureDtype, ShardFormat
from pipeline.runtime.bounds import Amount, Batch, Pixels, Seed, Share, Shown, Threads, check_bounds
from pipeline.runtime.config_files import BY_COMMAS
from pipeline.runtime.errors import UserError
from pipeline.runtime.remote_files import is_url

Layout = Literal["auto", "class-folders", "split-folder", "flat", "webdataset", "class-tars", "dataset-json", "table"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Which images."""

    data: Annotated[str, tyro.conf.arg(help=data_help())]
    split: str = "train"
    """Sub-folder of DATA to read if there is one of that name, and the split of a Hugging Face data set; shard files are named after it."""
    limit: Amount | None = None
    """Take only N images: the first N of the order that --seed shuffles, so a random sample. Default: all."""
    class_names: str | None = None
    """Readable names of the classes: a text file with one name a line (or `id TAB name`), a JSON list or object, or the word imagenet. Default: ImageNet's names for its synsets, else the folder names."""
    val_labels: Path | None = None
    """Labels of ImageNet's validation images: a file with one synset a line, or Kaggle's LOC_val_solution.csv; with --devkit also its ground truth file."""
    devkit: Path | None = None
    """ImageNet's development kit (its folder, or its meta.mat), which tells the synsets of the validation images."""
    image_column: str | None = None
    """Column of a Hugging Face data set, or extension in WebDataset tars, that holds the image. Default: found by type."""
    label_column: str | None = None
    """Column, or extension, that holds the label; json:KEY, a key of .json members. Default: the class label column, or .cls."""
    ignore: Annotated[str, BY_COMMAS] = ""
    """Patterns of names to leave out, of files and folders, separated by commas, as in "*.txt,*.json". Hidden ones are always left out."""
    layout: Layout = "auto"
    """How DATA is laid out, where what is found by itself is not what is meant: every folder a class, the folder of --split alone, all without labels, each tar a class, ... (docs/sources.md)."""
    anyway: bool = False
    """Go on where the command refuses what looks like a mistake: files of a split that are missing, a disk that is too small."""
    remote_tars: Literal["copy", "stream"] = "copy"
    """How tars behind URLs are read: copy keeps all of them on this disk until the store is finished; stream a few at a time, while they are listed, and then asks for every image by itself, which needs a server that gives parts of files."""
    source_cache: Path | None = None
    """Folder for copies of remote tars. Default: within STORE, removed when the store is finished."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.split):
            raise UserError(f"--split {self.split!r} becomes part of file names; use letters, digits, - and _ only")
        if not self.data:
            raise UserError("--data is empty; name a folder of images, tars, or hf:OWNER/NAME")

    @property
    def ignored(self) -> tuple[str, ...]:
        return tuple(pattern for part in self.ignore.split(",") if (pattern := part.strip()))


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelOptions:
    """How an image becomes a square of pixels, and which views of it are stored."""

    image_size: Pixels = 256
    """Side of the square in pixels; a multiple of the VAE's down-factor."""
    crop: Literal["adm-center", "random-resized"] = "adm-center"
    """adm-center: the centre crop of ADM and DiT. random-resized: random parts of the image, for small data sets."""
    crops: Shown | None = None
    """Random crops of each image (with --crop random-resized). Default 1."""
    flip: bool = True
    """Also store every view of the mirrored image; turn it off where left and right mean something, as in digits."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.crops is not None and self.crop != "random-resized":
            raise UserError(f"--crops {self.crops} needs --crop random-resized: there is only one centre crop")

    @property
    def crop_count(self) -> int:
        return self.crops or 1

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views in stored order; each crop is followed by its mirror image."""
        crops = ["center"] if self.crop == "adm-center" else [f"random-{number}" for number in range(self.crop_count)]
        return tuple(view for crop in crops for view in ([crop, f"{crop}-hflip"] if self.flip else [crop]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """How the store is cut into files."""

    format: ShardFormat = "safetensors"
    """Format of the shards."""
    samples_per_shard: Annotated[int, Meta(ge=1, le=1_000_000)] = 4096
    """Inputs in one shard, which is the unit of work: what an interruption loses, and what processes share out."""
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Number format of the stored latents."""
    seed: Annotated[Seed, tyro.conf.arg(metavar="INT")] = 0
    """Shuffles the inputs before they are cut into shards, and places random crops."""
    shard_range: str | None = None
    """A:B, make only shards A to B-1 (0:40); for job arrays whose tasks share the output folder. Default: all."""

    def __post_init__(self) -> None:
        check_bounds(self)
        self.span(0)

    def span(self, shards: int) -> range:
        """The shard numbers of --shard-range that exist.

        Raises:
            UserError: it is not A:B with 0 ≤ A < B.
        """
        if self.shard_range is None:
            return range(shards)
        parts = re.fullmatch(r"(\d{0,12}):(\d{0,12})", self.shard_range)
        if not parts:
            raise UserError(f"--shard-range {self.shard_range} must be A:B, as in 0:40, which makes shards 0 to 39")
        first, end = int(parts[1] or 0), int(parts[2]) if parts[2] else None
        if end is not None and first >= end:
            raise UserError(f"--shard-range {self.shard_range} is empty: A must be less than B")
        return range(first, shards)[: None if end is None else end - first]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkOptions:
    """On what, how fast, and what to do about bad inputs."""

    batch_size: Batch | None = None
    """Images in one pass through the VAE; every pass is padded to it. Default: 32 on a GPU; 4 on a CPU, where as many passes run at a time as there are cores."""
    workers: Threads | None = None
    """Threads that read, decode and crop. Default: one for each core."""
    device: str = "auto"
    """auto (an accelerator if there is one), cpu, cuda, cuda:N, or another accelerator that torch names, such as mps."""
    encode_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the VAE's encoder; float32 uses TF32 where the GPU has it."""
    compile: bool = False
    """Compile the encoder first: a minute or so once, then faster on a GPU."""
    on_error: Literal["skip", "fail"] = "skip"
    """A bad input is left out and listed in skipped.jsonl (skip), or stops the command (fail)."""
    allow_skips: Share = 0.01
    """Largest share of inputs that may be left out in a finished store."""

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions:
    """What `dit-extract` is asked to make."""

    out: str | None = None
    """The latent store to write, a folder or a URL such as s3://bucket/store; the same command again continues it. Needed unless only --preview is asked for."""
    vae: str = "stabilityai/sd-vae-ft-ema"
    """A diffusers autoencoder: a Hub name, a local folder, or demo (a tiny one that ships with the project)."""
    features: str | None = None
    """Also store an encoder's features of every view, beside the latents: a Hub name such as facebook/dinov2-base, or a folder in transformers' layout."""
    features_dim: Annotated[int, Meta(ge=0, le=1 << 16)] | None = None
    """Keep K numbers of each patch's features, along their principal directions; 0 keeps the class token alone. Default: all."""
    features_dtype: FeatureDtype = "float16"
    """Precision of the patches' features; int8 takes half the room, in steps of a 127th of each number's largest in the shard."""
    add_features: Path | None = None
    """Add --features to this finished store, in place of --out; --data gives its images again."""
    overwrite: bool = False
    """Remove a store that is already in --out, and only that, before starting."""
    preview: Path | None = None
    """Draw some originals beside their reconstructions, with PSNR, as a PNG file before anything is extracted."""
    preview_images: Shown = 8
    """How many images --preview draws."""
    source: SourceOptions
    pixels: PixelOptions = field(default_factory=PixelOptions)
    shards: ShardOptions = field(default_factory=ShardOptions)
    work: WorkOptions = field(default_factory=WorkOptions)

    def __post_init__(self) -> None:
        check_bounds(self)
        given = (self.features_dim, self.add_features)
        if self.features is None and (given != (None, None) or self.features_dtype != "float16"):
            raise UserError(
                "--features-dim, --features-dtype and --add-features need --features ENCODER, as in "
                "facebook/dinov2-base"
            )
        if self.features_dim == 0 and self.features_dtype != "float16":
            raise UserError(
                "--features-dtype is of the patches, which --features-dim 0 leaves out; drop one of the two"
            )
        if self.add_features is not None and (self.out is not None or self.preview is not None):
            raise UserError("--add-features names the store itself; leave --out and --preview out")
        if self.features is not None and self.out is None and self.add_features is None:
            raise UserError("--features stand beside a store: give --out, or --add-features for one that is there")
        if self.out is None and self.preview is None and self.add_features is None:
            raise UserError("--out is missing: name the folder for the latent store, or --preview FILE.png")
        if self.url is not None and (self.features is not None or self.overwrite):
            flag = "--overwrite removes nothing" if self.overwrite else "--features are not made"
            raise UserError(f"{flag} behind a URL ({self.out}); name another --out")
        if self.preview is not None and self.preview.suffix.lower() != ".png":
            raise UserError(f"--preview {self.preview} must end in .png")

    @property
    def url(self) -> str | None:
        """--out, if it is a URL."""
        return self.out if self.out is not None and is_url(self.out) else None

    @property
    def store(self) -> Path | None:
        """--out, if it is a folder."""
        return None if self.out is None or self.url is not None else Path(str(self.out).removeprefix("file://"))
