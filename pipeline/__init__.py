"""What the stages share; it imports none of them."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def loaded_late(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` that imports a public name's file when the name is first asked for.

    So options can be parsed, and `--help` printed, without loading torch.

    Args:
        places: {public name: file of the package that defines it}.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{places[name]}"), name)

    return get
