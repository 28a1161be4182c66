"""What was measured, as JSON, as a table for people, and as the tables of docs/benchmarks.md.

Every figure is one `Row`: our rate and the plain version's, their ratio, and the limit that the hardware (or the bare
work without what surrounds it) sets. Ratios are above 1 where ours is faster.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import Ceilings
from benchmarks.timing import Spread
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_bytes, write_json

HEADING = ("", "ours", "plain", "ours / plain", "share of the limit", "memory, ours", "memory, plain", "aim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure."""

    what: str
    """What is measured, with its sizes."""
    unit: str
    """Of both rates; "s" and "GB" are costs, everything else is a rate."""
    ours: Spread
    plain: Spread | None = None
    ratio: Spread | None = None
    """How many times as fast ours is, round by round."""
    limit: float | None = None
    """The most that `ours` could be, in the same unit."""
    limit_name: str = ""
    """What sets the limit."""
    wanted_ratio: float | None = None
    wanted_share: float | None = None
    wanted_at_most: float | None = None
    """For costs."""
    wanted_memory: float | None = None
    """The most that ours may take, as a share of the plain version's memory."""
    ours_bytes: int | None = None
    plain_bytes: int | None = None
    note: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further figures, for the JSON alone."""

    @property
    def share(self) -> float | None:
        """Our part of the limit."""
        return None if self.limit is None else self.ours.median / self.limit

    @property
    def reached(self) -> bool | None:
        """Whether every aim is reached; None where there is none."""
        checks = []
        if self.wanted_ratio is not None and self.ratio is not None:
            checks.append(self.ratio.median >= self.wanted_ratio)
        if self.wanted_share is not None and self.share is not None:
            checks.append(self.share >= self.wanted_share)
        if self.wanted_at_most is not None:
            checks.append(self.ours.median <= self.wanted_at_most)
        if self.wanted_memory is not None and self.ours_bytes is not None and self.plain_bytes is not None:
            checks.append(self.ours_bytes <= self.wanted_memory * self.plain_bytes)
        return all(checks) if checks else None

    def cells(self) -> tuple[str, ...]:
        """The row as text, one cell per column of `HEADING`."""
        ratio = (
            ""
            if self.ratio is None
            else f"{self.ratio.median:.2f} ({self.ratio.least:.2f} … {self.ratio.greatest:.2f})"
        )
        limit = "" if self.share is None else f"{self.share:.0%} of {self.limit_name}"
        return (
            self.what + (f" ({self.note})" if self.note else ""),
            f"{figure(self.ours.median)} {self.unit}",
            "" if self.plain is None else f"{figure(self.plain.median)} {self.unit}",
            ratio,
            limit,
            _memory(self.ours_bytes),
            _memory(self.plain_bytes),
            self._aim(),
        )

    def _aim(self) -> str:
        aims = [
            text
            for value, text in (
                (self.wanted_ratio, f"≥ {self.wanted_ratio or 0:g}×"),
                (self.wanted_share, f"≥ {self.wanted_share or 0:.0%}"),
                (self.wanted_at_most, f"≤ {self.wanted_at_most or 0:g} {self.unit}".rstrip()),
                (self.wanted_memory, f"≤ {self.wanted_memory or 0:.0%} of the memory"),
            )
            if value is not None
        ]
        return ", ".join(aims) + {True: ", reached", False: ", **missed**", None: ""}[self.reached] if aims else ""


Pieces = Mapping[str, Callable[[], list[Row]]]
"""What a part measures, by name and in order; each gives its rows alone, so that one that fails costs only itself."""


@dataclass(kw_only=True, slots=True)
class Report:
    """All that one run of the benchmarks found."""

    command: str
    machine: dict[str, Any]
    ceilings: Ceilings
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """By part."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each part took."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Parts that were not measured, and why."""
    profiles: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Where the time of a training step goes: the operations that take most of it."""

    @property
    def device(self) -> str:
        return str(self.machine["device"])

    def to_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        rows = {
            part: [{**dataclasses.asdict(row), "share": row.share, "reached": row.reached} for row in found]
            for part, found in self.rows.items()
        }
        return {
            "command": self.command,
            "machine": self.machine,
            "ceilings": dataclasses.asdict(self.ceilings),
            "parts": rows,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "profiles": self.profiles,
        }

    def write_json(self, path: Path) -> None:
        write_json(path, json.loads(json.dumps(self.to_json(), default=str)))

    def missed(self) -> list[str]:
        """What does not reach its aim."""
        return [f"{part}: {row.what}" for part, found in self.rows.items() for row in found if row.reached is False]


def figure(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _memory(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def ceilings_cells(ceilings: Ceilings) -> list[tuple[str, ...]]:
    """The ceilings as a table, its heading first."""
    named = (
        ("float32 matrix product", "GFLOP/s", ceilings.fp32, 1e-9),
        ("TF32 matrix product", "GFLOP/s", ceilings.tf32, 1e-9),
        ("bfloat16 matrix product", "GFLOP/s", ceilings.bf16, 1e-9),
        ("copy, bytes read and written", "GB/s", ceilings.copy, 1e-9),
        ("upload from pinned memory", "GB/s", ceilings.upload, 1e-9),
    )
    rows: list[tuple[str, ...]] = [("ceiling", "median", "least … greatest")]
    for name, unit, found, factor in named:
        if found is not None:
            value = found.scaled(factor)
            rows.append((name, f"{figure(value.median)} {unit}", f"{figure(value.least)} … {figure(value.greatest)}"))
    return rows


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells, the heading first, as a Markdown table that is also aligned for people; empty columns go."""
    kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    rows = [tuple(row[column] for column in kept) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(kept))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def part_table(rows: Sequence[Row]) -> str:
    """One part's table."""
    return table([HEADING, *(row.cells() for row in rows)])


def profile_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The operations of a profile, those that take most time first."""
    cells = [(str(e["name"]), f"{e['share']:.1%}", str(e["calls"])) for e in entries]
    return table([("operation", "share of the time", "calls per step"), *cells])


def machine_lines(report: Report) -> str:
    """Hardware, versions and command in a few lines of Markdown."""
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    what = machine.get("gpu") or f"{machine['cores']} cores of {machine['processor']}, {machine['threads']} threads"
    memory = machine.get("gpu_memory_gib") or machine["memory_gib"]
    return (
        f"{what}, {memory} GiB; Python {machine['python']}, {versions}; load average {machine['load_average']} at the "
        f"start; measured with `{report.command}` in {sum(report.seconds.values()):.0f} s."
    )


def fill_markdown(path: Path, report: Report) -> None:
    """Put what was measured between a page's markers, `<!-- begin cpu train -->` … `<!-- end cpu train -->`.

    Parts that were not measured keep what stands there.

    Raises:
        UserError: the page lacks the markers of something that was measured.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give --markdown an existing page") from error
    blocks = {"machine": machine_lines(report), "ceilings": table(ceilings_cells(report.ceilings))}
    blocks |= {part: part_table(rows) for part, rows in report.rows.items() if rows}
    blocks |= {f"profile {name}": profile_table(entries) for name, entries in report.profiles.items()}
    missing = []
    for name, block in blocks.items():
        begin, end = (f"<!-- {word} {report.device} {name} -->" for word in ("begin", "end"))
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            missing.append(name)
            continue
        text = f"{before}{begin}\n{block}\n{end}{after}"
    if missing:
        raise UserError(
            f"{path} has no place for {', '.join(missing)}: it needs lines <!-- begin {report.device} {missing[0]} --> "
            f"and <!-- end {report.device} {missing[0]} -->"
        )
    write_bytes(path, text.encode())
