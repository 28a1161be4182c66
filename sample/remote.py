"""`dit-sample --out URL`: made in a folder of this machine, then put there, object after object, its JSON last."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pipeline.latents.remote import cache_folder
from pipeline.runtime.errors import UserError
from pipeline.runtime.remote_files import is_url
from pipeline.runtime.remote_output import RemoteOutput
from sample.options import SampleOptions
from sample.outputs import digest_of_lines, is_image_name, png_names
from sample.resolve import SamplingJob
from sample.sidecar import Sidecar, parse_sidecar, same_recipe, sidecar_of, strip_of, without_versions
from sample.work_folder import differences

_THREADS = 16


class RemoteSamples:
    """Where the samples go, what is there, and the options by which they are made here."""

    def __init__(self, options: SampleOptions, job: SamplingJob) -> None:
        """Raise UserError if nothing can be put at --out."""
        self.request = hashlib.sha256(json.dumps(without_versions(job.recipe), sort_keys=True).encode()).hexdigest()
        self.output = RemoteOutput(options.out, cache_folder(None), self.request)
        self.options, self.job = options, job
        local = f"{self.output.local}/" if options.kind == "folder" else str(self.output.local)
        self.made_by = replace(options, out=local)
        self._sidecar = sidecar_of(Path(self.output.name)).as_posix()
        self._strip = strip_of(Path(self.output.name)).as_posix() if options.trajectory is not None else None

    def is_finished(self) -> bool:
        """Whether it is there already, made by this very recipe; if not, whether it may be put there.

        Raises:
            UserError: something else is there that may not, or not without --overwrite, be replaced.
        """
        far, overwrite = self.output.far, self.options.overwrite
        data = far.read(self._sidecar)
        sidecar = None if data is None else parse_sidecar(data, far.describe(self._sidecar))
        if sidecar is not None and same_recipe(sidecar.recipe, self.job.recipe):
            changed = self._changed(sidecar)
            if not changed:
                return True
            if not overwrite:
                raise UserError(f"{changed} is not what its JSON says; pass --overwrite to make it again")
        elif sidecar is not None and not overwrite:
            how = differences(dict(sidecar.recipe), self.job.recipe)
            raise UserError(
                f"--out {self.output.url} is there already, made another way ({how}); pass --overwrite to replace it, "
                "or name another --out"
            )
        if self.options.kind == "folder":
            others = [name for name in far.names(self.output.name) if not is_image_name(self._within(name))]
            if others:
                raise UserError(
                    f"--out {self.output.url}/ holds other things ({others[0]}); name a folder that is empty or new"
                )
        if not overwrite:
            self.output.check_free(tuple(filter(None, (self.output.name, self._strip, self._sidecar))), self.request)
        return False

    def put(self) -> None:
        """Put what was made here there, unless another process has meanwhile."""
        local, far = self.output.local, self.output.far
        with self.output.alone():
            if not self.is_finished():
                made = sorted(path for path in local.rglob("*") if path.is_file()) if local.is_dir() else [local]
                files = {path.relative_to(local.parent).as_posix(): path for path in made}
                old = set(far.names(self.output.name)) if self.options.kind == "folder" else set()
                if self._strip is not None:
                    files[self._strip] = strip_of(local)
                files[self._sidecar] = sidecar_of(local)
                gone = tuple(sorted(old - files.keys())) if self.options.overwrite else ()
                self.output.put(files, overwrite=self.options.overwrite, gone=gone)
            self.output.forget()

    def _within(self, name: str) -> str:
        return name.removeprefix(f"{self.output.name}/")

    def _changed(self, sidecar: Sidecar) -> str | None:
        """What is not as the JSON says: by names and sizes, with --overwrite byte by byte; None if all of it is."""
        far, exact = self.output.far, self.options.overwrite
        described = {self.output.name: sidecar.output}
        if self._strip is not None:
            if sidecar.strip is None:
                return far.describe(self._strip)
            described[self._strip] = sidecar.strip
        for name, output in described.items():
            if output.file is None:
                if self._folder_changed(sidecar):
                    return self.output.url
            elif far.size(name) != output.bytes or (exact and far.sha256(name) != output.sha256):
                return far.describe(name)
        return None

    def _folder_changed(self, sidecar: Sidecar) -> bool:
        far, listed = self.output.far, self.output.far.names(self.output.name)
        names = png_names(self.job.labels.values, self.job.folder_name)
        wanted = [f"{self.output.name}/{name}" for name in names]
        if len(wanted) != sidecar.output.files or set(listed) - set(wanted):
            return True
        with ThreadPoolExecutor(_THREADS) as threads:
            if self.options.overwrite:
                sums = threads.map(far.sha256, wanted)
                lines = [f"{name} {sha256}\n" for name, sha256 in zip(names, sums, strict=True)]
                return digest_of_lines(lines) != sidecar.output.sha256
            unlisted = [name for name in wanted if name not in listed]  # a listing may lag behind
            return None in threads.map(far.size, unlisted)


def remote_samples(options: SampleOptions, job: SamplingJob) -> RemoteSamples | None:
    """Where samples go that are asked for behind a URL; None for a path."""
    return RemoteSamples(options, job) if is_url(options.out) else None
