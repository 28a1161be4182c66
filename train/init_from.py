"""Weights of one network fitted into another: other classes, another grid, other channels, a variance more or less."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from pipeline.checkpoint.tensor_files import join_names
from pipeline.classes import names_of
from pipeline.dit import DiT, DiTConfig
from pipeline.runtime.errors import UserError

LabelStart = Literal["by-name", "mean", "new"]
_LABELS = "y_embedder.embedding_table.weight"
_PATCHES = "x_embedder.proj.weight"
_OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")


@dataclass(kw_only=True, slots=True)
class TransferReport:
    """Which tensors of a network came from where; `str()` of it is for people."""

    copied: list[str] = field(default_factory=list)
    """Taken as they were."""
    adapted: dict[str, str] = field(default_factory=dict)
    """Taken in part or rearranged, with what was done."""
    new: dict[str, str] = field(default_factory=dict)
    """Left at their fresh start, with the reason."""
    left_out: list[str] = field(default_factory=list)
    """Tensors of the source that have no place in the target."""

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """What became of every tensor, for people."""
        lines = [f"{len(self.copied)} tensors copied as they are"]
        for title, entries in (("adapted", self.adapted), ("new", self.new)):
            if entries:
                width = max(map(len, entries))
                lines.append(f"{len(entries)} {title}:")
                lines += [f"  {name:<{width}}  {what}" for name, what in entries.items()]
        if self.left_out:
            lines.append(f"{len(self.left_out)} of the source left out: {join_names(self.left_out)}")
        return lines


def fit_weights(
    source: Mapping[str, Tensor],
    target: DiT,
    *,
    source_config: DiTConfig | None = None,
    source_names: tuple[Sequence[str], Sequence[str]] = ((), ()),
    target_names: tuple[Sequence[str], Sequence[str]] = ((), ()),
    class_mapping: Mapping[int, int] | None = None,
    labels: LabelStart = "by-name",
    origin: object = "the source",
) -> TransferReport:
    """Copy into `target`, in place, every tensor of `source` that fits, and adapt those that nearly do.

    The label table: a class that both networks know by folder name or readable name keeps its row (by-name); the
    others start as the mean of the source's classes (mean), or as they are (new). The null row is kept. Channels
    that both latents have keep their weights; the position table is always the target's own.

    Args:
        source_config: the source's configuration, where known: tells its grid and heads.
        source_names: (classes, class_ids) of the source, index = label; empty where unknown.
        target_names: the same of the target.
        class_mapping: {target's label: source's label}, instead of matching names.
        labels: how rows of classes without a counterpart start; "new" and "mean" do not look at names.

    Raises:
        UserError: the networks' widths or heads differ.
    """
    assert labels in get_args(LabelStart), labels
    config = target.config
    _check_widths(source, config, source_config, origin)
    report = TransferReport()
    with torch.no_grad():
        for name, parameter in target.state_dict().items():
            if name not in source and name.endswith("value_lambda"):
                parameter.zero_()
                report.adapted[name] = f"0, as {origin} mixes no values"
            elif name not in source:
                report.new[name] = f"{origin} has none"
            elif name == _LABELS:
                count = len(source[name])
                known = _source_classes(count, source_config, source_names)
                rows = _matched_rows(known, count, config, source_names, target_names, class_mapping, labels)
                _fit_labels(parameter, source[name], known, config, rows, labels, report)
            elif "mlp" in name and source_config is not None and source_config.mlp != config.mlp:
                report.new[name] = f"the MLP is {config.mlp} here, {source_config.mlp} in {origin}"
            elif parameter.shape == source[name].shape and not _regrouped(name, config, source):
                parameter.copy_(source[name])
                report.copied.append(name)
            elif name == _PATCHES:
                _fit_patches(parameter, source[name], report)
            elif name in _OUTPUT:
                _fit_output(name, parameter, source, config, report)
            else:
                report.new[name] = f"{list(parameter.shape)} there, {list(source[name].shape)} in {origin}"
    for name in ("norm", "rotary") if source_config is not None else ():  # they leave no tensor that would tell
        if getattr(source_config, name) != getattr(config, name):
            report.adapted[name] = f"{getattr(config, name)} instead of {getattr(source_config, name)}"
    report.left_out = [name for name in source if name not in target.state_dict() and name != "pos_embed"]
    if source_config is not None and source_config.grid != config.grid:
        before, after = ("×".join(map(str, each.grid)) for each in (source_config, config))
        report.adapted["pos_embed"] = f"computed for {after} tokens instead of {before}"
    return report


def _check_widths(
    source: Mapping[str, Tensor], config: DiTConfig, source_config: DiTConfig | None, origin: object
) -> None:
    width = len(source[_PATCHES]) if _PATCHES in source else 0
    if width != config.hidden_size:
        raise UserError(
            f"{origin} is a network of width {width}, but this one has width {config.hidden_size}; "
            f"choose a --model of the same width or another --init-from"
        )
    if source_config is not None and source_config.num_heads != config.num_heads:
        raise UserError(
            f"{origin} has {source_config.num_heads} attention heads, but this network has {config.num_heads}; "
            f"the same weights would mean something else"
        )


def _source_classes(rows: int, config: DiTConfig | None, names: tuple[Sequence[str], Sequence[str]]) -> int:
    """Classes of the source; a row more than that is its null row, which a bare table is taken to have."""
    return config.num_classes if config is not None else max(map(len, names)) or rows - 1


def _matched_rows(
    source_classes: int,
    source_rows: int,
    config: DiTConfig,
    source_names: tuple[Sequence[str], Sequence[str]],
    target_names: tuple[Sequence[str], Sequence[str]],
    class_mapping: Mapping[int, int] | None,
    labels: LabelStart,
) -> dict[int, int]:
    """{row of the target's label table: row of the source's} for classes with a counterpart and the null class."""
    if class_mapping is not None:
        rows = dict(class_mapping)
        for ours, theirs in rows.items():
            if ours not in range(config.num_classes) or theirs not in range(source_classes):
                raise UserError(
                    f"class_mapping says {{{ours}: {theirs}}}, but labels go to {config.num_classes - 1} here and "
                    f"to {source_classes - 1} in the source"
                )
    elif labels == "by-name":
        rows = _same_classes(source_names, target_names)
        unnamed = not any(map(_has_names, source_names)) or not any(map(_has_names, target_names))
        if unnamed and source_classes == config.num_classes:
            rows = {label: label for label in range(config.num_classes)}
    else:
        rows = {}
    if config.has_null_class and source_rows > source_classes:
        rows[config.null_class] = source_rows - 1
    return rows


def _has_names(names: Sequence[str]) -> bool:
    """Whether they say more than the labels themselves, which stand in where nothing is known."""
    return any(name != str(label) for label, name in enumerate(names))


def _same_classes(
    source_names: tuple[Sequence[str], Sequence[str]], target_names: tuple[Sequence[str], Sequence[str]]
) -> dict[int, int]:
    """{target's label: source's label} of classes that are called alike, folder names before readable names."""
    by_name: dict[str, set[int]] = {}
    for label in range(max(map(len, source_names))):
        for name in names_of(label, *source_names):
            by_name.setdefault(name, set()).add(label)
    same = {}
    for label in range(max(map(len, target_names))):
        for name in names_of(label, *target_names):
            found = by_name.get(name, set())
            if len(found) == 1:
                same[label] = next(iter(found))
                break
    return same


def _fit_labels(
    table: Tensor,
    source: Tensor,
    source_classes: int,
    config: DiTConfig,
    rows: Mapping[int, int],
    labels: LabelStart,
    report: TransferReport,
) -> None:
    if len(table) == len(source) and all(rows.get(row) == row for row in range(len(table))):
        table.copy_(source)
        report.copied.append(_LABELS)
        return
    others = [row for row in range(len(table)) if row not in rows]
    if labels != "new" and others:
        classes = source[:source_classes] if source_classes else source
        table[others] = classes.float().mean(dim=0).to(table.dtype)
    for row, origin in rows.items():
        table[row] = source[origin].to(table)
    kept = len(rows) - (config.null_class in rows)
    null = "the null row kept" if config.null_class in rows else "no null row"
    start = "new" if labels == "new" else "at the mean of the source's classes"
    started = f", {config.num_classes - kept} {start}" if config.num_classes > kept else ""
    report.adapted[_LABELS] = f"{kept} of {config.num_classes} classes kept{started}; {null}"


def _regrouped(name: str, config: DiTConfig, source: Mapping[str, Tensor]) -> bool:
    """Whether the final layer's rows mean other channels even where there are as many of them."""
    return name in _OUTPUT and source[_PATCHES].shape[1] != config.in_channels


def _fit_patches(weight: Tensor, source: Tensor, report: TransferReport) -> None:
    if weight.shape[2:] != source.shape[2:]:
        report.new[_PATCHES] = (
            f"patches of {weight.shape[2]}×{weight.shape[3]} instead of {source.shape[2]}×{source.shape[3]}"
        )
        return
    shared = min(weight.shape[1], source.shape[1])
    weight[:, :shared] = source[:, :shared].to(weight)
    fresh = f", {weight.shape[1] - shared} new" if weight.shape[1] > shared else ""
    report.adapted[_PATCHES] = f"{shared} of {source.shape[1]} channels kept{fresh}"


def _fit_output(
    name: str, parameter: Tensor, source: Mapping[str, Tensor], config: DiTConfig, report: TransferReport
) -> None:
    """Rows are ordered (patch row, patch column, prediction or variance, channel); shared ones are copied."""
    channels, side = source[_PATCHES].shape[1:3]
    cells = config.patch_size**2
    if parameter.shape[1:] != source[name].shape[1:]:
        report.new[name] = f"of width {parameter.shape[-1]} instead of {source[name].shape[-1]}"
        return
    if side != config.patch_size or len(source[name]) % (cells * channels):
        report.new[name] = f"patches of {config.patch_size}×{config.patch_size} instead of {side}×{side}"
        return
    theirs = source[name].reshape(cells, -1, channels, *source[name].shape[1:])
    ours = parameter.view(cells, -1, config.in_channels, *parameter.shape[1:])
    groups, shared = min(ours.shape[1], theirs.shape[1]), min(ours.shape[2], theirs.shape[2])
    ours[:, :groups, :shared] = theirs[:, :groups, :shared].to(parameter)
    what = f"{shared} of {channels} channels kept"
    if ours.shape[2] > shared:
        what += f", {ours.shape[2] - shared} new"
    if ours.shape[1] != theirs.shape[1]:
        what += "; variance channels new" if config.learn_sigma else "; variance channels left out"
    report.adapted[name] = what
