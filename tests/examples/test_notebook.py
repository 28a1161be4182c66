"""The notebook on digits runs from its first cell to its last, again without doing anything twice, and has no outputs in it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "digits.ipynb"
FEWER = {"STEPS = 900": "STEPS = 3", 'WORK = ROOT / "demo" / "notebook"': 'WORK = Path("work")'}
BEHIND = """
import hashlib
told = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((WORK / "latents").iterdir())}
print(json.dumps({"shapes": [list(x_0.shape), list(guesses.shape)], "latents": told, "logged": len(logged)}))
"""


def cells(kind):
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_notebook_is_kept_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_the_notebook_s_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


@pytest.mark.slow
def test_every_cell_runs_and_running_them_again_does_nothing_twice(tmp_path):
    script = "\n".join("".join(cell["source"]) for cell in cells("code"))
    for written, instead in FEWER.items():
        assert script.count(written) == 1
        script = script.replace(written, instead)
    script = script.replace("Path.cwd(), *Path.cwd().parents", f"Path({str(ROOT)!r}),")
    (tmp_path / "cells.py").write_text(script + BEHIND)
    told = []
    for _ in range(2):
        command = [sys.executable, "cells.py"]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    assert told[0] == told[1]
    assert told[0]["shapes"][0][0] == 10 and "manifest.json" in told[0]["latents"] and told[0]["logged"] == 1
    with Image.open(tmp_path / "work" / "samples.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
