"""What a card is needed for, rehearsed on one that computes nothing."""

from pathlib import Path

import torch

from benchmarks import sitting
from benchmarks.machine import Ceilings, Setting
from benchmarks.timing import spread
from tests.fake_cuda.runs import MARKS, findings

pytestmark = MARKS
RATES = dict.fromkeys(("fp32", "tf32", "bf16", "copy", "upload"), spread([1.0]))


def test_every_piece_of_the_sitting_runs_on_a_card_to_its_rows(guard):
    setting = Setting(device=torch.device("cuda", 0), ceilings=Ceilings(**RATES), folder=Path(), quick=True)
    units = {unit.name for unit in sitting.units(setting)}
    commands = {name for name in units if name.startswith("processes")}  # which know nothing of this card
    assert len(units) > 20 and len(commands) == 1
    rehearsed = findings("sitting.py", guard)
    assert rehearsed["failed"] == {}
    assert rehearsed["rows"].keys() == units - commands
    assert all("|" in table for table in rehearsed["rows"].values())


def test_a_piece_that_mixes_devices_is_found(guard):
    assert "device" in findings("sitting.py", guard, "mix", "sample")["failed"]["sample: DiT-Ti/2"]
