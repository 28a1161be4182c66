"""The network: its configuration and presets, the model in four conditioning designs, and its costs counted.

`config` loads without torch; the rest is imported when asked for.
"""

from typing import TYPE_CHECKING

from pipeline import loaded_late
from pipeline.dit.config import DESIGNS, PRESETS, BlockOptions, Conditioning, ConfigError, DiTConfig

if TYPE_CHECKING:
    from pipeline.dit.macs import count_macs, count_parameters
    from pipeline.dit.model import DiT, compile_blocks

__all__ = [
    "DESIGNS",
    "PRESETS",
    "BlockOptions",
    "Conditioning",
    "ConfigError",
    "DiT",
    "DiTConfig",
    "compile_blocks",
    "count_macs",
    "count_parameters",
]
__getattr__ = loaded_late(
    __name__, {"DiT": "model", "compile_blocks": "model", "count_macs": "macs", "count_parameters": "macs"}
)
