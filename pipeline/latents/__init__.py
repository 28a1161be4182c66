"""The latent store: what `extract` writes and `train` reads. The format is described in docs/store.md.

`LatentStore` opens a store, `Manifest` is what its manifest says. `writer` makes stores, `verify` checks every byte,
`imports` takes over other people's features.
"""

from typing import TYPE_CHECKING, Any

from pipeline.latents.manifest import LatentSpec, Manifest, ShardEntry

if TYPE_CHECKING:
    from pipeline.latents.store import LatentStore

__all__ = ["LatentSpec", "LatentStore", "Manifest", "ShardEntry"]


def __getattr__(name: str) -> Any:
    """`LatentStore` brings torch with it, so it is imported when it is first asked for."""
    if name == "LatentStore":
        from pipeline.latents.store import LatentStore

        return LatentStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
