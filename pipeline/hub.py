"""Models from the Hugging Face Hub: the one place that downloads them, and a DiT pipeline fetched settings first."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json

POINTER_ADVICE: Final = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
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
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def fetch_pipeline(name: str) -> Path:
    """The local folder of the Hub's diffusers DiT pipeline of that name, from the Hub's cache if it is there.

    Raises:
        UserError: the Hub cannot be reached and holds no cached copy, has no such repository, or it is no DiT.
    """
    folder = _fetch_part(name, ["*.json"])
    index = folder / "model_index.json"
    kind = read_json(index).get("_class_name") if index.is_file() else "repository without model_index.json"
    if kind != "DiTPipeline":
        raise UserError(f"{name} on the Hub is a {kind}, not a DiTPipeline; give the name of a diffusers DiT pipeline")
    for suffix in (".safetensors", ".bin"):
        folder = _fetch_part(name, weight_patterns("transformer/", suffix))
        if any((folder / "transformer").glob(f"*{suffix}")):
            break
    with contextlib.suppress(UserError):  # a cached copy without the VAE still is a network
        _fetch_part(name, weight_patterns("vae/", ".safetensors"))
    return folder


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
