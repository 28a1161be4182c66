"""Models from and to the Hugging Face Hub: the one place that fetches them, settings first, and that publishes them."""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.gate import shortened

HUB: Final = "hf:"
"""Before OWNER/NAME, where a name must not be taken for a folder's."""
HUB_NAME: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
POINTER_ADVICE: Final = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
_ATTRIBUTES = ".gitattributes"
_POINTER = b"version https://git-lfs.github.com/spec/"
_ANSWER_SECONDS = 5.0


def fetch(name: str, patterns: Sequence[str], *, offline: bool = False) -> Path | None:
    """The folder in the Hub's local cache that holds the repository's files of these patterns, downloaded if need be.

    Args:
        offline: ask no network; None if the cache holds nothing of the repository.

    Raises:
        UserError: the Hub cannot be reached, or has no such repository for this user.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=offline))
    except LocalEntryNotFoundError as error:
        if offline:
            return None
        raise UserError(
            f"{name} is no local folder and not in the local Hub cache, and the Hub cannot be reached; check the name, "
            f"go online once, or give a local folder"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated on the Hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name} is neither a local folder nor a repository on the Hub that you may read; check the spelling"
        ) from error
    except Exception as error:  # requests, httpx, the Hub and the disk each have errors of their own
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"{name} cannot be fetched from the Hub ({type(error).__name__}: {reason}); try again"
        ) from error


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """Whether the Hub answers; if not, its libraries know in the block, and ask their caches instead of retrying."""
    from huggingface_hub import constants, get_session

    modules: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    answers = not any(before)
    if answers:
        try:
            get_session().head(constants.ENDPOINT, timeout=_ANSWER_SECONDS)
        except Exception:  # noqa: BLE001 - of the HTTP library of the day
            answers = False
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = not answers
        yield answers
    finally:
        for module, was in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was


def is_pointer(path: Path) -> bool:
    """Whether Git LFS has left a few lines in place of the file, as a clone without `git lfs pull` does."""
    try:
        if not path.is_file():  # a pipe would wait
            return False
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def fetch_network(name: str, weights: Sequence[str]) -> Path:
    """The local folder of the Hub's checkpoint or diffusers DiT pipeline of that name, from the Hub's cache if there.

    Args:
        weights: of a checkpoint, the names of files that are wanted; those that are there come.

    Raises:
        UserError: the Hub cannot be reached and holds no cached copy, has no such repository, or it is no DiT.
    """
    folder = _fetch_part(name, ["*.json"])
    index = folder / "model_index.json"
    if not index.is_file() and (folder / "config.json").is_file():
        return _fetch_part(name, ["*.json", *weights])
    said = read_json(index) if index.is_file() else {"_class_name": "repository without model_index.json"}
    kind = said.get("_class_name") if isinstance(said, dict) else None
    if kind != "DiTPipeline":
        kind = shortened(kind).strip("'")
        raise UserError(f"{name} on the Hub is a {kind}, not a DiTPipeline; give the name of a diffusers DiT pipeline")
    for suffix in (".safetensors", ".bin"):
        folder = _fetch_part(name, weight_patterns("transformer/", suffix))
        if any((folder / "transformer").glob(f"*{suffix}")):
            break
    with contextlib.suppress(UserError):  # a cached copy without the VAE still is a network
        _fetch_part(name, weight_patterns("vae/", ".safetensors"))
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """What there is on the Hub under a name."""

    files: tuple[str, ...]
    """All but what the Hub itself puts into an empty one."""
    is_private: bool


def look_up(name: str) -> Repository | None:
    """The repository of that name, or None if there is none that this user may see.

    Raises:
        UserError: nobody is logged in, or the Hub cannot be asked.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise UserError(
            f"nobody is logged in who could write {name} on the Hub; run `hf auth login`, or set the variable HF_TOKEN"
        )
    with _answers(name):
        try:
            info = HfApi().model_info(name)
        except RepositoryNotFoundError:
            return None
        files = (sibling.rfilename for sibling in info.siblings or ())
        return Repository(files=tuple(file for file in files if file != _ATTRIBUTES), is_private=bool(info.private))


def push(name: str, folder: Path, *, private: bool, message: str) -> str:
    """Make a folder's files all that the Hub's repository holds, by one commit; its address.

    The repository is made if there is none. What it held before stays in its history.

    Raises:
        UserError: the Hub cannot be reached, or this user may not write there.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _answers(name):
        api.create_repo(name, private=private, exist_ok=True)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        gone = [file for file in api.list_repo_files(name) if file != _ATTRIBUTES and file not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(path_in_repo=file) for file in gone),
            *(CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()),
        ]
        # Not upload_folder, which may make several commits: a reader in between would find half a checkpoint.
        return str(api.create_commit(name, operations, commit_message=message).commit_url)


@contextlib.contextmanager
def _answers(name: str) -> Iterator[None]:
    """Turn what the Hub or the network refuses in the block into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # httpx, the Hub and the disk each have errors of their own
        error = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
        reason = " ".join(str(error).split())[:300].rstrip(".")
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        advice = "try again"
        if status in {401, 403}:
            advice = "log in with `hf auth login` as someone who may write there, or set HF_TOKEN to a token that may"
        raise UserError(f"{name} cannot be written on the Hub ({type(error).__name__}: {reason}); {advice}") from error


def weight_patterns(prefix: str, suffix: str) -> list[str]:
    """Patterns of all settings and of a part's weights, whole or in shards, but not of its half-precision variants."""
    return ["*.json", *(f"{prefix}diffusion_pytorch_model{shard}{suffix}" for shard in ("", "-0*"))]


def _fetch_part(name: str, patterns: Sequence[str]) -> Path:
    try:
        folder = fetch(name, patterns)
    except UserError as error:
        raise UserError(
            f"there is neither a file or folder {name} here nor could the Hub's repository of that name be fetched: "
            f"{error}"
        ) from error
    assert folder is not None, "only a look into the cache alone finds nothing"
    return folder
