"""An encoder's features beside a latent store, in `STORE/features/`: docs/features.md.

`FeatureStore` reads them, `VisionEncoder` is what makes them, `writer` writes shards and the manifest. Nothing in the
store itself changes by them: a reader that knows none of it reads no byte more.
"""

from typing import TYPE_CHECKING

from pipeline import loaded_late
from pipeline.features.manifest import Columns, FeatureManifest

if TYPE_CHECKING:
    from pipeline.features.store import FeatureStore

__all__ = ["Columns", "FeatureManifest", "FeatureStore"]
__getattr__ = loaded_late(__name__, {"FeatureStore": "store"})
