import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A process of its own from a bare checkout: what checks shapes in tests would slow the loader down."""
    folder = tmp_path_factory.mktemp("measured")
    words = [sys.executable, "-m", "benchmarks", "--parts", "ceilings,counts,loader", "--quick", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--json", "found.json"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return json.loads((folder / "found.json").read_text()), done.stdout + done.stderr


@pytest.mark.slow
def test_the_parts_that_are_chosen_are_measured_printed_and_kept_as_json(measured):
    found, shown = measured
    assert list(found["parts"]) == ["counts", "loader"]
    assert found["skipped"] == {}
    assert found["ceilings"]["fp32"]["median"] > 0
    assert "host reads in a training step that logs nothing" in shown


@pytest.mark.slow
def test_no_count_is_above_its_bound(measured):
    found, _ = measured
    assert [row["what"] for row in found["parts"]["counts"] if row["reached"] is False] == []


@pytest.mark.slow
def test_a_gather_by_batch_is_eight_times_as_fast_as_one_file_per_sample(measured):
    found, _ = measured
    warm = found["parts"]["loader"][0]
    assert warm["what"].startswith("safetensors shards") and "warm" in warm["what"]
    assert warm["ratio"]["median"] >= 8


def test_an_unknown_part_is_refused_with_the_parts_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--parts", "tarin"])
    assert ended.value.code == 2
    assert "--parts tarin is unknown; choose from ceilings" in capsys.readouterr().err
