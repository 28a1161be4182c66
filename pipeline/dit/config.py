"""What a network is: its sizes, its inputs, and how it is told the timestep and the class."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from pipeline.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """One way of telling a block the timestep and the class (section 3.2 of the paper); `blocks.py` builds it."""

    modulation_vectors: int = 0
    """Vectors that a block's modulation layer regresses from the condition, for its two branches together."""
    crosses: bool = False
    """Whether a third branch looks at the condition's two vectors."""
    added_tokens: int = 0
    """Vectors of the condition that join the tokens."""
    zero_start: bool = False
    """Whether the modulation layers begin at 0, so that every block begins as the identity."""


DESIGNS: dict[str, Design] = {
    "adaln-zero": Design(modulation_vectors=6, zero_start=True),
    "adaln": Design(modulation_vectors=4),
    "cross-attention": Design(crosses=True),
    "in-context": Design(added_tokens=2),
}
"""By name, the release's first. A state dict is recognised by its tensors (`checkpoint.release`)."""

if TYPE_CHECKING:
    Conditioning = str
else:
    Conditioning = Literal[tuple(DESIGNS)]


class ConfigError(UserError, ValueError):
    """A network that cannot be built: a sentence to a command's user, a `ValueError` to a Python caller."""


def _sizes(hidden_size: int, depth: int, num_heads: int, patch_size: int) -> dict[str, int]:
    return {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": patch_size}


PRESETS: dict[str, dict[str, int]] = {
    f"DiT-{letter}/{patch_size}": _sizes(*sizes, patch_size)
    for letter, sizes in {
        "S": (384, 12, 6),
        "B": (768, 12, 12),
        "L": (1024, 24, 16),
        "XL": (1152, 28, 16),
    }.items()
    for patch_size in (2, 4, 8)
} | {"DiT-Ti/2": _sizes(128, 6, 4, 2)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockOptions:
    """How a block is built: fields of a network's configuration that are flags of training, too."""

    conditioning: Conditioning = "adaln-zero"
    """How a block is told the timestep and the class."""
    qk_norm: bool = False
    """Normalise queries and keys per head (steadier in bf16, costs some quality); the release does not."""

    @classmethod
    def choices(cls) -> dict[str, tuple[Any, ...]]:
        """{field: what it may be} of every option here, the release's own choice first."""
        hints = get_type_hints(BlockOptions)
        return {
            field.name: (False, True) if hints[field.name] is bool else get_args(hints[field.name])
            for field in dataclasses.fields(BlockOptions)
        }

    @property
    def design(self) -> Design:
        """The conditioning design."""
        return DESIGNS[self.conditioning]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DiTConfig(BlockOptions):
    """One network, complete: equal configurations have equal parameter names and shapes. Defaults are DiT-XL/2."""

    input_size: int | tuple[int, int] = 32
    """Latent cells along one side, or (height, width)."""
    patch_size: int = 2
    """Latent cells per token along one side."""
    in_channels: int = 4
    """Channels of the latent, C."""
    hidden_size: int = 1152
    """Width of a token."""
    depth: int = 28
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads; they share the width."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, in widths of a token."""
    class_dropout_prob: float = 0.1
    """Share of labels that training replaces by the null class; 0 leaves the null row out of the label table."""
    num_classes: int = 1000
    """Classes, labels 0 … num_classes - 1; 0 makes an unconditional network."""
    learn_sigma: bool = True
    """Whether C variance channels follow the C predicted ones."""

    def __post_init__(self) -> None:
        size: Any = self.input_size
        if isinstance(size, list):
            object.__setattr__(self, "input_size", tuple(size))
        wrong = _of_another_type(self) or [*_out_of_range(self), *_mismatched(self)]
        if wrong:
            raise ConfigError(f"this network cannot be built: {'; '.join(wrong)}")
        for field in dataclasses.fields(self):  # NumPy's whole numbers are none of JSON's
            value = getattr(self, field.name)
            if _is(numbers.Integral, value):
                object.__setattr__(self, field.name, int(value))

    @property
    def height(self) -> int:
        """Latent cells from top to bottom."""
        return self.input_size if isinstance(self.input_size, int) else self.input_size[0]

    @property
    def width(self) -> int:
        """Latent cells from left to right."""
        return self.input_size if isinstance(self.input_size, int) else self.input_size[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.height // self.patch_size, self.width // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def out_channels(self) -> int:
        """Channels of the output: C, or 2C with a learned variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class", where the table has a row for it (`has_null_class`)."""
        return self.num_classes

    @property
    def has_null_class(self) -> bool:
        """Whether the label table ends with the null row, which guidance needs."""
        return self.class_dropout_prob > 0 or self.num_classes == 0

    @property
    def label_rows(self) -> int:
        """Rows of the label table: one per class and, mostly, the null row."""
        return self.num_classes + self.has_null_class

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DiTConfig":
        """The preset of that name with some fields replaced.

        Raises:
            ConfigError: there is no such preset or field, or the fields do not fit together.
        """
        if name not in PRESETS:
            raise ConfigError(f"there is no model {name!r}; choose --model from {', '.join(PRESETS)}")
        return cls.from_json({**PRESETS[name], **overrides})

    def to_json(self) -> dict[str, Any]:
        """Every field by name, in plain JSON types; those of the blocks last."""
        values = dataclasses.asdict(self)
        values |= {field.name: values.pop(field.name) for field in dataclasses.fields(BlockOptions)}
        if not isinstance(self.input_size, int):
            values["input_size"] = list(self.input_size)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """The inverse of `to_json`; fields left out take their defaults.

        Raises:
            ConfigError: a key that is no field, or fields that do not fit together.
        """
        names = list(cls().to_json())
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ConfigError(f"a network has no setting {', '.join(unknown)}; it has {', '.join(names)}")
        return cls(**values)


def _of_another_type(config: DiTConfig) -> list[str]:
    """Values from a stranger's file may be anything."""
    wrong = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), type(field.default)
        wanted = {int: numbers.Integral, float: numbers.Real}.get(usual, usual)
        if field.name == "input_size" and isinstance(value, tuple):
            if len(value) != 2 or not all(_is(numbers.Integral, side) for side in value):
                wrong.append(f"input_size is {list(value)} but must be one whole number or two")
        elif not _is(wanted, value):
            kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[usual]
            wrong.append(f"{field.name} is {value!r} but must be {kind}")
    return wrong


def _is(kind: type, value: object) -> bool:
    """Whether a value is of that type; True and False are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _out_of_range(config: DiTConfig) -> list[str]:
    counts = {
        "height": config.height,
        "width": config.width,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
    }
    wrong = [f"{name} is {value} but must be at least 1" for name, value in counts.items() if value < 1]
    if config.mlp_ratio <= 0:
        wrong.append(f"mlp_ratio is {config.mlp_ratio} but must be above 0")
    if config.num_classes < 0:
        wrong.append(f"num_classes is {config.num_classes} but must be at least 0")
    if not 0 <= config.class_dropout_prob <= 1:
        wrong.append(f"class_dropout_prob is {config.class_dropout_prob} but must lie between 0 and 1")
    wrong += [
        f"{name} is {value!r} but must be one of {', '.join(map(str, choices))}"
        for name, choices in BlockOptions.choices().items()
        if (value := getattr(config, name)) not in choices
    ]
    return wrong


def _mismatched(config: DiTConfig) -> list[str]:
    wrong = []
    if config.patch_size > 0 and (config.height % config.patch_size or config.width % config.patch_size):
        wrong.append(
            f"a latent of {config.height}×{config.width} cells does not divide into patches of {config.patch_size}×"
            f"{config.patch_size}; dit-train takes a --model with another patch, dit-extract another --image-size"
        )
    if config.num_heads > 0 and config.hidden_size % config.num_heads:
        wrong.append(f"hidden_size {config.hidden_size} does not divide among num_heads {config.num_heads}")
    if config.hidden_size % 4:
        wrong.append(f"hidden_size {config.hidden_size} is no multiple of 4, which the position table needs")
    return wrong
