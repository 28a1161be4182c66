"""The encoder that is made of the digits: one that dit-extract takes, and a table that says what fewer numbers lose."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from examples.digits.encoder import DIMS, PX, WIDTH, Options, digits, measure, publish, table
from pipeline.features.encoder import find_encoder, load_encoder
from pipeline.runtime.cli import parse_options
from pipeline.runtime.errors import UserError
from studies.cells import planned, read_study, train_flags
from train.options import TrainOptions


@pytest.fixture(scope="module")
def some():
    pixels, labels = digits()
    return pixels[:200], labels[:200]


@pytest.fixture(scope="module")
def encoder(some, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "encoder"
    publish(Options(out=folder, epochs=1), *some)
    return load_encoder(find_encoder(str(folder)), device=torch.device("cpu"), dtype=torch.float32)


def test_the_digits_come_in_a_keyed_order_as_they_are_shown_to_an_encoder(some):
    pixels, labels = some
    assert pixels.shape == (200, 3, PX, PX) and pixels.min() >= -1 and pixels.max() <= 1
    assert set(labels) == set(range(10)) and np.array_equal(labels, digits()[1][:200])


def test_it_is_an_encoder_that_features_can_be_made_with(encoder):
    about = encoder.about
    assert (about.resolution, about.grid, about.width, encoder.has_cls) == (PX, (8, 8), WIDTH, True)


def test_more_numbers_keep_more_and_all_keep_everything(encoder, some):
    figures = measure(encoder, *some)
    assert [each.dim for each in figures] == [*DIMS, WIDTH]
    for name in ("kept", "cosine"):
        values = [getattr(each, name) for each in figures]
        assert values == sorted(values) and values[-1] == pytest.approx(1, abs=1e-3)
    assert all(0 <= each.probe <= 1 for each in figures)
    assert len(table(figures)) == 2 + len(figures)


def test_pictures_of_another_size_are_refused(encoder, some):
    with pytest.raises(UserError, match="of 32 pixels, not of 16"):
        measure(encoder, some[0][:, :, ::2, ::2], some[1])


def test_the_study_of_alignment_is_two_cells_that_differ_in_one_flag_with_three_seeds_each(tmp_path):
    study = read_study(str(Path(__file__).parents[2] / "examples" / "digits" / "alignment.yaml"))
    runs = planned(study, {run.name: 0.0 for run in planned(study, {}, ())}, ())
    assert sorted((run.cell, run.seed) for run in runs) == [(cell, s) for cell in ("with", "without") for s in range(3)]
    for run in runs:
        path = tmp_path / "flags.yaml"
        path.write_text(yaml.safe_dump(train_flags(study, run, data="latents", out=tmp_path / "run")))
        options = parse_options(TrainOptions, ["--config", str(path)], prog="dit-train", description="")
        assert options.model.align_features == (run.cell == "with") and options.data.seed == run.seed
        assert options.optimizer.steps == 1400
