"""Twenty steps of DPM-Solver++ are nearly as good as the paper's 250, on the demo's digits."""

from pathlib import Path

import pytest

from pipeline.checkpoint.folder import newest_checkpoint
from sample.__main__ import main

DEMO = Path(__file__).parent.parent.parent / "demo"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(newest_checkpoint(DEMO / "run") is None, reason="needs the demo's run; make demo makes it")
def test_dpm_solver_at_20_steps_is_within_two_points_of_ddpm_at_250(tmp_path):
    from examples.digits.measure import compare, read_generated, read_real

    names = sorted(folder.name for folder in (DEMO / "images").iterdir() if folder.is_dir())
    real = read_real(DEMO / "images", names)
    accuracy = {}
    for sampler, steps in (("dpm++", 20), ("ddpm", 250)):
        out = tmp_path / f"{steps}.npz"
        asked = f"--sampler {sampler} --steps {steps} --guidance 1.5 --samples-per-class 100 --seed 1".split()
        assert main(["--checkpoint", str(DEMO / "run"), "--out", str(out), *asked]) == 0
        accuracy[sampler] = compare(real, read_generated(out), names).accuracy
    assert accuracy["dpm++"] >= accuracy["ddpm"] - 0.02, accuracy
