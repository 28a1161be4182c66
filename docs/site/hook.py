"""What the site has beside docs/: pages of the top level, a reference page per command, each file that a page links to.

mkdocs calls `on_files`. Nothing is written into docs/: such pages are there while the site is built.
"""

import dataclasses
import importlib
import inspect
import json
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest import mock

import tyro
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from pipeline.runtime.described import described, type_and_extras, without_none

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COMMANDS = {
    "dit-extract": "extract",
    "dit-train": "train",
    "dit-sample": "sample",
    "dit-evaluate": "sample.evaluate",
    "dit-tune": "sample.tune",
    "dit-inspect": "pipeline.inspect",
    "dit-convert": "pipeline.convert",
    "dit-view": "view",
}
TOP_LEVEL = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/cluster/README.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")
ACTS = re.compile(r"([\\`*_{}\[\]<>|~])")  # what Markdown and tables act on


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {f"reference/{command}.md": command_page(command, module) for command, module in COMMANDS.items()}
    todo = [ROOT / "README.md", *(ROOT / name for name in TOP_LEVEL)]
    for file in files.documentation_pages():
        todo.append(Path(file.abs_src_path or ""))
        files.remove(file)
    while todo:
        file = todo.pop()
        if str(_place(file)) not in pages:
            pages[str(_place(file))], linked = _page(file)
            todo += linked
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def _page(file: Path) -> tuple[str, list[Path]]:
    """(a file as Markdown, further files that it links to): a notebook cell by cell, other files as code."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        text = "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)
    elif file.suffix != ".md":
        language = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}.get(file.suffix, "text")
        return f"# {file.relative_to(ROOT)}\n\n````{language}\n{text}\n````\n", []
    linked: list[Path] = []

    def to_its_place(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(file.parent / found[1]))
        if not target.is_file() or not target.is_relative_to(ROOT):
            return found[0]
        if not target.is_relative_to(DOCS):  # what lies there is on the site anyway
            linked.append(target)
        return os.path.relpath(_place(target), _place(file).parent)

    return LINK.sub(to_its_place, text), linked


def _place(file: Path) -> Path:
    """Where a file of the project stands on the site, as mkdocs names sources."""
    name = file.relative_to(ROOT)
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS)
    if str(name) == "README.md":
        return Path("index.md")
    return name if str(name) in TOP_LEVEL else Path("source", f"{name}.md")


# ---- the reference of a command, from its option dataclass


def command_page(command: str, module: str) -> str:
    """A command's flags as Markdown: one table for each group of its options, and its presets."""
    main = importlib.import_module(f"{module}.__main__")
    with mock.patch.object(main, "run_command") as told:
        main.main()
    options, settings = told.call_args.args[0], told.call_args.kwargs
    lines = [f"# {command}", "", _escaped(settings["description"]), ""]
    lines += [
        "Each flag is a key of `--config FILE.yaml`, too, without its dashes; the command line overrides the file."
    ]
    for title, group in _groups(options):
        lines += ["", f"## {title}", "", _escaped(inspect.cleandoc(group.__doc__ or "")), ""] if title else [""]
        lines += ["| flag | type | default | what |", "|---|---|---|---|", *_rows(group)]
    presets = settings.get("presets")
    for file in sorted(presets.glob("*.yaml")) if presets else ():
        lines += ["", f"## --config {file.stem}", "", "```yaml", file.read_text(encoding="utf-8").rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _groups(options: type) -> Iterator[tuple[str, type]]:
    """(title, dataclass as the help shows it) of the options that stand in no group, then of every group."""
    shown = described(options)
    hints = typing.get_type_hints(shown, include_extras=True)
    inner = {name: type_and_extras(hint)[0] for name, hint in hints.items()}
    groups = {name: kind for name, kind in inner.items() if dataclasses.is_dataclass(kind)}
    if len(groups) < len(inner):
        yield "", shown
    for name, kind in groups.items():
        yield name.replace("_", " ").capitalize(), typing.cast("type", kind)


def _rows(group: type) -> Iterator[str]:
    hints = typing.get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        kind, extras = type_and_extras(hints[field.name])
        if dataclasses.is_dataclass(kind):
            continue
        about = [extra for extra in extras if hasattr(extra, "help_behavior_hint")]
        text = next(each.help for each in reversed(about) if each.help)
        flag = "--" + field.name.rstrip("_").replace("_", "-")
        if kind is bool:
            flag, named = f"`{flag}`, `--no-{flag[2:]}`", "switch"
        else:
            flag = "the word without a flag" if tyro.conf.Positional in extras else f"`{flag}`"
            named = next((each.metavar for each in about if each.metavar), None) or _type_name(kind)
        yield f"| {flag} | {_escaped(named)} | {_default(field.default, text)} | {_escaped(text)} |"


def _type_name(kind: Any) -> str:
    """What the help leaves to tyro: several values, or a number or a word."""
    kind = without_none(kind)[0]
    inner = [type_and_extras(part)[0] for part in get_args(kind)]
    if get_origin(kind) is tuple:
        return " ".join("…" if part is ... else _type_name(part) for part in inner)
    if get_origin(kind) is Literal:
        return "|".join(map(str, inner))
    return "|".join(map(_type_name, inner)) or {str: "TEXT", int: "INT", float: "FLOAT"}[kind]


def _default(value: Any, text: str) -> str:
    """The default, unless the text beside it says it."""
    if value is dataclasses.MISSING:
        return "**required**"
    if value in {None, ""} or value == ():
        return "" if "efault" in text else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def _escaped(text: str) -> str:
    """Words of the help, which are no Markdown."""
    return ACTS.sub(lambda found: f"&#{ord(found[0])};", text)
