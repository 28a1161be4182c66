"""Files of tensors as safetensors: written, read, and looked over for damage; whole, or cut into shards.

Shards are laid out as other projects do it: NAME-00001-of-00004.safetensors and so on, each with some of the tensors,
and NAME.safetensors.index.json, which says where each one is. Who names NAME.safetensors gets it or all of its shards.
"""

import contextlib
import errno
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from pipeline.hub import POINTER_ADVICE, is_pointer
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import explained_writes, write_json
from pipeline.runtime.gate import check_regular, parse_json
from pipeline.vae_folder import weight_map

PROCESS: Final = "dit_diffusion"
"""In the metadata of a lone file: the JSON of what its network was trained for, where it is not the release's."""
INDEX: Final = ".index.json"
"""Of shards, behind the name of the whole file."""
_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors)")
_AGAIN = "restore the checkpoint, or take another one"
_WRAPPERS = ("module", "_orig_mod")
_SUM, _UNKNOWN_SUM = "sha256", "0" * 64
_PIECE_BYTES = 1 << 22
_MOST_HEADER = 100_000_000
"""Bytes, as in safetensors."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by the names in it.

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_readable(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); restore or remake it") from error


def save_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, sealed: bool = False, about: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write tensors as safetensors; the bytes depend on names and values alone, the file's rights on the umask.

    Args:
        about: further texts for the metadata.
        sealed: put `contents_sha256` into the metadata, for a file with nothing beside it to say its checksum.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contents: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        # The format has no way to say that two names are one tensor, so each gets its own bytes.
        contents[name] = whole.clone() if whole.data_ptr() in memory else whole
        memory.add(whole.data_ptr())
    with explained_writes(path):
        path.touch()
        rights = path.stat().st_mode  # safetensors would leave the file to its owner alone
        try:
            save_file(contents, path, metadata={"format": "pt", **about, **({_SUM: _UNKNOWN_SUM} if sealed else {})})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        path.chmod(rights)
        if sealed:
            _seal(path)


def _seal(path: Path) -> None:
    """Put the sum into the place that was kept free for it, which moves no other byte.

    The metadata is put in order, too: safetensors writes its keys as they come.
    """
    header = read_header(path)
    header["__metadata__"] = dict(sorted({**header["__metadata__"], _SUM: contents_sha256(path)}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        assert len(text) <= length, "the header grew, and would overwrite the first tensor"
        file.write(text.ljust(length))


def find_changed(path: Path) -> str | None:
    """What differs in a lone file from what was written, or None if nothing does, or nothing was recorded.

    Looked at are the CRC of every member of a .pt's archive, and the SHA-256 that a conversion leaves in a
    safetensors file's metadata (`save_safetensors`).
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                member = archive.testzip()
            except (zipfile.BadZipFile, EOFError, zlib.error) as error:
                return f"{path.name} is no whole archive ({error})"
        return f"{member} in {path.name} has other contents than were written" if member else None
    if path.suffix != ".safetensors":
        return None
    recorded = read_header(path).get("__metadata__", {}).get(_SUM)
    if recorded is None or recorded == contents_sha256(path):
        return None
    return f"{path.name} has other contents than were written"


def contents_sha256(path: Path) -> str:
    """SHA-256, in hexadecimal, of a safetensors file apart from its metadata.

    Hashed are the header without `__metadata__`, as JSON (sorted keys, separators `,` and `:`, ASCII only) and a
    newline, then every byte behind the header.
    """
    header = {name: entry for name, entry in read_header(path).items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors.

    Raises:
        UserError: it is longer than the file, or no JSON object.
    """
    check_regular(path)
    with path.open("rb") as file:
        length, held = int.from_bytes(file.read(8), "little"), path.stat().st_size - 8
        if length > min(held, _MOST_HEADER):
            raise UserError(f"{path} is damaged: its header claims {length} bytes, but it holds {max(held, 0)}")
        header = parse_json(file.read(length), f"the header of {path}")
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise UserError(f"the header of {path} is no JSON object of tensors; restore or remake it")
    return header


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with a value that is infinite or no number."""
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def plain_names(tensors: Mapping[str, Tensor], *, origin: object) -> dict[str, Tensor]:
    """The same tensors without the `module.` and `_orig_mod.` that wrappers put into their names, at any depth.

    Raises:
        UserError: two names become one.
    """
    plain: dict[str, Tensor] = {}
    twice = []
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in plain:
            twice.append(short)
        plain[short] = tensor
    if twice:
        raise UserError(f"{origin} holds some tensors twice, with and without a prefix: {join_names(twice)}")
    return plain


def join_names(names: Iterable[str]) -> str:
    """Names in order, for a message: every one of them, numbers sorted as numbers."""
    return ", ".join(sorted(names, key=_in_order))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Numbers by how many digits they have, then as text: one of thousands of digits is no number to Python."""
    parts = re.split(r"(\d+)", name)
    return [(len(part) if place % 2 else 0, part) for place, part in enumerate(parts)]


def block_numbers(names: Iterable[str]) -> set[int]:
    """The numbers of the blocks that tensors of these names belong to; more than six digits number none."""
    found = (re.match(r"blocks\.([0-9]{1,6})\.", name) for name in names)
    return {int(match[1]) for match in found if match}


def check_readable(path: Path) -> None:
    """Look whether a file can be read at all.

    Raises:
        UserError: it is missing, no regular file, shut, or a pointer of Git LFS.
    """
    try:
        check_regular(path)
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its rights") from error
    if is_pointer(path):
        raise UserError(f"{path} {POINTER_ADVICE}")


def shard_path(file: Path, number: int, count: int) -> Path:
    """Where one of a file's shards lies, counted from 1; the file itself where there is but one."""
    return file if count == 1 else file.with_name(f"{file.stem}-{number:05d}-of-{count:05d}.safetensors")


def index_path(file: Path) -> Path:
    """Where the index of a file's shards lies."""
    return file.with_name(file.name + INDEX)


def write_index(file: Path, places: Mapping[str, str], size: int) -> None:
    """Write the index of a file's shards.

    Args:
        file: the whole that they are of.
        places: {tensor: file name of its shard}.
        size: bytes of all tensors.
    """
    write_json(index_path(file), {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def whole_file(path: Path) -> Path:
    """The file that an index or a shard is of; any other path as it is."""
    found = _SHARD_NAME.fullmatch(path.name)
    if path.name.endswith(f".safetensors{INDEX}"):
        return path.with_name(path.name.removesuffix(INDEX))
    whole = path if found is None else path.with_name(found[1] + found[2])
    return whole if index_path(whole).is_file() else path


def files_of(file: Path) -> list[Path]:
    """The files that hold a file's tensors: itself, or the index of its shards and these.

    Raises:
        UserError: the index is damaged, or names what are no shards of this file.
    """
    return [index_path(file), *_shards_of(file)] if _is_cut(file) else [file]


def _is_cut(file: Path) -> bool:
    return not file.is_file() and index_path(file).is_file()


def _shards_of(file: Path) -> dict[Path, set[str]]:
    """The names of the tensors in each of a file's shards."""
    index, shards = index_path(file), dict[Path, set[str]]()
    for name, place in weight_map(index).items():
        shards.setdefault(file.with_name(place), set()).add(name)
    wanted = {shard_path(file, number, len(shards)) for number in range(1, len(shards) + 1)}
    if shards.keys() != wanted:
        strange = join_names(path.name for path in shards.keys() - wanted)
        raise UserError(f"{index} names {strange}, which cannot be its shards; {_AGAIN}")
    return shards


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, or of its shards.

    Raises:
        UserError: the file or a shard is missing or damaged, or a shard has other tensors than the index says.
    """
    if not _is_cut(file):
        return read_safetensors(file)
    tensors: dict[str, Tensor] = {}
    for shard, names in _checked(file).items():
        held = read_safetensors(shard)
        tensors |= {name: held[name] for name in names}
    return tensors


def each_tensor(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """The named tensors of a file, or of its shards, one after the other, so that no whole file lies in memory.

    Raises:
        UserError: as `read_tensors`; or tensors are missing or of another shape.
    """
    from safetensors import safe_open

    places = _places(file) if _is_cut(file) else dict.fromkeys(read_header(file), file)
    missing = sorted(shapes.keys() - places.keys())
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}; it belongs to another network")
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(places.values())}
        for name, shape in shapes.items():
            tensor: Tensor = opened[places[name]].get_tensor(name)
            if tuple(tensor.shape) != shape:
                raise UserError(
                    f"{places[name]} has {name} as {list(tensor.shape)} instead of {list(shape)}; it belongs to "
                    f"another network"
                )
            yield tensor


def _places(file: Path) -> dict[str, Path]:
    return {name: shard for shard, names in _checked(file).items() for name in names}


def _checked(file: Path) -> dict[Path, set[str]]:
    """`_shards_of`, each of which is there and holds what the index says."""
    shards = _shards_of(file)
    for shard, names in shards.items():
        if not shard.exists():
            raise UserError(f"{shard} is missing, one of the {len(shards)} shards of {file.name}; {_AGAIN}")
        check_readable(shard)
        held = {name for name in read_header(shard) if name != "__metadata__"}
        if held != names:
            others = join_names(sorted(held ^ names)[:3])
            raise UserError(f"{shard} does not hold what {index_path(file).name} says ({others}); {_AGAIN}")
    return shards
