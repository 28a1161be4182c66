import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quick_scaling_study_on_digits_runs_in_three_minutes(tmp_path):
    pytest.importorskip("sklearn")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0

    run(str(ROOT / "examples/digits/make_images.py"), "--out", "images")
    config = str(ROOT / "examples/digits/extract.yaml")
    run("-m", "extract", "--data", "images", "--out", "latents", "--config", config)
    began = time.monotonic()
    run("-m", "studies", "scaling", "--data", "latents", "--out", "study", "--quick")
    assert time.monotonic() - began < 180
    found = json.loads((tmp_path / "study/report/report.json").read_text())
    assert set(found["fits"]) == {"FD-pixels", "held-out loss"} and len(found["table"]) == 1 + 4
    assert "Over 4 networks FD-pixels goes as GFLOPs^" in found["sentences"][0]
