"""Files that appear whole or not at all: write under another name, flush to disk, rename.

A rename is atomic only within one file system, so temporary names always stand beside the final one
(or in a work folder that the caller keeps on the same file system).
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import WRITE_REASONS, UserError
from pipeline.runtime.gate import parse_json, read_regular
from pipeline.runtime.units import size


class WriteError(UserError):
    """A file that cannot be written, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot write {path}: {reason}")
        self.reason = reason


def explain_write_error(path: Path, error: OSError) -> Exception:
    """The error to raise for a failed write: a `UserError` where the user can mend it, else itself with the path."""
    reason = WRITE_REASONS.get(error.errno or 0)
    if reason is not None:
        return WriteError(path, reason)
    return error if error.filename or error.errno is None else OSError(error.errno, error.strerror, str(path))


@contextlib.contextmanager
def explained_writes(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only target or a missing permission inside the block into a `UserError`.

    Of several around one another the outermost names the file: what a user asked for, not the temporary one.
    """
    try:
        yield
    except WriteError as error:
        raise WriteError(path, error.reason) from error
    except OSError as error:
        raise explain_write_error(path, error) from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents; a failure the user can mend becomes a `UserError`."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, but a folder is needed there; choose another output path")
    with explained_writes(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise UserError(f"{path} is a link that leads nowhere; remove it, or choose another path") from error
        except FileNotFoundError as error:  # file systems such as /proc answer so
            raise UserError(f"the folder {path} cannot be made there; choose another output path") from error


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise UserError unless the disk that a folder is on, or will be, has that many bytes for what is to be made."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{what} and the work for it take {size(needed)}, but {folder} has {size(free)} free; free some space or "
            "choose another --out"
        )


def flush_folder(path: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    _flush(path, os.O_RDONLY)


def flush_file(path: Path) -> None:
    """Make the file's contents survive a power cut."""
    _flush(path, os.O_RDWR)


def flush_tree(folder: Path) -> None:
    """Make everything in the folder survive a power cut, all but its own name."""
    for inner, _, names in os.walk(folder):
        for name in names:
            flush_file(Path(inner, name))
        flush_folder(Path(inner))


def _flush(path: Path, access: int) -> None:
    descriptor = os.open(path, access)
    try:
        os.fsync(descriptor)
    except OSError as error:  # of a number it does not know the name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, *, work_folder: Path | None = None) -> Iterator[Path]:
    """A temporary path that becomes `path`, flushed and renamed, when the block ends without an exception.

    The temporary stands in `work_folder` (same file system) or, hidden, beside `path`. On an exception it is
    removed, and whatever was at `path` before stays.

    Raises:
        UserError: the disk is full or read-only, or there is no permission.
    """
    name = f"{path.name}.{os.getpid()}.partial"
    temporary = (work_folder / name) if work_folder else path.with_name(f".{name}")
    with explained_writes(path):
        try:
            yield temporary
            flush_file(temporary)
            temporary.replace(path)
            flush_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes, *, work_folder: Path | None = None) -> None:
    """Write a whole file under its final name, or nothing."""
    with replacing(path, work_folder=work_folder) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any, *, work_folder: Path | None = None) -> None:
    """Write JSON with keys in the given order, so that equal values give equal bytes. NaN is refused."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode(), work_folder=work_folder)


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: the file is missing, unreadable, no regular file, or not JSON within the gate's limits.
    """
    try:
        return parse_json(read_regular(path), path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its rights") from error


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_folder(temporary: Path, final: Path) -> None:
    """Flush every file of a finished folder and rename it, so that it appears whole or not at all.

    Raises:
        UserError: the disk is full or read-only, or there is no permission.
    """
    with explained_writes(final):
        flush_tree(temporary)
        temporary.rename(final)
        flush_folder(final.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder of ours; one that is already gone is no error."""
    shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file or a folder of ours; one that is already gone is no error."""
    if path.is_dir() and not path.is_symlink():
        remove_folder(path)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
