"""Readable names of the classes: ImageNet's for its synsets, the user's own, or the folder names."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.classes import brief, imagenet_classes, readable_names
from pipeline.runtime.console import warn
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import parse_json, read_regular


def class_names(class_ids: Sequence[str], given: str | None) -> tuple[str, ...]:
    """A readable name for each class, in label order.

    Args:
        class_ids: folder names or synsets, in label order.
        given: what --class-names says: a file, or `imagenet` for data whose labels are ImageNet's but whose class
            folders are not called by synsets.

    Raises:
        UserError: the file is missing or malformed, or names another number of classes.
    """
    if given is None:
        return readable_names(class_ids)
    if not class_ids:
        raise UserError(f"--class-names {given} is given, but the data is unlabelled: it has no classes to name")
    if given == "imagenet":
        names: list[str] | dict[str, str] = [row.names for row in imagenet_classes()]
    else:
        names = _read(Path(given))
    if isinstance(names, dict):
        missing = [class_id for class_id in class_ids if class_id not in names]
        if missing:
            raise UserError(
                f"--class-names {given} has no name for {len(missing)} of {len(class_ids)} classes: "
                f"{', '.join(map(brief, missing[:5]))}{', …' if len(missing) > 5 else ''}"
            )
        return _told(tuple(names[class_id] for class_id in class_ids), given)
    if len(names) != len(class_ids):
        raise UserError(
            f"--class-names {given} has {len(names)} names, but the data has {len(class_ids)} classes; "
            "give one for each, in the order of the labels"
        )
    return _told(tuple(names), given)


def _told(names: tuple[str, ...], given: str) -> tuple[str, ...]:
    """The names; a warning where classes share one. ImageNet's own do: two are cranes."""
    shared = [name for name, count in Counter(names).items() if count > 1]
    if shared and given != "imagenet":
        labels = ", ".join(str(label) for label, name in enumerate(names) if name == shared[0])[:60]
        more = f", and {len(shared) - 1:,} more such" if len(shared) > 1 else ""
        warn(f"--class-names {given} calls the classes {labels} all {brief(shared[0])!r}{more}; name these by label")
    return names


def _read(path: Path) -> list[str] | dict[str, str]:
    try:
        data = read_regular(path)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {path} cannot be read: {error}") from error
    if path.suffix.lower() == ".json":
        return _from_json(data, path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and all("\t" in line for line in lines):
        return {key.strip(): name.strip() for key, _, name in (line.partition("\t") for line in lines)}
    return lines


def _from_json(data: bytes, path: Path) -> list[str] | dict[str, str]:
    content = parse_json(data, f"--class-names {path}", advice="mend it")
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict) and all(isinstance(name, str) for name in content.values()):
        return content
    raise UserError(f"--class-names {path} must be a list of names, or an object from folder name to name")
