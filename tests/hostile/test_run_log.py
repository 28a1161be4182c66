"""A stranger's metrics.jsonl: drawn, shown on the page and gone on with; the lines that are none are passed over."""

import json
import os

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.gate import read_log
from train.plot.__main__ import main as plot
from train.run_folder import MetricsFile
from view.given import find_given
from view.options import ViewOptions
from view.runs import curves, describe

SOUND = [json.dumps({"step": step, "loss": 1 / step}).encode() for step in (1, 2, 3)]
DAMAGED = {
    "a list": b"[1, 2]",
    "no JSON": b"{",
    "text": b'"\\u001b[2J"',
    "NaN for a step": b'{"step": NaN, "loss": 1}',
    "a step of 400 digits": b'{"step": 1' + b"0" * 400 + b', "loss": 1}',
    "a number of 5,000 digits": b'{"step": 2, "loss": 1' + b"0" * 5000 + b"}",
    "100,000 levels": b'{"step": 2, "loss": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "10 MB": b'{"step": 2, "x": "' + b"a" * 10**7 + b'"}',
    "10 MB of levels": b"[" * 10**7,
    "no UTF-8": b'{"step": 2, "\xff": 1}',
    "a step below 0": b'{"step": -1, "loss": 1}',
    "true for a step": b'{"step": true, "loss": 1}',
}
ODD = {
    "NaN": b'{"step": 3, "loss": NaN, "lr": Infinity, "mse": -Infinity, "vb": true}',
    "400 digits": b'{"step": 3, "loss": 1' + b"0" * 400 + b"}",
    "the ends of numbers": b'{"step": 9007199254740992, "loss": 5e-324, "mse": -9e299, "vb": 0, "lr": 9e299}\n'
    b'{"step": 0, "loss": 9e299, "mse": 9e299, "vb": 5e-324, "lr": -9e299, "grad_norm": 1e-310}',
    "names": json.dumps({"step": 3, "\x1b[2J": 1, "\0": 2, "a" * 10**5: 3, "<b>": 4, "loss": [1]}).encode(),
}
pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("line", [*DAMAGED, *ODD])
def test_a_strangers_log_is_drawn_shown_and_gone_on_with(line, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*SOUND, (DAMAGED | ODD)[line], SOUND[0], b""]))
    if line in DAMAGED:
        assert [said for said, _ in read_log(path)] == [*SOUND, SOUND[0]]
    assert plot([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 0
    given = find_given(ViewOptions(checkpoint=(str(tmp_path),)))
    json.dumps(describe(given.network(0)), allow_nan=False).encode()
    assert curves(given, [0], smoothing=0.9).startswith(b"\x89PNG")
    log = MetricsFile(tmp_path, after_step=2)
    assert path.read_bytes().splitlines()[:2] == SOUND[:2] and SOUND[2] not in path.read_bytes()
    assert log.smallest("loss") is not None
    assert capsys.readouterr().err.isascii()


def test_a_pipe_for_a_log_is_named_and_never_opened(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl is a named pipe"):
        MetricsFile(tmp_path, after_step=0)
    assert plot([str(tmp_path)]) == 2
