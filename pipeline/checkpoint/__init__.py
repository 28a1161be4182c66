"""A trained network on disk: our folder, the release's state dicts and diffusers' folders, each read the same way."""

from pipeline.checkpoint.folder import Checkpoint, load_checkpoint, read_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "read_checkpoint"]
