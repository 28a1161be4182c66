"""Labels in a `dataset.json`, as StyleGAN's and EDM's `dataset_tool.py` write it, in folders and zips.

{"labels": [["00000/img00000000.png", 6], …]}       or "labels": null
"""

from collections.abc import Iterable
from dataclasses import dataclass

from extract.sources.labels import Labels, numbered_labels
from extract.sources.listing import UNLABELLED
from pipeline.image_names import named_like_image
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_length, parse_json, shortened

DATASET_JSON = "dataset.json"
_WITHOUT_IT = "read the folders without it by --ignore dataset.json"
_ADVICE = f"fetch it again, or {_WITHOUT_IT}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """The files that `dataset.json` is about, with their labels."""

    keys: list[str]
    labels: Labels
    notes: list[str]


def check_member(size: int, where: str) -> None:
    """Raise UserError for a `dataset.json` that claims more bytes in its archive than the gate lets through."""
    check_length(size, where, advice=_ADVICE)


def labelled_by_dataset_json(data: bytes, found: Iterable[str], where: str, folder: str = "") -> Labelled | None:
    """The labels of the images among the files `found`; all unlabelled where the file says null.

    None where it says nothing of labels: it is another program's.

    Args:
        data: the file's bytes.
        found: all files, with the folder that `dataset.json` lies in and its names begin at.
        where: the file's name, for messages.
        folder: that folder, with a slash at its end.

    Raises:
        UserError: the file is no JSON within the gate's limits or malformed, names an image twice with two labels, or
            some image is not in it.
    """
    content = parse_json(data, where, advice=_ADVICE)
    if not isinstance(content, dict):
        raise UserError(f"{where} would tell the labels, but is no JSON object; {_ADVICE}")
    if "labels" not in content:
        return None
    keys, rows = sorted(name for name in found if name != f"{folder}{DATASET_JSON}"), content["labels"]
    if rows is None:
        return Labelled(keys=keys, labels=Labels(values=[UNLABELLED] * len(keys)), notes=[f"{where} gives no labels"])
    if isinstance(rows, dict):
        rows = list(rows.items())
    is_sound = isinstance(rows, list) and all(
        isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], str) for row in rows
    )
    if not is_sound or not rows:
        raise UserError(f'{where} must hold {{"labels": [["FILE", LABEL], …]}}; mend it, or {_WITHOUT_IT}')
    names = [folder + str(name).replace("\\", "/").removeprefix("./") for name, _ in rows]
    label_of = dict(zip(names, (label for _, label in rows), strict=True))
    if len(label_of) < len(names):
        unlike = (name for name, (_, label) in zip(names, rows, strict=True) if label != label_of[name])
        if (twice := next(unlike, None)) is not None:
            raise UserError(f"{where} gives {shortened(twice)} two labels; leave one, or {_WITHOUT_IT}")
    known = [key for key in keys if key in label_of]
    others = [key for key in keys if key not in label_of]
    missing = [key for key in others if named_like_image(key)]
    if missing or not known:
        raise UserError(
            f"{len(missing or others):,} of {len(keys):,} files have no label in {where} (the first is "
            f"{(missing or others or ['none at all'])[0]}); leave them out by --ignore, or {_WITHOUT_IT}"
        )
    notes = [f"left out: {len(others):,} files that are not in {where} ({others[0]})"] if others else []
    if len(label_of) > len(known):
        there = set(known)
        lost = next(name for name in label_of if name not in there)
        notes.append(
            f"{len(label_of) - len(known):,} of {len(label_of):,} images in {where} are not there ({shortened(lost)})"
        )
    return Labelled(keys=known, labels=numbered_labels([label_of[key] for key in known], where), notes=notes)
