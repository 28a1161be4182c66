"""Facts and numbers in aligned columns of plain text."""

from collections.abc import Mapping, Sequence

from pipeline.classes import brief


def facts(values: Mapping[str, object]) -> list[str]:
    """One line per fact, names to the left, values aligned; facts without a value are left out."""
    width = max(map(len, values), default=0)
    return [f"{name:<{width}}  {value}" for name, value in values.items() if value not in {None, ""}]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """A header and rows in columns as wide as their widest cell; the first `left` columns flush left, others right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def shortened(names: Sequence[str], most: int = 10) -> str:
    """How many names there are and the first of them."""
    first = "; ".join(map(brief, names[:most]))
    return f"{len(names)}: {first}{'; …' if len(names) > most else ''}" if names else "none"
