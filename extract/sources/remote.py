"""Whole copies of remote files, made once, for sources that need random access.

Not every server answers range requests, and the shuffled order would make a million of them; so disk is spent instead:
as much as the remote tars have, until the store is finished.
"""

import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.runtime.console import progress
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explain_write_error, make_folder, replacing

_THREADS = 4
_PIECE = 8 << 20


def is_remote(address: str) -> bool:
    """Whether an address needs fetching, as `https://…` or `s3://…` do and a path does not."""
    return "://" in address and not address.startswith("file://")


def local_place(address: str, folder: Path) -> Path:
    """Where the bytes behind an address are, or will be after `fetch`: the path itself, or a copy in `folder`."""
    if not is_remote(address):
        return Path(address.removeprefix("file://")).expanduser()
    name = hashlib.sha256(address.encode()).hexdigest()[:16]
    return folder / f"{name}-{address.partition('?')[0].rpartition('/')[2]}"


def fetch(addresses: Sequence[str], folder: Path) -> None:
    """Copy what is remote and not in `folder` yet.

    Raises:
        UserError: an address cannot be fetched, or the disk is full.
    """
    places = [(address, local_place(address, folder)) for address in addresses if is_remote(address)]
    missing = [(address, path) for address, path in places if not path.exists()]
    if missing:
        make_folder(folder)
        with (
            progress(len(missing), unit="files", description="fetching") as bar,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            for _ in pool.map(lambda pair: _fetch(*pair), missing):
                bar.update()


def _why(error: BaseException, address: str) -> str:
    """What went wrong, of an error or of what it came from: some name nothing but the address."""
    told: BaseException | None = error
    while told is not None:
        text = " ".join(str(told).split())
        if text and text != address:
            return text
        told = told.__cause__ or told.__context__
    return "it is not there" if isinstance(error, FileNotFoundError) else type(error).__name__


def _fetch(address: str, path: Path) -> None:
    import fsspec

    with replacing(path) as temporary, temporary.open("wb") as target:
        try:
            with fsspec.open(address, "rb") as remote:
                expected = getattr(remote, "size", None)
                shutil.copyfileobj(remote, target, _PIECE)
        except ImportError as error:
            raise UserError(f"{address} needs a package that is not installed ({error}); pip install it") from error
        except Exception as error:  # every fsspec backend raises errors of its own
            explained = explain_write_error(path, error) if isinstance(error, OSError) else error
            if isinstance(explained, UserError):
                raise explained from error
            reason = _why(error, address)
            raise UserError(f"{address} cannot be fetched ({reason}); check the address, then run again") from error
        if expected is not None and target.tell() != expected:
            raise UserError(f"{address} came cut off: {target.tell():,} of {expected:,} bytes; run the command again")
