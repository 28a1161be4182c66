"""A trained network on disk: our folder, the release's state dicts and diffusers' folders, each read the same way."""

from pipeline.checkpoint.folder import checkpoint_folders, find_damage, newest_checkpoint
from pipeline.checkpoint.forms import Checkpoint, Stored, build_model, load_checkpoint, read_checkpoint, read_stored

__all__ = [
    "Checkpoint",
    "Stored",
    "build_model",
    "checkpoint_folders",
    "find_damage",
    "load_checkpoint",
    "newest_checkpoint",
    "read_checkpoint",
    "read_stored",
]
