"""What the numbers of a study say: samples to a threshold, intervals over seeds, a fit on log axes, a sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES, CONFIDENCE = 10_000, 0.95
Points = Sequence[tuple[float, float]]
"""(samples, value) in the order of samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A figure and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaw:
    """y = factor · x^exponent, by least squares on log axes, and Pearson's r of the logarithms."""

    factor: float
    exponent: float
    r: float

    def at(self, x: float) -> float:
        """Its value there."""
        return float(self.factor * x**self.exponent)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The fit of points with positive coordinates; None for fewer than three, or where either does not vary."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1 or min(*x, *y) <= 0:
        return None
    found = stats.linregress(np.log10(x), np.log10(y))
    return PowerLaw(factor=float(10**found.intercept), exponent=float(found.slope), r=float(found.rvalue))


def samples_to(points: Points, threshold: float) -> float | None:
    """Samples at which a curve first falls to the threshold, or None; the logarithm of the value is interpolated.

    A curve that is below it at its first point is said to cross there.
    """
    before: tuple[float, float] | None = None
    for samples, value in points:
        if value <= threshold:
            if before is None or before[1] == value:
                return samples
            share = math.log(before[1] / threshold) / math.log(before[1] / value) if value > 0 else 1.0
            return before[0] + share * (samples - before[0])
        before = samples, value
    return None


def ratio_of_means(above: Sequence[float], below: Sequence[float]) -> Interval:
    """mean(above) / mean(below) and its bootstrap interval: both sides' seeds are drawn again, with replacement.

    With two or three seeds such an interval is too narrow; with one a side it is that one ratio.
    """
    draw = np.random.default_rng(0)
    tops, bottoms = (
        np.asarray(side)[draw.integers(len(side), size=(RESAMPLES, len(side)))].mean(axis=1) for side in (above, below)
    )
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(tops / bottoms, [tail, 100 - tail])
    return Interval(value=float(np.mean(above) / np.mean(below)), low=float(low), high=float(high))


def spread(values: Sequence[float]) -> Interval:
    """The mean and its interval by Student's t; one value alone is its own interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(value=mean, low=mean, high=mean)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values))
    return Interval(value=mean, low=mean - half, high=mean + half)


def compared(name: str, values: Sequence[float], other: str, others: Sequence[float]) -> str:
    """One sentence: whether a difference of two cells is larger than what seeds do (Welch's t-test, 95 %)."""
    ours, theirs = float(np.mean(values)), float(np.mean(others))
    word = "lower" if ours < theirs else "higher"
    change = f"{name} is {abs(ours / theirs - 1):.1%} {word} than {other}"
    if min(len(values), len(others)) < 2:
        return f"{change}; with one seed a side nothing is said of noise"
    if len({*values}) == len({*others}) == 1:
        return f"{change}; seeds make no difference" if ours != theirs else f"{name} equals {other}"
    p = float(stats.ttest_ind(values, others, equal_var=False).pvalue)
    told = "larger than" if p < 1 - CONFIDENCE else "within"
    return f"{change}, which is {told} the noise of {len(values)} and {len(others)} seeds (p = {p:.2g})"
