"""A tar as a file: its members and where they lie, what is left of it without images, and parts of one behind a URL."""

import os
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, cast

from extract.sources.samples import LINK, Member
from pipeline.hub import POINTER_ADVICE, is_pointer
from pipeline.image_names import named_like_image
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import check_regular, shortened
from pipeline.runtime.remote_files import UrlFolder

_AFTER_THE_END = 1 << 16
_COPIED_AT_ONCE = 1 << 20
_LARGEST_HEADER = 1 << 26


def part_of(address: str, offset: int, size: int) -> bytes:
    """So many bytes of a file behind a URL, from a place on."""
    folder, name = _folder_of(address)
    return folder.read_part(name, offset, size)


@cache
def _folder_of(address: str) -> tuple[UrlFolder, str]:
    parent, _, name = address.rpartition("/")
    return UrlFolder(parent), name


def without_images(path: Path) -> None:
    """Leave of a tar its headers and all that is no image, at their places; where images were, the file has holes."""
    thin = path.with_name(f"{path.name.removesuffix('.partial')}.thin.partial")
    try:
        with path.open("rb") as whole, thin.open("wb") as target:
            end = os.fstat(whole.fileno()).st_size
            images = [(member.offset, member.size) for member in tar_members(path) if named_like_image(member.name)]
            done = 0
            for offset, size in [*sorted(image for image in images if image[1] > 0), (end, 0)]:
                while done < offset:
                    done += target.write(os.pread(whole.fileno(), min(_COPIED_AT_ONCE, offset - done), done))
                    target.flush()
                done = max(done, offset + size)
                target.seek(done)
            target.truncate(end)
        thin.replace(path)
    finally:
        thin.unlink(missing_ok=True)


def tar_members(path: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """The files and links of a tar, in order, offsets counted from the start of the file at `path`.

    Args:
        path: the file.
        start: where the tar begins in it.
        size: how many bytes the tar has; None, up to the end of the file.

    Raises:
        UserError: the file is missing, is no tar, is compressed, or is cut off.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            window = _Window(file, start, os.fstat(file.fileno()).st_size - start if size is None else size)
            with tarfile.open(fileobj=cast("IO[bytes]", window), mode="r:") as archive:
                last = -1
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined] # tarfile would keep a million objects
                    _check_place(path, member, window.size, archive.offset > last)
                    last = archive.offset
                    if member.isreg() and not member.issparse():
                        yield Member(member.name, start + member.offset_data, member.size)
                    elif member.isreg() or member.issym() or member.islnk():
                        yield Member(member.name, start + member.offset_data, LINK)
                window.seek(archive.offset)
                if window.read(512) != bytes(512):
                    raise UserError(f"{path} is cut off: its end mark is missing; fetch it again")
                if any(window.read(_AFTER_THE_END)):
                    raise UserError(
                        f"{path} goes on after its end mark, as tars that were joined by cat do; give each as a file "
                        f"of its own"
                    )
    except (tarfile.TarError, ValueError, RecursionError) as error:  # headers of headers, numbers that are none
        if is_pointer(path):
            raise UserError(f"{path} {POINTER_ADVICE}") from error
        raise UserError(f"{path} cannot be read as an uncompressed tar ({error}); unpack or fetch it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the path and its rights") from error


def _check_place(path: Path, member: tarfile.TarInfo, held: int, goes_on: bool) -> None:
    """Raise a `UserError` for a member that is not within its tar, or leads back in it."""
    end = member.offset_data + (0 if member.issparse() or not member.isreg() else member.size)
    if member.size < 0 or not goes_on or end > held:
        raise UserError(
            f"{path} is damaged or cut off: {shortened(member.name)} claims {member.size} bytes from byte "
            f"{member.offset_data} on, but the tar has {held}; fetch it again"
        )


class _Window:
    """A part of an open file that looks like a file of its own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self.size, self._position = file, start, size, 0

    def read(self, count: int) -> bytes:
        if count > _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header claims {count} bytes, more than the {_LARGEST_HEADER} that one may have")
        data = os.pread(
            self._file.fileno(), max(0, min(count, self.size - self._position)), self._start + self._position
        )
        self._position += len(data)
        return data

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def tell(self) -> int:
        return self._position
