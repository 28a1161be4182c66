"""The latent store: what `extract` writes and `train` reads. The format is described in docs/store.md.

`LatentStore` opens a store, `Manifest` is what its manifest says. `writer` makes stores, `verify` checks every byte.
"""

from typing import TYPE_CHECKING

from pipeline import loaded_late
from pipeline.latents.manifest import LatentSpec, Manifest, ShardEntry

if TYPE_CHECKING:
    from pipeline.latents.store import LatentStore

__all__ = ["LatentSpec", "LatentStore", "Manifest", "ShardEntry"]
__getattr__ = loaded_late(__name__, {"LatentStore": "store"})
