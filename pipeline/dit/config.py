"""What a network is: its sizes, its inputs, and how it is told the timestep and the class."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import shortened


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
MlpKind = Literal["gelu", "swiglu"]
NormKind = Literal["layer", "rms"]


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
"""{model: the sizes that its name stands for}, those of the paper's table 1 and a tiny one."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockOptions:
    """How a block is built: fields of a network's configuration that are flags of training, too."""

    conditioning: Conditioning = "adaln-zero"
    """How a block is told the timestep and the class."""
    qk_norm: bool = False
    """Normalise queries and keys per head, with the norm of --norm: steadier in bf16. The release does not."""
    mlp: MlpKind = "gelu"
    """The block's MLP: gelu is the release's; swiglu is gated and has as many parameters."""
    norm: NormKind = "layer"
    """The block's norms: layer is the release's LayerNorm; rms divides by the root mean square and has no bias."""
    rotary: bool = False
    """Turn queries and keys by their row and column (2-D rotary positions) besides adding the table of positions."""
    value_residual: bool = False
    """Mix the first block's attention values into those of every other block, by a learned share."""

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


BLOCKS: dict[str, dict[str, Any]] = {
    "release": {"qk_norm": False, "mlp": "gelu", "norm": "layer", "rotary": False, "value_residual": False},
    "modern": {"qk_norm": True, "mlp": "swiglu", "norm": "rms", "rotary": True, "value_residual": True},
}
"""What `--blocks NAME` stands for, as fields of BlockOptions."""

if TYPE_CHECKING:
    Blocks = str
else:
    Blocks = Literal[tuple(BLOCKS)]
_WHERE_SET = (
    *("middle_head", "align_latent", "align_features", "class_token", "head_width", "head_depth"),
    *("mlp", "norm", "rotary", "value_residual"),
)
"""Fields that a config.json names only where they are not the release's."""
WIDEST_FEATURES = 1 << 16
WIDEST_MLP = 1000
"""In widths of a token."""
MIDDLE = 0.3
"""Where the middle head looks, as a share of the depth: after 8 of XL's 28 blocks (arXiv 2512.24176)."""


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
    middle_head: bool = False
    """Whether a second final layer looks at the tokens after `middle_block` blocks."""
    align_latent: bool = False
    """Whether a small MLP makes the clean latent of the tokens there, in training alone."""
    align_features: int = 0
    """Width of an encoder's features, which another MLP makes of the tokens there, in training alone; 0 for none."""
    class_token: int = 0
    """Numbers of an encoder's class token, which is denoised along with the latent as one more token; 0 for none."""
    head_width: int = 0
    """Width of the blocks behind these, which read the noisy latent once more (`WideHead`); 0 for none."""
    head_depth: int = 2
    """How many those are."""

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
        return self.in_channels * self.output_parts

    @property
    def output_parts(self) -> int:
        """Numbers of the output for one of the latent's: a prediction, and a variance where that is learned."""
        return 2 if self.learn_sigma else 1

    @property
    def state_channels(self) -> int:
        """Channels of what the network is given: the latent's, and as many as hold a class token (`class_token`)."""
        return self.in_channels + -(-self.class_token // (self.height * self.width))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of what the network is given, for one image."""
        return self.state_channels, self.height, self.width

    @property
    def head(self) -> "DiTConfig | None":
        """The blocks behind these as a network of its own."""
        if not self.head_width:
            return None
        return dataclasses.replace(
            self,
            hidden_size=self.head_width,
            depth=self.head_depth,
            conditioning="adaln-zero",
            value_residual=False,
            middle_head=False,
            align_latent=False,
            align_features=0,
            class_token=0,
            head_width=0,
        )

    @property
    def token_values(self) -> int:
        """Numbers of the latent in one token, C·p²."""
        return self.in_channels * self.patch_size**2

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer: SwiGLU's third matrix is paid for with 2/3 of it, in multiples of 8."""
        size = int(self.hidden_size * self.mlp_ratio)
        return max(8, 8 * round(size / 12)) if self.mlp == "swiglu" else size

    @property
    def least_parameters(self) -> int:
        """Those of the matrices that every design has: no network of this configuration has fewer."""
        width, head = self.hidden_size, self.head_depth * self.head_width**2
        blocks = (4 + 2 * self.mlp_ratio) * (self.depth * width**2 + head)
        return int(blocks + width * (self.label_rows + self.token_values))

    @property
    def middle_block(self) -> int:
        """Blocks before the tokens that the middle head and the aligner look at."""
        return max(1, round(MIDDLE * self.depth))

    @property
    def projector_size(self) -> int:
        """Width of the hidden layers of `align_features`' MLP: REPA's, or four widths of a narrow network."""
        return min(2048, 4 * self.hidden_size)

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
        """Every field by name, in plain JSON types, those of the blocks last; newer ones only where they are set."""
        values = {name: getattr(self, name) for name in self._names()}
        for field in dataclasses.fields(self):
            if field.name in _WHERE_SET and values[field.name] == field.default:
                del values[field.name]
        if not isinstance(self.input_size, int):
            values["input_size"] = list(self.input_size)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """The inverse of `to_json`; fields left out take their defaults.

        Raises:
            ConfigError: a key that is no field, or fields that do not fit together.
        """
        names = cls._names()
        unknown = sorted(set(values) - set(names))
        if unknown:
            told = ", ".join(name if name.isidentifier() else shortened(name) for name in unknown)
            raise ConfigError(f"a network has no setting {told}; it has {', '.join(names)}")
        return cls(**values)

    @classmethod
    def _names(cls) -> list[str]:
        """Every field, those of the blocks last."""
        of_blocks = [field.name for field in dataclasses.fields(BlockOptions)]
        return [field.name for field in dataclasses.fields(cls) if field.name not in of_blocks] + of_blocks


def _of_another_type(config: DiTConfig) -> list[str]:
    """Values from a stranger's file may be anything."""
    wrong = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), type(field.default)
        wanted = {int: numbers.Integral, float: numbers.Real}.get(usual, usual)
        if field.name == "input_size" and isinstance(value, tuple):
            if len(value) != 2 or not all(_is(numbers.Integral, side) for side in value):
                wrong.append(f"input_size is {shortened(list(value))} but must be one whole number or two")
        elif not _is(wanted, value):
            kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[usual]
            wrong.append(f"{field.name} is {shortened(value)} but must be {kind}")
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
        "head_depth": config.head_depth,
    }
    wrong = [f"{name} is {shortened(value)} but must be at least 1" for name, value in counts.items() if value < 1]
    if not 0 < config.mlp_ratio <= WIDEST_MLP:
        wrong.append(f"mlp_ratio is {config.mlp_ratio} but must be above 0 and at most {WIDEST_MLP}")
    if not 0 <= config.align_features <= WIDEST_FEATURES:
        wrong.append(f"align_features is {shortened(config.align_features)} but must lie in 0 … {WIDEST_FEATURES}")
    if not 0 <= config.class_token <= WIDEST_FEATURES:
        wrong.append(f"class_token is {shortened(config.class_token)} but must lie in 0 … {WIDEST_FEATURES}")
    if not 0 <= config.head_width <= WIDEST_FEATURES:
        wrong.append(f"head_width is {shortened(config.head_width)} but must lie in 0 … {WIDEST_FEATURES}")
    if config.num_classes < 0:
        wrong.append(f"num_classes is {config.num_classes} but must be at least 0")
    if not 0 <= config.class_dropout_prob <= 1:
        wrong.append(f"class_dropout_prob is {config.class_dropout_prob} but must lie between 0 and 1")
    wrong += [
        f"{name} is {shortened(value)} but must be one of {', '.join(map(str, choices))}"
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
    if config.class_token and config.head_width:
        wrong.append("class_token does not go with head_width, whose blocks have no such token; leave one away")
    return wrong + [fault for name in ("hidden_size", "head_width") for fault in _width_faults(config, name)]


def _width_faults(config: DiTConfig, name: str) -> list[str]:
    """Why the attention heads or the position table do not go with a width."""
    wrong, width = [], getattr(config, name)
    if config.num_heads > 0 and width % config.num_heads:
        wrong.append(f"{name} {width} does not divide among num_heads {config.num_heads}")
    elif config.rotary and config.num_heads > 0 and (width // config.num_heads) % 4:
        wrong.append(f"a head of {width // config.num_heads} channels is no multiple of 4, which rotary needs")
    if width % 4:
        wrong.append(f"{name} {width} is no multiple of 4, which the position table needs")
    return wrong
