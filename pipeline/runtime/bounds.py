"""How large the numbers of a command line may be: stated once, in an option's type, and checked when it is made.

The upper bounds are far beyond every use that makes sense; they keep a slip of the keyboard from becoming hours of
silence, a full disk or a number that no format holds.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Final, TypeAlias

from msgspec import Meta

from pipeline.runtime.described import type_and_extras
from pipeline.runtime.errors import UserError

MOST_IMAGES: Final = 20_000_000
"""Of one job of sampling; the classes of all of them are held in memory."""

Seed: TypeAlias = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Amount: TypeAlias = Annotated[int, Meta(ge=1, le=10**12)]
"""Of steps or of samples that are there anyway: 10¹² stands for never, or for all."""
AmountOrNone: TypeAlias = Annotated[int, Meta(ge=0, le=10**12)]
Images: TypeAlias = Annotated[int, Meta(ge=1, le=MOST_IMAGES)]
Shown: TypeAlias = Annotated[int, Meta(ge=1, le=1000)]
"""What one picture or one image is multiplied by."""
Batch: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 17)]
Threads: TypeAlias = Annotated[int, Meta(ge=1, le=1024)]
"""And what else a machine has at most: batches read ahead, attention heads."""
Pixels: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 14)]
ReverseSteps: TypeAlias = Annotated[int, Meta(ge=1, le=100_000)]
Time: TypeAlias = Annotated[float, Meta(ge=0, le=100_000)]
"""Of a flow, or a timestep of a diffusion's training."""
Sigma: TypeAlias = Annotated[float, Meta(gt=0, lt=12**-0.5)]
"""The relative width of a power-function average; that of weights that all count the same is 12^(-1/2)."""
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Decay: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]
Scale: TypeAlias = Annotated[float, Meta(ge=0, le=1000)]
"""Of guidance, a learning rate, a loss's or a decay's weight."""


def check_bounds(options: Any) -> None:
    """Compare every number of a dataclass with the bounds in its field's type; None and words are none.

    Raises:
        UserError: a number is out of bounds, infinite, no number, or a negative zero where none may be negative.
    """
    kind: Any = type(options)  # mypy takes type[Any] for unhashable
    for name, bounds in _bounded(kind).items():
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not _is_within(number, bounds):
                flag = name.rstrip("_").replace("_", "-")
                shown = number if isinstance(number, float) or abs(number) < 10**30 else "of so many digits"
                raise UserError(f"--{flag} {shown} must be {_in_words(bounds)}")


def are_within(numbers: Iterable[float], kind: Any) -> bool:
    """Whether numbers that stand in a text lie within a type's bounds, as `check_bounds` has it."""
    bounds = bounds_in(kind)
    assert bounds is not None, f"{kind} states no bounds"
    return all(_is_within(number, bounds) for number in numbers)


@cache
def _bounded(options_class: type) -> dict[str, Meta]:
    """{field: bounds} of the fields that state some."""
    hints = typing.get_type_hints(options_class, include_extras=True)
    found = {field.name: bounds_in(hints[field.name]) for field in dataclasses.fields(options_class)}
    return {name: bounds for name, bounds in found.items() if bounds is not None}


def bounds_in(hint: Any) -> Meta | None:
    """The first bounds annotated to a type, or to what a union or tuple is made of."""
    kind, extras = type_and_extras(hint)
    own = next((extra for extra in extras if isinstance(extra, Meta)), None)
    return own or next(filter(None, map(bounds_in, typing.get_args(kind))), None)


def _is_within(number: float, bounds: Meta) -> bool:
    if isinstance(number, float) and not math.isfinite(number):
        return False
    if (
        bounds.ge == 0 and isinstance(number, float) and math.copysign(1, number) < 0
    ):  # −0 too, which would be written down as such
        return False
    return (
        (bounds.ge is None or number >= bounds.ge)
        and (bounds.gt is None or number > bounds.gt)
        and (bounds.le is None or number <= bounds.le)
        and (bounds.lt is None or number < bounds.lt)
    )


def _in_words(bounds: Meta) -> str:
    low = f"at least {bounds.ge}" if bounds.ge is not None else f"above {bounds.gt}"
    return f"{low} and " + (f"at most {bounds.le}" if bounds.le is not None else f"below {bounds.lt}")
