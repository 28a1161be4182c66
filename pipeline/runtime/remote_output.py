"""An output behind a URL: made on this machine's disk as any other, then put there whole, its JSON last.

    far = RemoteOutput(url, folder)     far.local is the path to make it under, with all that local outputs promise
    far.begin(request)                  before it is made: a place that cannot be written is refused now
    far.put({…}, overwrite=…)           every object whole; the last one, the JSON, says that they are finished
    far.forget()

Several objects cannot appear at once, so a note goes up at the beginning, `.NAME.work/upload.json`, that tells which
request they answer; it goes after the last. So whoever gives the same command again, on this machine or another,
completes what a kill interrupted, and nobody else takes a part for a whole.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.runtime.console import say
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import make_folder, remove
from pipeline.runtime.gate import parse_json
from pipeline.runtime.publish import work_folder_of
from pipeline.runtime.remote_files import UrlFolder
from pipeline.runtime.work_queue import exclusive

_AT_ONCE = 16


class RemoteOutput:
    """A name behind a URL, and where it is made on this machine."""

    def __init__(self, url: str, cache: Path, made_for: str = "") -> None:
        """Raise UserError if there is no such kind of URL, or none that takes files.

        Args:
            url: of what is to be there.
            cache: a folder of this machine, shared by the processes that make it; what is made goes when it is there.
            made_for: what else keeps the folder apart from those of other commands.
        """
        parent, _, self.name = url.rstrip("/").rpartition("/")
        if not self.name or parent.endswith(":/"):
            raise UserError(f"{url} names no file or folder of its own; give one below the bucket")
        self.far = UrlFolder(parent)
        self.far.check_writable(self.name)
        key = hashlib.sha256(f"{parent}/{self.name}\n{made_for}".encode()).hexdigest()
        self._folder = cache / "outputs" / key[:16]
        self.local = self._folder / self.name
        self._goes_on = False
        self._note = work_folder_of(Path(self.name)).as_posix() + "/upload.json"

    @property
    def url(self) -> str:
        return self.far.describe(self.name)

    def begun(self) -> str | None:
        """Which request an upload that was interrupted answers; None where there was none."""
        data = self.far.read(self._note)
        said = None if data is None else parse_json(data, Path(self.far.describe(self._note)))
        return None if data is None else str(said.get("request")) if isinstance(said, dict) else ""

    def check_free(self, names: tuple[str, ...], request: str) -> None:
        """Raise UserError unless nothing is there, or parts of what this very request asks for.

        Args:
            names: of all objects that will be put; below a folder's name nothing may be.
            request: a digest of all that the bytes depend on.
        """
        begun = self.begun()
        if begun == request:
            return
        if begun is not None:
            raise UserError(
                f"{self.url} is being put there by another command, or was when that ended; give that one again to "
                "finish it, or pass --overwrite"
            )
        for name in names:
            if self.far.size(name) is not None or self.far.names(name):
                where = self.far.describe(name)
                raise UserError(f"{where} is there already; pass --overwrite to replace it, or choose another name")

    def begin(self, request: str) -> bool:
        """Tell there what is being made; whether this very request was already begun, and may be made here.

        Raises:
            UserError: nothing can be put there.
        """
        self._goes_on = self.begun() == request
        if not self._goes_on:
            self.far.put(self._note, (json.dumps({"request": request}) + "\n").encode())
        return self._goes_on

    def withdraw(self) -> None:
        """Take that back, as it cannot be made, unless an interrupted upload may have left parts."""
        if not self._goes_on:
            self.far.remove(self._note)

    def put(self, files: Mapping[str, Path], *, overwrite: bool, gone: tuple[str, ...] = ()) -> None:
        """Put everything there, what it counts by last.

        Args:
            files: by name; the last is what the others count by.
            overwrite: whether to replace what is there; else only objects of the same bytes may be.
            gone: objects of what was there before that are to go.

        Raises:
            UserError: something is there that is not to be replaced, or it cannot be put there; what is here stays.
        """
        if overwrite and len(files) > 1:
            self.far.remove(list(files)[-1])
        self.far.put_all(files, replaces=overwrite, at_once=_AT_ONCE)
        for name in gone:
            self.far.remove(name)
        say(f"all of it is at {self.url}")

    def forget(self) -> None:
        """Remove what was made here, and the note of an upload, as all of it is there."""
        self.far.remove(self._note)
        for path in self._folder.glob("[!.]*"):  # not what other processes of the same command are at
            remove(path)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process of this machine that puts it there."""
        make_folder(self._folder)
        with exclusive(self._folder / "upload.lock", needed=False):
            yield
