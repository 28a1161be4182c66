"""Labels of the images inside an archive, where its members say none: by dataset.json, by folders, or by names."""

from collections.abc import Collection, Sequence

from extract.sources.dataset_json import DATASET_JSON
from extract.sources.labels import (
    PARTS,
    Labels,
    are_synsets,
    is_split,
    labels_of_names,
    looks_like_classes,
    synsets_in_names,
)
from extract.sources.listing import UNLABELLED
from extract.sources.litter import LeftOut
from pipeline.image_names import named_like_image
from pipeline.runtime.errors import UserError


def parts_of(path: str) -> list[str]:
    """The folders of a path and its file's name."""
    return [part for part in path.split("/") if part not in ("", ".")]


def dataset_json_in(names: Collection[str]) -> str | None:
    """The name of the dataset.json at the top of an archive, or in the folder that holds all of it, or None."""
    found = [name for name in names if name.endswith(DATASET_JSON) and parts_of(name)[-1] == DATASET_JSON]
    top = min(found, key=lambda name: len(parts_of(name)), default=None)
    if top is None:
        return None
    folder = parts_of(top)[:-1]
    return top if all(parts_of(name)[: len(folder)] == folder for name in names) else None


def class_folders(
    paths: Sequence[str], split: str, left_out: LeftOut, *, where: object, layout: str = "auto"
) -> tuple[Sequence[int], list[str] | None]:
    """Which paths inside an archive are read, and the class folder of each; None where folders tell no classes.

    Folders that all paths share are passed over, with other files than images in them; of folders that are named like
    splits, or parts of a data set, the one of --split is entered, and then the same again.

    Args:
        paths: all of the archive's.
        split: what --split says.
        left_out: counts what is not read.
        where: the archive, for messages.
        layout: with "class-folders" the first folders that are several are the classes, whatever their names.

    Raises:
        UserError: images lie beside the folders, or the folders are rather other splits or parts than classes.
    """
    parts = [parts_of(path) for path in paths]
    kept: Sequence[int] = range(len(parts))
    depth = 0
    while True:
        files = [k for k in kept if len(parts[k]) <= depth + 1]
        if len(files) == len(kept):
            return kept, None
        images = [paths[k] for k in files if named_like_image(paths[k])]
        if images:
            raise UserError(
                f"{where} holds folders and also images beside them ({', '.join(images[:3])}"
                f"{', …' if len(images) > 3 else ''}), whose class nothing tells; leave them out by --ignore, or say "
                "--layout flat to read all of it without labels"
            )
        for k in files:
            left_out.add("beside the folders", paths[k])
        kept = [k for k in kept if len(parts[k]) > depth + 1]
        here = {parts[k][depth] for k in kept}
        if len(here) > 1:
            if layout == "class-folders" or not _holds_split(here, split):
                if layout != "class-folders":
                    _refuse_parts(here, {parts[k][depth] for k in kept if named_like_image(paths[k])}, where)
                return kept, [parts[k][depth] for k in kept]
            for k in kept:
                if parts[k][depth] != split:
                    left_out.add(f"of other folders than {split}", paths[k])
            kept = [k for k in kept if parts[k][depth] == split]
        depth += 1


def _holds_split(here: set[str], split: str) -> bool:
    """Whether one folder is the split's, and the others are splits or parts, too."""
    return split in here and all(is_split(name) or name.casefold() in PARTS for name in here)


def _refuse_parts(here: set[str], with_images: set[str], where: object) -> None:
    """Raise UserError for folders in an archive that are more likely splits or parts of a data set than its classes."""
    meant = "if these are the classes, say --layout class-folders"
    some = ", ".join(sorted(here)[:3])
    if all(map(is_split, here)):
        raise UserError(
            f"{where} holds the folders {some}, which are named like splits: choose one by --split; {meant}"
        )
    without = sorted(here - with_images)
    if all(name.casefold() in PARTS or is_split(name) for name in here):
        rest = without or sorted(here)[1:]
        raise UserError(
            f"{where} holds the folders {some}, which look like parts of one data set; leave out those that are no "
            f"images, as by --ignore {','.join(rest[:3])}; {meant}"
        )
    if without and with_images and all(name.casefold() in PARTS for name in without):
        raise UserError(
            f"{where} holds folders that would be classes, but hold no images ({', '.join(without[:3])}); leave them "
            f"out by --ignore {','.join(without[:3])}; {meant}"
        )


def labels_by_names(
    names: Sequence[str],
    tar_of: Sequence[int],
    tars: Sequence[str],
    left_out: LeftOut,
    *,
    are_alone: bool,
    layout: str,
    split: str,
    where: object,
) -> tuple[Labels, str, Sequence[int], list[str]]:
    """Labels by the names of tars, folders or files; where they come from, which names are read, and notes.

    Args:
        names: of the images in their tars.
        tar_of: the number of each one's tar.
        tars: the tars' names without suffix.
        left_out: counts what is not read.
        are_alone: whether nothing lies beside the images, so that their folders may be classes.
        layout: what --layout says.
        split: what --split says.
        where: the first tar, for messages.

    Raises:
        UserError: as `class_folders`, or --layout class-folders is given and there are none.
    """
    everything: Sequence[int] = range(len(names))
    if layout == "webdataset":
        return _unlabelled(everything), "", everything, []
    if layout == "class-tars" or (len(set(tars)) > 1 and are_synsets(tars)):
        return labels_of_names([tars[k] for k in tar_of]), "the names of the tars", everything, []
    if layout == "class-folders" or are_alone:
        everything, folders = class_folders(names, split, left_out, where=where, layout=layout)
        if folders is not None:
            return labels_of_names(folders), "the folders inside the tar", everything, []
    if layout == "class-folders":
        raise UserError(f"--layout class-folders: {where} holds no folders that could be classes")
    if (synsets := synsets_in_names([names[k] for k in everything])) is not None:
        return labels_of_names(synsets), "the synsets in file names", everything, []
    notes = []
    if looks_like_classes(tars):
        some = ", ".join(tars[:3])
        notes.append(f"the tars' names look like classes ({some}) and are not read as such; --layout class-tars does")
    if not are_alone and (some := _class_names(names, split, where)):
        notes.append(
            f"the folders inside look like classes ({some}) and are not read as such; --layout class-folders does"
        )
    return _unlabelled(everything), "", everything, notes


def _class_names(names: Sequence[str], split: str, where: object) -> str:
    """Some of the folders that would be classes, if there are any."""
    try:
        _, folders = class_folders(names, split, LeftOut(), where=where, layout="class-folders")
    except UserError:
        return ""
    return ", ".join(sorted(set(folders or ()))[:3])


def _unlabelled(inputs: Sequence[int]) -> Labels:
    return Labels(values=[UNLABELLED] * len(inputs))
