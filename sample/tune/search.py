"""Which settings to try: a grid, and within it golden-section searches over what is a range. No torch."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

ROUNDS = 2  # over several ranges in turn
_SHARE = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way of sampling; None is what dit-sample would take."""

    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    interval: str | None = None
    """A:B, as --guidance-interval; None is always."""
    weights: str = "ema"

    def at(self, axis: str, value: float) -> "Setting":
        """This setting with another guidance or sigma, of four digits, as a command line has it."""
        value = float(f"{value:.4g}")
        return replace(self, guidance=value) if axis == "guidance" else replace(self, weights=f"sigma={value:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What is searched."""

    grid: tuple[Setting, ...]
    """Every combination of what was listed."""
    ranges: Mapping[str, tuple[float, float]]
    """{"guidance" or "sigma": (low, high)}, in each of those combinations."""

    @property
    def starts(self) -> tuple[Setting, ...]:
        """The grid, each range in its middle."""
        starts = list(self.grid)
        for axis, (low, high) in self.ranges.items():
            starts = [start.at(axis, (low + high) / 2) for start in starts]
        return tuple(starts)


def grid_of(**listed: Sequence[object]) -> tuple[Setting, ...]:
    """Every combination of the values listed for each field of a setting, the last field's changing fastest."""
    return tuple(
        Setting(**dict(zip(listed, values, strict=True)))  # type: ignore[arg-type]  # named by their fields
        for values in itertools.product(*listed.values())
    )


def search(space: Space, values: Callable[[Sequence[Setting]], Sequence[float]], *, points: int) -> None:
    """Have every setting valued that the space asks for: what to try next depends on the values alone.

    Args:
        values: gives the value of each setting, less is better; it may be asked for the same one again.
        points: how many of every golden-section search.
    """
    if not space.ranges:
        values(space.grid)
        return
    for start in space.starts:
        here = start
        for _ in range(ROUNDS if len(space.ranges) > 1 else 1):
            for axis, (low, high) in space.ranges.items():

                def along(places: Sequence[float], here: Setting = here, axis: str = axis) -> Sequence[float]:
                    return values([here.at(axis, place) for place in places])

                here = here.at(axis, golden_section(along, low, high, points=points))


def golden_section(
    values: Callable[[Sequence[float]], Sequence[float]], low: float, high: float, *, points: int
) -> float:
    """Where a function with one valley within low … high is least, by golden-section search (Kiefer 1953).

    Each further point divides the interval that the valley must lie in by 1.618.

    Args:
        values: the function, of one place or of two that do not depend on each other.
        points: how many places are tried, at least two.
    """
    left, right = high - _SHARE * (high - low), low + _SHARE * (high - low)
    at_left, at_right = values([left, right])
    for _ in range(points - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _SHARE * (high - low)
            (at_left,) = values([left])
        else:
            low, left, at_left = left, right, at_right
            right = low + _SHARE * (high - low)
            (at_right,) = values([right])
    return left if at_left <= at_right else right
