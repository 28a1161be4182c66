"""Quantities as people read them."""

import pytest

from pipeline.runtime.units import duration, factors, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (300, "5 min 0 s"), (9000, "2 h 30 min"), (864000, "10 d 0 h"), (90061, "1 d 1 h")],
)
def test_times_are_said_in_their_two_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (7e15, "7000.0 TB")])
def test_bytes_are_said_in_powers_of_a_thousand(count, text):
    assert size(count) == text


def test_factors_of_many_channels_are_said_by_the_least_and_the_largest():
    assert factors(0.18215) == "0.18215"
    assert factors([1.0, 2.0]) == "[1.0, 2.0]"
    assert factors([float(k) for k in range(9)]) == "one for each of 9 channels (0 … 8)"
