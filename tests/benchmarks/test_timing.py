import contextlib

import pytest
import torch

from benchmarks.timing import interleaved, peak_bytes, rates, ratios, spread


def test_works_take_turns_and_the_order_turns_round_every_time():
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "AB"}, rounds=3, warm_ups=1, calls=1)
    assert "".join(calls) in {"ABBAABBA", "BAABBAAB"}
    assert {name: len(taken) for name, taken in times.items()} == {"A": 3, "B": 3}


def test_ratios_are_taken_round_by_round_and_are_above_one_where_ours_is_faster():
    times = {"plain": [2.0, 4.0, 9.0], "ours": [1.0, 4.0, 3.0]}
    found = ratios(times)
    assert (found.median, found.least, found.greatest, found.count) == (2.0, 1.0, 3.0, 3)
    assert ratios(times, per_plain=1, per_ours=2).median == 4.0
    assert rates([0.5, 2.0], 10).greatest == 20.0
    assert spread([1.0, 5.0, 3.0]).scaled(2).median == 6.0


def test_a_turn_is_the_time_of_one_call(monkeypatch):
    now = [100.0]

    def nap():
        now[0] += 0.25

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert interleaved({"nap": nap}, rounds=2, warm_ups=0, calls=3) == {"nap": [0.25, 0.25]}


def test_peak_memory_counts_what_is_kept_and_what_passes():
    @contextlib.contextmanager
    def build():
        kept = torch.ones(64, 2**20, dtype=torch.uint8)
        yield lambda: torch.ones(32, 2**20, dtype=torch.uint8).max() + kept[0, 0]

    peak = peak_bytes(build)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 80 * 2**20 < peak < 140 * 2**20
