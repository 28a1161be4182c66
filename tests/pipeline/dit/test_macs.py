import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.dit import DiT, DiTConfig, count_macs, count_parameters
from pipeline.dit.macs import models_markdown, models_table, modern_markdown, modern_table

# The release's networks at 4×32×32: trainable parameters, and 10⁹ multiply-adds as torch's own counter gives them.
RELEASE = {
    "DiT-S/8": (33_142_016, 0.357974),
    "DiT-S/4": (32_920_448, 1.412579),
    "DiT-S/2": (32_865_056, 6.055674),
    "DiT-B/8": (130_869_248, 1.417544),
    "DiT-B/4": (130_426_496, 5.565186),
    "DiT-B/2": (130_315_808, 23.005102),
    "DiT-L/8": (458_578_432, 5.011407),
    "DiT-L/4": (457_988_224, 19.695666),
    "DiT-L/2": (457_840_672, 80.697623),
    "DiT-XL/8": (675_664_640, 7.392412),
    "DiT-XL/4": (675_000_704, 29.043671),
    "DiT-XL/2": (674_834_720, 118.621422),
}


@pytest.fixture(scope="module")
def table():
    return {(row.model, row.conditioning, row.input): row for row in models_table()}


@pytest.mark.parametrize("name", RELEASE)
def test_adaln_zero_counts_are_the_releases(table, name):
    row = table[name, "adaln-zero", "4×32×32"]
    parameters, gflops = RELEASE[name]
    assert row.parameters == parameters
    assert abs(row.gflops - gflops) <= 1e-6  # L/4 counts 19,695,665,152, which the list above rounds up


def test_xl_2_at_512_pixels_counts_as_the_release(table):
    row = table["DiT-XL/2", "adaln-zero", "4×64×64"]
    assert (row.parameters, round(row.gflops, 6)) == (674_834_720, 524.538298)


def test_every_row_is_the_papers_to_3_in_10000_or_to_its_last_digit(table):
    assert len(table) == 16
    for row in table.values():
        assert abs(row.gflops - row.paper_gflops) < max(0.0003 * row.paper_gflops, 0.01), row
        assert abs(row.parameters / 1e6 - row.paper_parameters_millions) < 0.5, row


@pytest.mark.parametrize("conditioning", ["adaln-zero", "adaln", "cross-attention", "in-context"])
def test_counting_two_depths_gives_what_counting_the_whole_network_gives(conditioning):
    config = DiTConfig.from_preset("DiT-Ti/2", input_size=(8, 4), conditioning=conditioning)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = DiT(config)
        model(torch.zeros(1, 4, 8, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert count_macs(config) == counter.get_total_flops() // 2
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_the_table_takes_seconds():
    start = time.process_time()
    models_table()
    assert time.process_time() - start < 5


def test_the_page_about_models_holds_the_table(table):
    page = Path(__file__).parents[3] / "docs" / "models.md"
    assert models_markdown(list(table.values())).count("\n") == 17, "two lines of heading, then a line for each model"
    assert models_markdown(list(table.values())) in page.read_text()
    assert modern_markdown(modern_table()) in page.read_text()
