"""The network: its configuration and presets, the model in four conditioning designs, and its costs counted."""

from pipeline.dit.config import PRESETS, Conditioning, ConfigError, DiTConfig
from pipeline.dit.macs import ModelRow, count_macs, count_parameters, models_markdown, models_table
from pipeline.dit.model import DiT, compile_blocks

__all__ = [
    "PRESETS",
    "Conditioning",
    "ConfigError",
    "DiT",
    "DiTConfig",
    "ModelRow",
    "compile_blocks",
    "count_macs",
    "count_parameters",
    "models_markdown",
    "models_table",
]
