"""The rules of the house, kept by a machine."""

import ast
import functools
import re
import sys
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("extract", "train", "sample")
ABOVE = "view"  # stands on the stages, and nothing stands on it
PACKAGES = ("pipeline", *STAGES, ABOVE)
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BESIDE = ("studies", "benchmarks", "examples", "docs")
WRITTEN = [*SOURCES, *(path for folder in BESIDE for path in sorted((ROOT / folder).rglob("*.py")))]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text("utf-8"))


@functools.cache
def nodes_of(path):
    return list(ast.walk(parsed(path)))


def imported(path):
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_stages_import_only_themselves_and_pipeline_and_nothing_imports_the_page(package):
    above = {"tests", *BESIDE}
    forbidden = above if package == ABOVE else above | {*STAGES, ABOVE} - {package}
    for path in (ROOT / package).rglob("*.py"):
        for module in imported(path):
            assert module.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {module}"


def test_nothing_imports_what_has_no_build_beside_torch():
    forbidden = {"torchvision", "torchaudio", "timm", "torch_fidelity", "pytorch_fid", "pickle"}
    for path in WRITTEN:
        for module in imported(path):
            assert module.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {module}"


def function_bodies(path):
    for node in nodes_of(path):
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


def test_what_is_defined_in_a_module_is_used_somewhere():
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.py"), ROOT / "README.md"]
    words = Counter(word for path in [*WRITTEN, *pages] for word in re.findall(r"\w+", path.read_text("utf-8")))
    named = [
        (path, name)
        for path in WRITTEN
        for node in parsed(path).body
        for name in ([node.name] if hasattr(node, "name") else names_defined_by(node))
    ]
    assert len(named) > 1000
    assert [f"{path.relative_to(ROOT)}: {name}" for path, name in named if words[name] < 2] == []


def names_defined_by(node):
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_torch_is_unpickled_in_one_module_only():
    for path in WRITTEN:
        if path != ROOT / "pipeline" / "checkpoint" / "weight_files.py":
            text = path.read_text()
            assert "torch.load(" not in text and "torch.save(" not in text, path
            assert "trust_remote_code=True" not in text, path


READS_ITSELF = {
    "pipeline/runtime/gate.py": "the gate",
    "pipeline/runtime/arrays.py": "the gate of arrays",
    "pipeline/runtime/config_files.py": "the gate of YAML",
    "extract/sources/litter.py": "looks whether a small file was made here",
    "extract/sources/mistaken.py": "looks whether a small file is a list of labels",
    "studies/measure.py": "what it has just written",
    "train/summary.py": "a preset that is part of the program",
}


def test_what_a_file_holds_is_read_through_the_gate():
    reads = re.compile(r"\b(json\.loads?|np\.load|yaml\.(safe_)?load|pickle\.loads?)\(")
    found = {path.relative_to(ROOT).as_posix() for path in WRITTEN if reads.search(path.read_text())}
    outside = ("benchmarks/", "examples/", "docs/")  # read what they wrote
    assert {path for path in found if not path.startswith(outside)} == READS_ITSELF.keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package):
    for path in (ROOT / package).rglob("*.py"):
        assert ast.get_docstring(parsed(path)), f"{path.relative_to(ROOT)} has no docstring"


def test_no_module_is_named_after_nothing():
    for path in WRITTEN:
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, path


def test_files_and_functions_keep_to_their_subject():
    for path in SOURCES:
        assert path.read_text().count("\n") <= 420, f"{path.relative_to(ROOT)} is long for one subject"
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 80, f"{path.relative_to(ROOT)} {node.name} is long"


# ---- the graph of imports: what a file takes from the project when it is loaded, or later inside a function


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def taken_from(path):
    """The project's modules that a file names in imports, wherever they stand; those for the type checker are left out."""
    for_types = {id(inner) for node in nodes_of(path) if is_type_checking(node) for inner in ast.walk(node)}
    for node in nodes_of(path):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{name.name}" for name in node.names} & MODULES.keys()
            yield from inner or ({node.module} & MODULES.keys())


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.fixture(scope="module")
def graph():
    found = {name: set(taken_from(path)) - {name} for name, path in MODULES.items()}
    assert len(found) > 100 and sum(map(len, found.values())) > 400
    return found


def reached(graph, start):
    seen, todo = set(), [start]
    while todo:
        for module in graph[todo.pop()] - seen:
            seen.add(module)
            todo.append(module)
    return seen


def test_no_files_import_each_other_in_a_circle(graph):
    circles = {module for module in graph if module in reached(graph, module)}
    assert circles == set(), f"each of these is reached from itself: {sorted(circles)}"


def test_rooms_of_pipeline_do_not_import_each_other_in_a_circle(graph):
    def room(module):
        return ".".join(module.split(".")[:2])

    rooms = defaultdict(set)
    for module, others in graph.items():
        if module.startswith("pipeline."):
            rooms[room(module)] |= {room(other) for other in others} - {room(module), "pipeline"}
    circles = {name for name in rooms if name in reached(rooms, name)}
    assert circles == set(), f"each of these rooms is reached from itself: {sorted(circles)}"


def test_the_training_loop_pulls_in_few_files(graph):
    assert len(reached(graph, "train.loop")) <= 46


def test_folders_are_small_enough_to_be_read_at_a_glance():
    folders = {path.parent for path in SOURCES}
    assert len(folders) > 10
    for folder in folders:
        entries = [path for path in folder.iterdir() if path.name not in {"__pycache__", "__init__.py"}]
        assert len(entries) <= 21, f"{folder.relative_to(ROOT)} has {len(entries)} entries"


def test_few_files_are_too_short_to_be_read_alone():
    counted = [path for path in SOURCES if path.name not in {"__init__.py", "__main__.py"}]
    short = [path for path in counted if path.read_text().count("\n") < 60]
    assert len(short) <= 0.12 * len(counted), [str(path.relative_to(ROOT)) for path in short]


# ---- what is declared


INSTALLED_AS = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn"}
WITH_ANOTHER = {"tensorboard"}  # torch.utils.tensorboard is torch's module, and needs this package


def test_what_the_packages_import_is_what_pyproject_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=~ ;]", line)[0].lower() for line in project["dependencies"]}
    ours = {*PACKAGES, "dit_pipeline", *sys.stdlib_module_names}
    names = {module.split(".")[0] for path in SOURCES for module in imported(path)} - ours
    optional = {"wandb", "transformers", "pillow_heif", "pillow_jxl", "PIL", "gradio", "fastapi", "uvicorn"} - {"PIL"}
    used = {INSTALLED_AS.get(name, name).lower() for name in names - optional}
    assert len(used) > 10
    assert used - declared == set(), "imported and not declared"
    assert declared - used - WITH_ANOTHER == set(), "declared and not imported"


# ---- words


BRITISH = re.compile(
    r"(?:^|_)(?:\w*(?:optimis|normalis|discretis|initialis|serialis|quantis|randomis)\w*|centre\w*|colour\w*)"
)


def names_defined(path):
    for node in nodes_of(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_identifiers_are_spelled_as_torch_spells_them():
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in WRITTEN
        for name in names_defined(path)
        if BRITISH.search(name.lower())
    }
    assert found == set()


def test_docstrings_say_what_is_raised_not_that_nothing_comes_back():
    for path in WRITTEN:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert not (ast.get_docstring(node) or "").startswith("Nothing, if"), (
                    f"{path.relative_to(ROOT)} {node.name}"
                )


# ---- types


def test_what_the_project_has_a_type_for_is_not_any():
    ours = {
        "process",
        "store",
        "accelerator",
        "manifest",
        "config",
        "model",
        "network",
        "optimizer",
        "state",
        "trainer",
    }
    found = []
    for path in SOURCES:
        for node in nodes_of(path):
            named = isinstance(node, ast.arg) and node.arg in ours and node.annotation
            field = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in ours
            if (named or field) and ast.unparse(node.annotation) == "Any":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


# ---- what users reported


def test_files_are_utf_8_whatever_the_locale():
    of_the_kernel = {"pipeline/inspect/machine.py", "train/distributed.py"}
    found = []
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        for node in nodes_of(path):
            is_text = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"read_text", "write_text"}
            if is_text and name not in of_the_kernel and "encoding" not in {word.arg for word in node.keywords}:
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_every_row_of_the_field_reports_names_a_test_that_is_there():
    rows = re.findall(r"^\|(.+)\|([^|]+)\|$", (ROOT / "docs" / "field-reports.md").read_text(), flags=re.MULTILINE)
    rows = [(said, where) for said, where in rows if where.strip() not in {"test", "---"}]
    assert len(rows) > 40
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for said, where in rows:
        named = re.findall(r"`([\w/]+\.py)`", where)
        assert named or where.strip().startswith(("the same", "–")), said
        for name in named:
            assert (ROOT / name).is_file() if "/" in name else name in there, f"{name}: {said}"
