"""Images inside a zip, read in place: StyleGAN's and EDM's data sets, and class folders that were zipped."""

import lzma
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from extract.sources.archives import class_folders, dataset_json_in
from extract.sources.dataset_json import DATASET_JSON, check_member, labelled_by_dataset_json
from extract.sources.folders import gone, storage_failed
from extract.sources.labels import Labels, labels_of_names, synsets_in_names
from extract.sources.listing import UNLABELLED, Listing, MtimeSize, Source, UnreadableInputError, sorted_listing
from extract.sources.litter import LeftOut, rule_against_path
from extract.sources.mistaken import refuse_containers
from pipeline.hub import POINTER_ADVICE, is_pointer
from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import MOST_IMAGE_BYTES, shortened

_HEADER = struct.Struct("<4s5H3I2H")
"""Of a file in a zip: signature, version, flags, method, time, date, CRC-32, two sizes, lengths of name and extra."""
_ENCRYPTED = 1
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, ValueError, struct.error)
"""What reading one may end in; RuntimeError for a password or a method that nobody knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipSource(Source):
    """One zip of images."""

    path: Path
    ignored: tuple[str, ...] = ()
    layout: str = "auto"
    split: str = "train"

    @property
    def description(self) -> str:
        return f"zip {self.path}"

    @property
    def identity(self) -> str:
        return "\n".join(["zip", str(self.path.absolute()), *self.ignored, self.layout, self.split])

    def inputs(self) -> Listing:
        left_out = LeftOut()
        place_of: dict[str, tuple[int, int, int]] = {}
        original: dict[str, zipfile.ZipInfo] = {}
        try:
            stamps = [MtimeSize.of(self.path)]
            with zipfile.ZipFile(self.path) as archive:
                for member in archive.infolist():
                    name = member.filename.replace("\\", "/")  # some programs of Windows write it so
                    if name.endswith("/"):
                        continue
                    if (rule := rule_against_path(name, self.ignored)) is not None:
                        left_out.add(rule, name)
                        continue
                    if not 0 <= member.header_offset <= stamps[0].size - member.compress_size:
                        raise zipfile.BadZipFile(f"{shortened(name)} lies outside of it")
                    if name in place_of:
                        raise UserError(f"{self.path} holds {name} twice; make it anew")
                    place_of[name] = (0, member.header_offset, member.compress_size)
                    original[name] = member
                told = dataset_json_in(place_of) if self.layout in ("auto", "dataset-json") else None
                data = None
                if told is not None:
                    check_member(original[told].file_size, f"{self.path}/{told}")
                    data = archive.read(original[told])
        except _DAMAGED as error:
            if is_pointer(self.path):
                raise UserError(f"{self.path} {POINTER_ADVICE}") from error
            raise UserError(f"{self.path} cannot be read as a zip ({error}); fetch it again or unpack it") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error}); check --data") from error
        if not place_of:
            left = "; ".join(left_out.notes())
            raise UserError(f"{self.path} holds no files{f' ({left})' if left else ''}; --data needs images in it")
        refuse_containers(str(self.path), list(place_of))
        keys, labels, labels_from, notes = self._labelled(list(place_of), told, data, left_out)
        return sorted_listing(
            keys,
            labels.values,
            places=[place_of[key] for key in keys],
            class_ids=labels.class_ids,
            containers=(str(self.path),),
            mtime_sizes=stamps,
            notes=[*notes, *left_out.notes()],
            labels_from=labels_from if labels.class_ids else "",
            order=labels.order,
        )

    def _labelled(
        self, names: list[str], told: str | None, data: bytes | None, left_out: LeftOut
    ) -> tuple[list[str], Labels, str, list[str]]:
        folder = (told or "").removesuffix(DATASET_JSON)
        if (
            data is not None
            and (found := labelled_by_dataset_json(data, names, f"{self.path}/{told}", folder)) is not None
        ):
            return found.keys, found.labels, DATASET_JSON, found.notes
        if self.layout == "dataset-json":
            raise UserError(f"--layout dataset-json: {self.path} holds no {DATASET_JSON} with labels in it")
        if self.layout == "flat":
            return names, Labels(values=[UNLABELLED] * len(names)), "", []
        kept, folders = class_folders(names, self.split, left_out, where=self.path, layout=self.layout)
        names = [names[k] for k in kept]
        if folders is not None:
            return names, labels_of_names(folders), "the folders inside the zip", []
        if (synsets := synsets_in_names(names)) is not None:
            return names, labels_of_names(synsets), "the synsets in file names", []
        return names, Labels(values=[UNLABELLED] * len(names)), "", []

    def read(self, listing: Listing, index: int) -> bytes:
        _, offset, size = (int(number) for number in listing.places[index])
        if size > MOST_IMAGE_BYTES:
            raise UnreadableInputError(f"the file has {size:,} bytes, more than any image here may have")
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                header = _HEADER.unpack(os.pread(descriptor, _HEADER.size, offset))
                start = offset + _HEADER.size + header[9] + header[10]
                data = os.pread(descriptor, size, start)
            finally:
                os.close(descriptor)
        except FileNotFoundError as error:
            raise UserError(gone(self.path)) from error
        except struct.error as error:
            raise UserError(f"{self.path} is shorter than when it was listed; bring it back and run again") from error
        except OSError as error:
            raise UserError(storage_failed(self.path, error)) from error
        if header[0] != b"PK\3\4" or len(data) < size:
            raise UserError(f"{self.path} is not as it was listed; bring the whole file back and run again")
        if header[2] & _ENCRYPTED:
            raise UnreadableInputError("encrypted in its zip; unpack it first")
        return data if header[3] == zipfile.ZIP_STORED else _inflated(data, header[3])


def _inflated(data: bytes, method: int) -> bytes:
    """The contents of a compressed member.

    Raises:
        UnreadableInputError: it is damaged, too large, or compressed in a way that is not read.
    """
    if method != zipfile.ZIP_DEFLATED:
        raise UnreadableInputError(f"compressed by method {method} in its zip; unpack it first")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        contents = inflater.decompress(data, MOST_IMAGE_BYTES)
    except zlib.error as error:
        raise UnreadableInputError(f"damaged in its zip ({error})") from error
    if not inflater.eof:
        raise UnreadableInputError("cut off in its zip, or more bytes than any image here may have")
    return contents
