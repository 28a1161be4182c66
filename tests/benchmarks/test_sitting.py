"""A sitting on a card, rehearsed on a CPU: pieces that go on from one another, and rows that cost only themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import sitting
from benchmarks.__main__ import main
from benchmarks.machine import Ceilings, Setting
from benchmarks.timing import spread
from pipeline.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ONE = spread([1e9])
CEILINGS = Ceilings(fp32=ONE, tf32=None, bf16=ONE, copy=ONE, upload=None)


def setting(folder):
    return Setting(device=CPU, ceilings=CEILINGS, folder=folder, quick=True)


def pretended(tmp_path, monkeypatch, **pieces):
    """A sitting whose only part is a file with these pieces, each the body of a function."""
    (tmp_path / "benchmarks_of_test.py").write_text(
        "import os, time\n"
        "from benchmarks.report import Row\n"
        "from benchmarks.timing import spread\n"
        + "".join(f"def {name}():\n    {body}\n" for name, body in pieces.items())
        + f"def pieces(setting):\n    return {{{', '.join(f'{name!r}: {name}' for name in pieces)}}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "benchmarks_of_test", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setattr(sitting, "ORDER", (("of_test", 60),))
    monkeypatch.setattr(sitting, "module_of", lambda _part: "benchmarks_of_test")
    monkeypatch.setattr("benchmarks.machine.measure_ceilings", lambda *_, **__: CEILINGS)


class InThisProcess:
    """Stands for the unit's process where only the order of things matters: nothing has to be loaded anew."""

    exitcode = 0

    def __init__(self, *, target, args, **_):
        self.start = lambda: target(*args)

    def join(self, _seconds):
        pass

    def is_alive(self):
        return False


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(sitting.multiprocessing, "get_context", lambda _way: SimpleNamespace(Process=InThisProcess))


def sit(out, earlier=None):
    status = sitting.sit(out, earlier=earlier, device=CPU, quick=True, command="test")
    return status, json.loads(out.read_text())


FINE = "return [Row(what='fine', unit='s', ours=spread([1.0]))]"


def test_what_fails_costs_itself_alone_and_is_tried_once_more_at_the_end(tmp_path, monkeypatch, at_once):
    pretended(tmp_path, monkeypatch, raises="raise RuntimeError('no such kernel')", fine=FINE)
    status, found = sit(tmp_path / "a.json")
    assert status == 1
    assert [row["what"] for row in found["rows"]["of_test: fine"]] == ["fine"]
    assert found["failed"] == {"of_test: raises": {"tries": 2, "why": "RuntimeError: no such kernel"}}
    assert [unit["name"] for unit in found["pieces"][0]["units"]] == [
        "of_test: raises", "of_test: fine", "of_test: raises"
    ]  # fmt: skip


@pytest.mark.slow
def test_what_dies_costs_itself_alone(tmp_path, monkeypatch):
    pretended(tmp_path, monkeypatch, dies="os._exit(7)", fine=FINE)
    _, found = sit(tmp_path / "a.json")
    assert found["failed"] == {"of_test: dies": {"tries": 2, "why": "its process ended with status 7"}}
    assert list(found["rows"]) == ["of_test: fine"]


@pytest.mark.slow
def test_what_hangs_is_ended_and_the_next_one_goes_on(tmp_path, monkeypatch):
    pretended(tmp_path, monkeypatch, hangs="time.sleep(600)", fine=FINE)
    monkeypatch.setattr(sitting, "ORDER", (("of_test", 15),))
    _, found = sit(tmp_path / "a.json")
    assert found["failed"] == {"of_test: hangs": {"tries": 2, "why": "it took longer than 30 s"}}
    assert list(found["rows"]) == ["of_test: fine"]


def test_a_piece_ends_in_time_and_the_next_one_goes_on_with_what_it_lacks(tmp_path, monkeypatch, at_once):
    pretended(tmp_path, monkeypatch, one=FINE, two=FINE, three=FINE)
    monkeypatch.setattr(sitting, "PIECE_SECONDS", sitting.RESERVE_SECONDS + 60)  # one unit is all that it may begin
    monkeypatch.setattr(sitting, "ORDER", (("of_test", 100),))
    out = tmp_path / "a.json"
    status, found = sit(out)
    assert (status, list(found["rows"])) == (3, ["of_test: one"])
    status, found = sit(out, earlier=out)
    assert (status, list(found["rows"])) == (3, ["of_test: one", "of_test: two"])
    status, found = sit(out, earlier=out)
    assert (status, list(found["rows"])) == (0, ["of_test: one", "of_test: two", "of_test: three"])
    assert [[unit["name"] for unit in piece["units"]] for piece in found["pieces"]] == [
        ["of_test: one"], ["of_test: two"], ["of_test: three"]
    ]  # fmt: skip


def test_every_row_is_written_before_the_next_one_is_measured(tmp_path, monkeypatch, at_once):
    out = tmp_path / "a.json"
    rows = f"sorted(json.loads(Path({str(out)!r}).read_text())['rows'])"
    look = f"import json; from pathlib import Path; return [Row(what=str({rows}), unit='', ours=spread([1.0]))]"
    pretended(tmp_path, monkeypatch, one=FINE, two=look)
    _, found = sit(out)
    assert found["rows"]["of_test: two"][0]["what"] == "['of_test: one']"


def test_a_piece_of_another_machine_or_size_or_one_too_many_is_refused(tmp_path, monkeypatch, at_once):
    pretended(tmp_path, monkeypatch, one=FINE)
    out = tmp_path / "a.json"
    _, found = sit(out)
    with pytest.raises(UserError, match="is there already; go on with --continue"):
        sitting.sit(out, earlier=None, device=CPU, quick=True, command="")
    for change, message in (
        ({"machine": {**found["machine"], "processor": "another"}}, "was measured on another"),
        ({"quick": False}, "full sizes"),
        ({"version": 2}, "is no piece of a sitting"),
        ({"pieces": found["pieces"] * 24}, "holds 24 pieces already"),
    ):
        (tmp_path / "b.json").write_text(json.dumps({**found, **change}))
        with pytest.raises(UserError, match=message):
            sitting.sit(out, earlier=tmp_path / "b.json", device=CPU, quick=True, command="")


def test_the_order_begins_with_what_is_most_valuable_and_names_every_part_once(tmp_path):
    names = [unit.name for unit in sitting.units(setting(tmp_path))]
    assert len(set(names)) == len(names) > 15
    first = [name.partition(":")[0] for name in names]
    order = ["parity", "extract", "sample", "memory", "processes"]  # the step of DiT-XL/2, second there, is a GPU's
    assert [part for k, part in enumerate(first) if part not in first[:k]][: len(order)] == order
    assert [part.partition(":")[0] for part, _ in sitting.ORDER][:3] == ["parity", "train", "extract"]


def test_contradicting_flags_are_refused(capsys):
    for words in (["--continue", "x.json"], ["--sitting", "--parts", "train"], ["--sitting", "--markdown", "x.md"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
    assert "--continue goes on with a --sitting" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sitting_is_rehearsed_whole_on_a_cpu(tmp_path):
    """Every unit runs at its small size; pieces follow until all is done."""
    words = [sys.executable, "-m", "benchmarks", "--sitting", "--quick", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "a.json"
    for piece in range(6):
        go_on = ["--continue", str(out)] if piece else ["--json", str(out)]
        done = subprocess.run([*words, *go_on], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 3:
            break
    found = json.loads(out.read_text())
    assert found["failed"] == {}, done.stderr
    assert set(found["rows"]) == {unit.name for unit in sitting.units(setting(tmp_path))}
    assert all(piece["seconds"] < 540 for piece in found["pieces"])
