"""The rules of the house, kept by a machine."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("extract", "train", "sample")
PACKAGES = ("pipeline", *STAGES)
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
WRITTEN = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_stages_import_only_themselves_and_pipeline_and_pipeline_imports_no_stage(package):
    forbidden = {name for name in (*STAGES, "tests", "benchmarks", "examples") if name != package}
    for path in (ROOT / package).rglob("*.py"):
        for module in imported(path):
            assert module.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {module}"


def test_nothing_imports_what_has_no_build_beside_torch():
    forbidden = {"torchvision", "torchaudio", "timm", "torch_fidelity", "pytorch_fid", "pickle"}
    for path in WRITTEN:
        for module in imported(path):
            assert module.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {module}"


def function_bodies(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body and body[-1].end_lineno - body[0].lineno >= 2:
                shape = "\n".join(ast.dump(statement) for statement in body)
                yield shape, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_no_function_body_is_written_twice():
    places = defaultdict(list)
    for path in WRITTEN:
        for shape, place in function_bodies(path):
            places[shape].append(place)
    assert [same for same in places.values() if len(same) > 1] == []


def test_torch_is_unpickled_in_one_module_only():
    for path in WRITTEN:
        if path != ROOT / "pipeline" / "checkpoint" / "tensor_files.py":
            text = path.read_text()
            assert "torch.load(" not in text and "torch.save(" not in text, path
            assert "trust_remote_code=True" not in text, path


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package):
    for path in (ROOT / package).rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"


def test_no_module_is_named_after_nothing():
    for path in WRITTEN:
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, path


def test_files_and_functions_keep_to_their_subject():
    for path in SOURCES:
        assert path.read_text().count("\n") <= 420, f"{path.relative_to(ROOT)} is long for one subject"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 80, f"{path.relative_to(ROOT)} {node.name} is long"
