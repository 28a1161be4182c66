"""A user's own train.py or pipeline.py is named, instead of a traceback about what it lacks."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dit_pipeline

ROOT = Path(__file__).parent.parent


def started(folder, *words):
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def as_installed(command):
    """What pip writes for a console script."""
    return "-c", f"import sys; from dit_pipeline import {command}; sys.exit({command}())", "--help"


@pytest.mark.parametrize(
    ("name", "command"),
    [("train.py", "train"), ("pipeline.py", "sample"), ("sample/__init__.py", "evaluate"), ("pipeline.py", "convert")],
)
def test_a_module_of_the_users_that_stands_in_for_ours_is_named(name, command, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("print('mine')\n")
    status, said = started(tmp_path, *as_installed(command))
    assert status == 2
    assert str(tmp_path / name) in said
    assert "rename it" in said
    assert "Traceback" not in said


def test_python_m_names_it_too_where_python_finds_the_stage(tmp_path):
    (tmp_path / "pipeline.py").write_text("")
    status, said = started(tmp_path, "-m", "train", "--help")
    assert (status, said.count("\n")) == (2, 1)
    assert str(tmp_path / "pipeline.py") in said


def test_what_stands_in_for_nothing_that_a_command_uses_is_left_alone(tmp_path):
    (tmp_path / "extract.py").write_text("")
    (tmp_path / "train").mkdir()  # a folder of images, say
    status, said = started(tmp_path, *as_installed("train"))
    assert (status, "--latents" in said) == (0, True)


def test_every_installed_command_begins_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert len(scripts) >= 6
    for name, place in scripts.items():
        module, _, function = place.partition(":")
        assert (module, callable(getattr(dit_pipeline, function))) == ("dit_pipeline", True)
        assert function == name.removeprefix("dit-")
