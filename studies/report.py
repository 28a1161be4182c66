"""What a study found, as OUT/report/: one HTML page with its pictures in it, the JSON behind it, and the pictures."""

import base64
import html
import importlib.metadata
import io
import itertools
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.runtime.files import make_folder, write_bytes, write_json
from pipeline.runtime.publish import making
from studies.cells import Study, edges
from studies.measure import LOSS, Place, Result
from studies.pictures import PICTURES, Cells, compute_points, fit_of, gflops_of, measures, value_of
from studies.statistics import Interval, compared, ratio_of_means, samples_to, spread
from studies.work import Findings

FORMAT, VERSION = "dit-study", 1
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border-bottom:1px solid #ccc;padding:.2em .7em;text-align:right}td:first-child,th:first-child"
    "{text-align:left}img{max-width:100%}pre{background:#f4f4f4;padding:.7em;white-space:pre-wrap}"
)


def write_report(study: Study, place: Place, findings: Findings, command: Sequence[str]) -> dict[str, Any]:
    """Publish OUT/report whole, in place of an earlier one; what its JSON says."""
    cells = findings.of_cells(study)
    found = summary(study, cells, findings, command)
    out = place.out.absolute() / "report"
    with making(out, overwrite=True, wait=True) as stage:
        folder = stage.place(out)
        make_folder(folder)
        pictures: dict[str, bytes] = {}
        for name in study.draw if cells else ():
            drawn = io.BytesIO()
            PICTURES[name].draw(study, cells, place).savefig(drawn, format="png")
            pictures[name] = drawn.getvalue()
            write_bytes(folder / f"{name}.png", pictures[name])
        write_json(folder / "report.json", found)
        write_bytes(folder / "table.md", markdown(found["table"]).encode())
        write_bytes(folder / "report.html", page(found, pictures).encode())
    return found


def summary(study: Study, cells: Cells, findings: Findings, command: Sequence[str]) -> dict[str, Any]:
    """All that is said, in JSON's types: a table, sentences, the fit, every run."""
    laws = {name: fit_of(cells, name) for name in measures(study, cells)} if cells else {}
    return {
        "format": FORMAT,
        "version": VERSION,
        "question": study.question,
        "command": shlex.join(["python", "-m", "studies", *command]),
        "study": asdict(study),
        "machine": machine(),
        "table": [_heading(study, cells), *(_row(study, cells, cell) for cell in cells)],
        "sentences": sentences(study, cells, findings),
        "fits": {name: asdict(law) for name, law in laws.items() if law is not None},
        "failed": findings.failed,
        "runs": {name: asdict(result) for name, result in findings.results.items()},
    }


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "accelerate", "diffusers")}
    return {
        "device": gpu or f"{os.cpu_count()} cores of {platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        **versions,
    }


def threshold_of(study: Study, cells: Cells) -> float | None:
    """What is to be reached: the study's own, or the worst that a seed of the baseline ends with."""
    if study.threshold is not None or study.baseline is None or study.baseline not in cells:
        return study.threshold
    return max(result.final(study.metric) for result in cells[study.baseline])


def _reached(results: Sequence[Result], study: Study, threshold: float) -> list[float | None]:
    return [samples_to(result.curve(study.metric), threshold) for result in results]


def _distances(study: Study, cells: Cells) -> list[str]:
    """The columns of distances: the study's metric, and others that every run has."""
    return [name for name in measures(study, cells) if name != LOSS]


def _heading(study: Study, cells: Cells) -> list[str]:
    heading = ["cell", "seeds", "parameters", "GFLOPs", *_distances(study, cells), LOSS]
    return heading + ["samples to the threshold", "fewer samples than the baseline"] * (study.baseline is not None)


def _told(band: Interval, seeds: int) -> str:
    return f"{band.value:.2f}" + (f" ({band.low:.2f} … {band.high:.2f})" if seeds > 1 else "")


def _row(study: Study, cells: Cells, cell: str) -> list[str]:
    results = cells[cell]
    bands = [spread([result.final(name) for result in results]) for name in _distances(study, cells)]
    has_loss = LOSS in measures(study, {cell: results})
    row = [
        cell,
        f"{len(results)}",
        f"{results[0].parameters:,}",
        f"{gflops_of(results):.4f}",
        *(_told(band, len(results)) for band in bands),
        f"{value_of(results, LOSS):.4f}" if has_loss else "",
    ]
    if study.baseline is None:
        return row
    threshold = threshold_of(study, cells)
    ours = [] if threshold is None else _reached(results, study, threshold)
    reached = [samples for samples in ours if samples is not None]
    if not reached or len(reached) < len(ours):
        return [*row, f"{len(reached)} of {len(ours)} seeds reach it", ""]
    assert threshold is not None
    base = [samples for samples in _reached(cells.get(study.baseline, ()), study, threshold) if samples is not None]
    factor = ratio_of_means(base, reached) if base else None
    told = "" if factor is None else f"{factor.value:.2f}× ({factor.low:.2f} … {factor.high:.2f})"
    return [*row, f"{spread(reached).value:,.0f}", told]


def sentences(study: Study, cells: Cells, findings: Findings) -> list[str]:
    """What can be said in plain words."""
    said = []
    values = {cell: [result.final(study.metric) for result in results] for cell, results in cells.items()}
    for name in measures(study, cells) if "flops" in study.draw else ():
        law = fit_of(cells, name)
        if law is not None:
            fit = f"goes as GFLOPs^{law.exponent:.2f} with r = {law.r:.3f} on log axes"
            said.append(f"Over {len(cells)} networks {name} {fit}; the paper's figure 8, of FID, has r = −0.93.")
    if "compute" in study.draw:
        said += _best_for_budgets(study, cells)
    if study.baseline in cells:
        assert study.baseline is not None
        threshold = threshold_of(study, cells)
        said.append(f"The threshold is {study.metric} = {threshold:.3g}.")
        others = [cell for cell in cells if cell != study.baseline]
        said += [
            f"{study.metric}: {compared(cell, values[cell], study.baseline, values[study.baseline])}."
            for cell in others
        ]
    order = sorted(cells, key=lambda cell: value_of(cells[cell], study.metric))
    expected = [cell for cell in study.expected if cell in cells]
    if expected:
        is_found = expected == [cell for cell in order if cell in expected]
        said.append(
            f"The expected order, {', '.join(expected)}, is {'found' if is_found else 'not found'}; step by step:"
        )
        pairs = itertools.pairwise(expected)
        said += [f"{compared(one, values[one], other, values[other])}." for one, other in pairs]
    if order:
        said.append(f"From best to worst by {study.metric}: {', '.join(order)}.")
    said += edges(study, {cell: results[0].flags for cell, results in cells.items()})
    missing = [cell for cell in study.cells if len(cells.get(cell, ())) < study.seeds]
    if missing:
        said.append(f"Not finished, so missing here or with fewer seeds: {', '.join(missing)}.")
    return said + [f"{name} failed: {why}" for name, why in findings.failed.items()]


def _best_for_budgets(study: Study, cells: Cells) -> list[str]:
    """Figure 9's question: the best network for a budget of compute, where at least two could have been trained."""
    curves = compute_points(cells, study.metric)
    ends = sorted(points[-1][0] for points in curves.values())
    said = []
    for budget in dict.fromkeys(ends[1::3] if len(ends) > 3 else ends[1:]):
        last = {cell: [value for spent, value in points if spent <= budget * 1.001] for cell, points in curves.items()}
        able = {cell: values[-1] for cell, values in last.items() if values}
        best = min(able, key=lambda cell: able[cell])
        said.append(
            f"With {budget:.3g} GFLOPs of training compute the best of {len(able)} networks that have been measured "
            f"by then is {best} ({study.metric} {able[best]:.1f})."
        )
    return said


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table's rows, the heading first, as Markdown."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (table[0], rule, *table[1:]))


def page(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The report as one HTML page that needs no other file."""
    heading, *rows = ([html.escape(cell) for cell in row] for row in found["table"])
    lines = [f"<tr><th>{'</th><th>'.join(heading)}</th></tr>"]
    lines += [f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows]
    drawn = [
        f"<h2>{html.escape(PICTURES[name].title)}</h2>\n"
        f'<img alt="{html.escape(PICTURES[name].title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    ]
    said = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in found["sentences"])
    question = html.escape(found["question"])
    made = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            f"<title>{question}</title>\n<style>{_STYLE}</style>\n<h1>{question}</h1>",
            f"<ul>\n{said}</ul>\n<table>\n" + "\n".join(lines) + "\n</table>",
            *drawn,
            f"<h2>How it was made</h2>\n<pre>{html.escape(found['command'])}</pre>\n<p>{html.escape(made)}</p>",
            "</html>\n",
        ]
    )


def report_path(place: Place) -> Path:
    """Where the page lies."""
    return place.out / "report" / "report.html"
