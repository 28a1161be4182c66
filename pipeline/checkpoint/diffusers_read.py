"""diffusers' folder of a DiT, both ways: tensor names, settings, and the Hub.

diffusers copies the timestep and label embedders into every block, has one projection each for q, k and v, and its
pipeline always takes label 1000 for "no class". Here there is one embedder, one qkv, and the null class comes
right after the last one; so a label table is filled up with copies of the null row on the way out, and those
copies are cut off on the way in.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from msgspec import Meta
from torch import Tensor

from pipeline.checkpoint.info import CheckpointInfo, make_info
from pipeline.checkpoint.release import default_info
from pipeline.checkpoint.tensor_files import join_names
from pipeline.checkpoint.weight_files import load_tensors
from pipeline.diffusion.gaussian import DIFFUSERS_PREDICTIONS
from pipeline.dit import DiTConfig
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import Count, Finite, Passed, shortened, typed
from pipeline.vae import STABLE_DIFFUSION
from pipeline.vae_folder import Size, VaeConfig, shard_names

PIPELINE_NULL_CLASS: Final = 1000
"""The label that diffusers' DiTPipeline takes for "no class", whatever the number of classes."""

_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# Copied into every block by diffusers.
_EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {theirs: ours for ours, theirs in DIFFUSERS_PREDICTIONS.items()}
_TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")


_AGAIN = "restore it, or give another folder"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Kept(Passed):
    """What a checkpoint said that a pipeline was made from."""

    weights: str | None = None
    step: Count | None = None
    diffusion: dict[str, Any] | None = None
    class_ids: tuple[str, ...] | None = None
    vae: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] | None = None
    training: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _PipelineIndex(Passed):
    """A pipeline's model_index.json."""

    id2label: dict[str, str] | None = None
    _dit: _Kept | None = None

    def __post_init__(self) -> None:
        for label in self.id2label or ():
            if not re.fullmatch("[0-9]{1,7}", label):
                raise ValueError(f"id2label has the key {shortened(label)}, but must have labels from 0 on")

    @property
    def kept(self) -> _Kept:
        return self._dit or _Kept()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Transformer(Passed):
    """A DiT's config.json."""

    num_attention_heads: Size = 16
    attention_head_dim: Size = 72
    in_channels: Size = 4
    out_channels: Size | None = None
    sample_size: Size = 32
    patch_size: Size = 2
    num_layers: Annotated[int, Meta(ge=1, le=10**9)] = 28


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scheduler(Passed):
    """A scheduler's settings."""

    _class_name: str = ""
    prediction_type: str = "epsilon"
    beta_schedule: str = "linear"
    num_train_timesteps: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    beta_start: Finite = 0.0001
    beta_end: Finite = 0.02

    @property
    def class_name(self) -> str:
        return self._class_name


def from_diffusers(tensors: Mapping[str, Tensor], *, depth: int, origin: object) -> dict[str, Tensor]:
    """The same network in the release's names, its label table cut behind the null row.

    Raises:
        UserError: tensors are missing or surplus, or the embedders differ from block to block.
    """
    rest = {name: tensor for name, tensor in tensors.items() if name != "pos_embed.pos_embed"}
    if depth > len(rest):
        raise UserError(f"{origin} should hold a DiT of {depth:,} blocks, but has {len(rest)} tensors; restore it")
    missing = [name for name in _diffusers_names(depth) if name not in rest]
    surplus = rest.keys() - set(_diffusers_names(depth))
    if missing or surplus:
        lists = [f"missing {join_names(missing)}"] * bool(missing) + [f"surplus {join_names(surplus)}"] * bool(surplus)
        raise UserError(f"{origin} does not hold a DiT of {depth} blocks: {'; '.join(lists)}")
    different = [
        f"transformer_blocks.{block}.{name}"
        for name in _parameters(_EMBEDDERS)
        for block in range(1, depth)
        if not torch.equal(rest[f"transformer_blocks.{block}.{name}"], rest[f"transformer_blocks.0.{name}"])
    ]
    if different:
        raise UserError(
            f"{origin} cannot be read as a DiT: its embedders differ between blocks, and a DiT has one for all "
            f"blocks; these are not as in block 0: {join_names(different)}"
        )
    state = {ours: rest[theirs] for theirs, ours in _renamed(_OUTER)}
    state |= {ours: rest[f"transformer_blocks.0.{theirs}"] for theirs, ours in _renamed(_EMBEDDERS)}
    for block in range(depth):
        prefix = f"transformer_blocks.{block}"
        state |= {f"blocks.{block}.{ours}": rest[f"{prefix}.{theirs}"] for theirs, ours in _renamed(_IN_BLOCK)}
        for kind in ("weight", "bias"):
            parts = [rest[f"{prefix}.{projection}.{kind}"] for projection in _QKV]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def to_diffusers(state: Mapping[str, Tensor], config: DiTConfig, *, label_rows: int) -> dict[str, Tensor]:
    """The same network in diffusers' names, its label table filled up to `label_rows` with the null row.

    A network without a null row has the mean of its classes there, which is at least no class.
    """
    table = state["y_embedder.embedding_table.weight"]
    null = table[-1:] if config.has_null_class else table.mean(dim=0, keepdim=True)
    padding = null.expand(label_rows - len(table), -1)
    state = {**state, "y_embedder.embedding_table.weight": torch.cat([table, padding])}
    tensors = {theirs: state[ours] for theirs, ours in _renamed(_OUTER)}
    for block in range(config.depth):
        prefix = f"transformer_blocks.{block}"
        tensors |= {f"{prefix}.{theirs}": state[ours] for theirs, ours in _renamed(_EMBEDDERS)}
        tensors |= {f"{prefix}.{theirs}": state[f"blocks.{block}.{ours}"] for theirs, ours in _renamed(_IN_BLOCK)}
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            names = [f"{prefix}.{projection}.{kind}" for projection in _QKV]
            tensors |= dict(zip(names, parts, strict=True))
    return tensors


def _parameters(modules: Mapping[str, str]) -> list[str]:
    return [theirs for theirs, _ in _renamed(modules)]


def _renamed(modules: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(diffusers' name, the release's name) of every parameter of these modules."""
    for theirs, ours in modules.items():
        for kind in ("weight",) if theirs.endswith("embedding_table") else ("weight", "bias"):
            yield f"{theirs}.{kind}", f"{ours}.{kind}"


def _diffusers_names(depth: int) -> list[str]:
    in_block = [*_parameters(_EMBEDDERS), *_parameters(_IN_BLOCK), *_parameters(dict.fromkeys(_QKV, ""))]
    blocks = [f"transformer_blocks.{block}.{name}" for block in range(depth) for name in in_block]
    return [*_parameters(_OUTER), *blocks]


def read_diffusers(folder: Path, *, hub_name: str | None = None) -> tuple[dict[str, Tensor], DiTConfig, CheckpointInfo]:
    """(state in the release's names, configuration, info) of a diffusers pipeline folder or its transformer folder.

    The network runs with the release's timestep frequencies and norms, as such weights were trained.

    Args:
        hub_name: the repository that the folder is a copy of.

    Raises:
        UserError: it is no DiT, it is damaged, or its tensors do not fit its configuration.
    """
    try:
        return _read(folder, hub_name)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} is not laid out as diffusers lays out a DiT ({error!r} in its settings); restore it"
        ) from error


def _read(folder: Path, hub_name: str | None) -> tuple[dict[str, Tensor], DiTConfig, CheckpointInfo]:
    folder = _whole_pipeline(folder)
    index = _pipeline_index(folder)
    transformer = transformer_folder(folder)
    settings = _transformer_settings(transformer)
    depth = settings.num_layers
    tensors = {name: tensor for file in weight_paths(transformer) for name, tensor in load_tensors(file).items()}
    state = from_diffusers(tensors, depth=depth, origin=transformer)
    names = _class_names(index)
    table = state["y_embedder.embedding_table.weight"]
    count = _class_count(table, len(names))
    state["y_embedder.embedding_table.weight"] = torch.cat([table[:count], table[-1:]])
    config = _config(settings, count)
    kept = index.kept
    info = default_info(
        config,
        diffusion=kept.diffusion or _process_settings(folder / "scheduler" / "scheduler_config.json", config),
        classes=names if len(names) == count else None,
        class_ids=kept.class_ids or (_identifiers(names) if len(names) == count else None),
        **_vae_facts(folder / "vae", kept.vae, hub_name),
    )
    told = {key: kept[key] for key in ("step", "image", "training") if key in kept}
    return state, config, make_info(info, origin=folder / "model_index.json", **told)


def _whole_pipeline(folder: Path) -> Path:
    """The pipeline that a transformer folder belongs to, which knows its process and classes; else the folder."""
    above = folder.absolute().parent
    return above if folder.absolute().name == "transformer" and (above / "model_index.json").is_file() else folder


def recorded_weights(folder: Path) -> str | None:
    """Which weights ("raw", "ema", "ema-NAME") the checkpoint had that a pipeline was made from, if that is known."""
    return _pipeline_index(_whole_pipeline(folder)).kept.weights


def transformer_folder(folder: Path) -> Path:
    """Where the network lies in a pipeline folder; a transformer folder is its own answer."""
    return folder / "transformer" if (folder / "model_index.json").is_file() else folder


def _pipeline_index(folder: Path) -> _PipelineIndex:
    """What the pipeline says; nothing of a transformer folder alone."""
    path = folder / "model_index.json"
    if not path.is_file():
        return _PipelineIndex()
    index = read_json(path)
    if not isinstance(index, dict) or index.get("_class_name") != "DiTPipeline":
        kind = index.get("_class_name") if isinstance(index, dict) else None
        raise UserError(f"{path} describes a {_bare(kind)}, not a DiTPipeline; give a diffusers folder of a DiT")
    return typed(index, _PipelineIndex, f"{path} is damaged", advice=_AGAIN)


def _bare(kind: object) -> str:
    return shortened(kind).strip("'")


def _transformer_settings(folder: Path) -> _Transformer:
    settings = read_json(folder / "config.json")
    kind = settings.get("_class_name") if isinstance(settings, dict) else None
    norm = shortened(settings.get("norm_type")) if isinstance(settings, dict) else None
    if kind not in _TRANSFORMERS or settings.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise UserError(
            f"{folder / 'config.json'} describes a {_bare(kind)} with norm {norm}, not the DiT that is known here "
            f"({' or '.join(_TRANSFORMERS)} with 'ada_norm_zero')"
        )
    return typed(settings, _Transformer, f"{folder / 'config.json'} is damaged", advice=_AGAIN)


def _config(settings: _Transformer, count: int) -> DiTConfig:
    heads, channels = settings.num_attention_heads, settings.in_channels
    return DiTConfig(
        input_size=settings.sample_size,
        patch_size=settings.patch_size,
        in_channels=channels,
        hidden_size=heads * settings.attention_head_dim,
        depth=settings.num_layers,
        num_heads=heads,
        num_classes=count,
        learn_sigma=settings.out_channels == 2 * channels,
    )


def weight_paths(folder: Path) -> list[Path]:
    """The files of a transformer folder's weights, whole or in shards.

    Raises:
        UserError: there are none, or the index names files outside the folder.
    """
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / file for file in shard_names(index, Path(name).suffix)]
    raise UserError(f"{folder} has no weights; {' or '.join(_WEIGHT_FILES)} is expected there")


def _class_names(index: _PipelineIndex) -> list[str]:
    """The pipeline's class names in label order; none if the labels are not 0, 1, 2, …."""
    by_label = {int(label): name for label, name in (index.id2label or {}).items()}
    return [by_label[label] for label in range(len(by_label))] if by_label.keys() == set(range(len(by_label))) else []


def _class_count(table: Tensor, named: int) -> int:
    """How many classes a label table has before its null row and the copies of it."""
    differs = (table != table[-1]).any(dim=1).nonzero()
    first_null = int(differs[-1]) + 1 if len(differs) else 0
    return named if first_null <= named < len(table) else first_null


def _identifiers(names: list[str]) -> list[str] | None:
    """Synsets where these are ImageNet's classes (spellings of the further names vary), else the names."""
    from pipeline.classes import imagenet_classes

    def first_names(full: list[str]) -> list[str]:
        return [name.partition(",")[0].strip().lower() for name in full]

    ours = first_names([row.names for row in imagenet_classes()])
    theirs = first_names(names)
    same = sum(a == b for a, b in zip(ours, theirs, strict=False))
    if len(theirs) == len(ours) and same > 0.9 * len(ours):
        return [row.synset for row in imagenet_classes()]
    return names


def _process_settings(path: Path, config: DiTConfig) -> dict[str, Any] | None:
    """The process that a scheduler's settings describe; None where there are none."""
    if not path.is_file():
        return None
    settings = typed(read_json(path), _Scheduler, f"{path} is damaged", advice=_AGAIN)
    if "FlowMatch" in settings.class_name or settings.prediction_type == "flow_prediction":
        return {"objective": "flow"}
    schedule, prediction = _SCHEDULES.get(settings.beta_schedule), _PREDICTIONS.get(settings.prediction_type)
    steps, ends = settings.num_train_timesteps, (settings.beta_start, settings.beta_end)
    usual = schedule == "cosine" or ends == (0.1 / steps, 20 / steps)
    if schedule is None or prediction is None or not usual or settings.get("trained_betas") is not None:
        raise UserError(
            f"{path} describes a noise schedule that is not known here (beta_schedule "
            f"{shortened(settings.beta_schedule)} from {ends[0]} to {ends[1]}, prediction_type "
            f"{shortened(settings.prediction_type)}); linear from 0.0001 to 0.02 and squaredcos_cap_v2 are"
        )
    variance = "learned-range" if config.learn_sigma else "fixed-large"
    return {"objective": "ddpm", "schedule": schedule, "steps": steps, "prediction": prediction, "variance": variance}


def _vae_facts(folder: Path, kept: Mapping[str, Any], hub_name: str | None) -> dict[str, Any]:
    """What is known of a pipeline's VAE: its own copy if that can be used; nothing, so that the defaults stand.

    Args:
        kept: what the checkpoint that the pipeline was made from recorded.
        hub_name: the pipeline's repository, which is also a name for its VAE.
    """
    if not (folder / "config.json").is_file():
        return {"vae": kept} if kept else {}
    path = folder / "config.json"
    settings = typed(read_json(path), VaeConfig, f"{path} is damaged", advice=_AGAIN)
    downsample = 2 ** (len(settings.block_out_channels or [0] * 4) - 1)
    if kept.get("name") == "demo" or not any(folder.glob("*.safetensors")):
        return {"vae": kept or STABLE_DIFFUSION, "downsample": downsample}
    vae = {
        "name": str(folder.resolve()),
        "class": settings.class_name,
        "scaling_factor": settings.get("scaling_factor", STABLE_DIFFUSION["scaling_factor"]),
        "shift_factor": settings.shift_factor,
        "recorded": dict(kept) or ({"name": hub_name} if hub_name else {}),
    }
    return {"vae": vae, "downsample": downsample}
