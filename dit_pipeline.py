"""Where the installed commands begin, under a name that nobody else has.

The packages are called pipeline, extract, train, sample and view, and so may be a file of the user's: with PYTHONPATH=.
or `python -m` in its folder, Python takes that one. It is named here before anything of ours is missed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

_MARKS = {
    "pipeline": "runtime/console.py",
    "extract": "options.py",
    "train": "options.py",
    "sample": "options.py",
    "view": "options.py",
}


def refuse_namesake(package: str) -> None:
    """End with status 2 and a sentence if another module stands in for a package of this project."""
    spec = importlib.util.find_spec(package)
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    if any((place / _MARKS[package]).is_file() for place in places):
        return
    found = spec.origin if spec is not None and spec.origin else (str(places[0]) if places else "nothing at all")
    sys.stderr.write(
        f"dit-pipeline: error: {found} stands in for this project's package {package}; rename it, or run the dit- "
        f"command from another folder, without PYTHONPATH=. and without python -m\n"
    )
    raise SystemExit(2)


def _command(module: str) -> Callable[[], int]:
    def run() -> int:
        refuse_namesake("pipeline")
        refuse_namesake(module.partition(".")[0])
        status = importlib.import_module(f"{module}.__main__").main()
        return int(status)

    return run


extract = _command("extract")
train = _command("train")
sample = _command("sample")
evaluate = _command("sample.evaluate")
tune = _command("sample.tune")
inspect = _command("pipeline.inspect")
convert = _command("pipeline.convert")
view = _command("view")
