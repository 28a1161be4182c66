import json
from pathlib import Path

import pytest

from benchmarks.arithmetic import filled
from benchmarks.machine import Ceilings
from benchmarks.report import Report, Row, fill_markdown, part_table
from benchmarks.timing import spread
from pipeline.runtime.errors import UserError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def report():
    one = spread([2e9, 1e9, 3e9])
    machine = {"device": "cpu", "processor": "P", "cores": 2, "threads": 2, "memory_gib": 4.0, "load_average": 0.1}
    machine |= {"python": "3.11", "versions": {"torch": "2.11"}}
    rows = [
        Row(
            what="a step", unit="images/s", ours=spread([4.0, 5.0, 6.0]), plain=spread([2.0, 2.5, 3.0]),
            ratio=spread([2.0, 2.0, 2.0]), limit=10.0, limit_name="matmul", wanted_ratio=1.5, wanted_share=0.6,
        ),
        Row(what="a start", unit="s", ours=spread([3.0]), wanted_at_most=10.0),
    ]  # fmt: skip
    ceilings = Ceilings(fp32=one, tf32=None, bf16=one, copy=one, upload=None)
    return Report(command="python -m benchmarks", machine=machine, ceilings=ceilings, rows={"train": rows})


def test_a_row_shows_both_rates_their_ratio_the_share_and_whether_its_aims_are_reached(report):
    table = part_table(report.rows["train"])
    for text in ("5 images/s", "2.5 images/s", "2.00 (2.00 … 2.00)", "50% of matmul", "≥ 1.5×, ≥ 60%, **missed**"):
        assert text in table
    assert "≤ 10 s, reached" in table
    assert report.missed() == ["train: a step"]


def test_the_limit_is_the_best_that_was_seen(report):
    assert report.ceilings.matmul("fp32") == 3e9
    assert report.ceilings.matmul("tf32") == 3e9  # where there is none, float32


def test_the_json_holds_every_figure_with_hardware_and_versions(report, tmp_path):
    report.write_json(tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["versions"] == {"torch": "2.11"}
    assert found["parts"]["train"][0]["share"] == 0.5
    assert found["parts"]["train"][0]["reached"] is False


def test_a_page_gets_the_tables_of_the_parts_that_were_measured_and_keeps_the_rest(report, tmp_path):
    page = tmp_path / "page.md"
    markers = [f"<!-- {word} cpu {part} -->" for part in ("machine", "ceilings", "train") for word in ("begin", "end")]
    page.write_text("# Title\n" + "\nold\n".join(markers) + "\nlast words\n")
    fill_markdown(page, report)
    text = page.read_text()
    assert "| a step" in text and "GFLOP/s" in text and "torch 2.11" in text
    assert text.startswith("# Title\n") and text.endswith("last words\n")
    fill_markdown(page, report)
    assert page.read_text() == text


def test_a_page_without_the_place_for_a_table_is_refused_and_left_alone(report, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(UserError, match="has no place for machine, ceilings, train"):
        fill_markdown(page, report)
    assert page.read_text() == "nothing here\n"


def test_a_page_that_is_not_there_is_named(report, tmp_path):
    with pytest.raises(UserError, match="absent.md cannot be read"):
        fill_markdown(tmp_path / "absent.md", report)


def test_the_page_of_benchmarks_has_a_place_for_every_part_on_both_kinds_of_device():
    from benchmarks.__main__ import PARTS

    text = (DOCS / "benchmarks.md").read_text()
    names = [part for part in PARTS if part != "profile"] + ["machine", "profile train"]
    for device in ("cpu", "cuda"):
        for name in names:
            assert f"<!-- begin {device} {name} -->" in text
            assert f"<!-- end {device} {name} -->" in text


@pytest.mark.slow
def test_the_page_about_scale_shows_what_is_counted():
    text = (DOCS / "scaling.md").read_text()
    assert filled(text) == text, "run python -m benchmarks.arithmetic --markdown docs/scaling.md"
