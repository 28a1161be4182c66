"""What the benchmarks run beside each other: draws, halved batches, memory that ends."""

import contextlib

import numpy as np
import pytest
import torch
from safetensors import safe_open

from benchmarks import features, train
from benchmarks.__main__ import failures_kept, run_part
from benchmarks.machine import Ceilings, Setting
from benchmarks.network import fill_both
from benchmarks.plain_dit import PlainDiT
from benchmarks.report import Report, Row
from benchmarks.sample import Race, our_side, plain_loop
from benchmarks.timing import spread
from pipeline.dit import DiT
from pipeline.randomness import normal
from pipeline.vae import load_vae

CPU = torch.device("cpu")
ONE = spread([1e9])
CEILINGS = Ceilings(fp32=ONE, tf32=None, bf16=ONE, copy=ONE, upload=None)


def test_no_draw_depends_on_the_default_device():
    expected = normal((2, 3), 0, "a purpose", 5)
    with torch.device("meta"):
        assert torch.equal(normal((2, 3), 0, "a purpose", 5), expected)


def test_the_plain_loop_makes_our_images():
    race = Race(model="DiT-Ti/2", batch_size=2, steps=2, rounds=1, device="cpu", compiled=False)
    ours = DiT.from_preset(race.model, input_size=8)
    plain = PlainDiT(ours.config)
    fill_both(ours, plain)
    vae, labels = load_vae("demo"), np.array([1, 2])
    generator = our_side(ours, vae, race)
    expected = generator.pixels(generator.latents(0, labels)).astype(int)
    found = plain_loop(plain.eval(), vae, labels, race).astype(int)
    assert expected.std() > 1
    assert np.abs(found - expected).max() <= 1


def test_features_are_made_and_written_beside_the_encoder_alone_and_every_round_counts(tmp_path):
    pytest.importorskip("transformers")
    where = Setting(device=CPU, ceilings=CEILINGS, folder=tmp_path, quick=True)
    ((name, piece),) = features.pieces(where).items()
    (row,) = piece()
    assert name == "DINOv2-S/14 in float32" and row.unit == "images/s"
    assert row.ours.count == row.plain.count == row.ratio.count == 2 and row.share > 0
    shards = sorted((tmp_path / "features-0").glob("train-*.safetensors"))
    with safe_open(shards[0], "pt") as shard:
        assert shard.get_slice("features").get_shape()[1:] == [2, 4, 16]
        assert shard.get_slice("cls").get_shape()[1:] == [2, 32]


def limited(most, error=torch.OutOfMemoryError):
    """Builds works that need memory for at most so many samples."""

    @contextlib.contextmanager
    def build(batch_size):
        def step():
            if batch_size > most:
                raise error("CUDA out of memory")
            return 0.0

        yield step

    return build


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_batch_is_halved_until_it_fits_in_whichever_words_memory_ends(error):
    assert train.largest_that_fits(limited(8, error), 64, CPU) == 8
    assert train.largest_that_fits(limited(64, error), 64, CPU) == 64
    assert train.largest_that_fits(limited(0, error), 4, CPU) == 1


def test_another_error_is_no_end_of_memory():
    @contextlib.contextmanager
    def broken(_batch_size):
        raise RuntimeError("no such kernel")
        yield

    with pytest.raises(RuntimeError, match="no such kernel"):
        train.largest_that_fits(broken, 8, CPU)


@pytest.mark.slow
def test_either_loop_gets_a_smaller_batch_where_memory_ends_and_rates_are_per_image(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_data", lambda *_: None)
    for most_of_ours, most_of_plain in ((2, 8), (8, 2)):
        monkeypatch.setattr(train, "builders", lambda *_, a=most_of_ours, b=most_of_plain: (limited(a), limited(b)))
        case = train.Case(model="DiT-Ti/2", side=8, batch_size=8, memory=False)
        (row,) = train._compare(case, Setting(device=CPU, ceilings=CEILINGS, folder=tmp_path, quick=True))
        assert row.more["our_batch"] <= most_of_ours and row.more["plain_batch"] <= most_of_plain
        assert min(row.more["our_batch"], row.more["plain_batch"]) == 2
        assert "what fits" in row.note


def test_a_row_that_fails_costs_itself_alone_and_its_reason_is_kept(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("no such kernel")

    report = Report(command="", machine={"device": "cpu"}, ceilings=CEILINGS)
    fine = Row(what="fine", unit="s", ours=spread([1.0]))
    setting = Setting(device=CPU, ceilings=CEILINGS, folder=tmp_path, quick=True)
    pieces = {"first": lambda: [fine], "broken": fails, "last": lambda: [fine]}
    monkeypatch.setattr("benchmarks.network.pieces", lambda _setting: pieces)
    run_part("network", setting, report, tmp_path / "found.json")
    assert report.rows["network"] == [fine, fine]
    assert report.skipped == {"network: broken": "failed: RuntimeError: no such kernel"}
    assert (tmp_path / "found.json").exists()


def test_a_part_whose_library_is_absent_is_left_out():
    report = Report(command="", machine={"device": "cpu"}, ceilings=CEILINGS)
    with failures_kept(report, "loader"):
        import no_such_library  # noqa: F401
    with failures_kept(report, "train"):
        import benchmarks.no_such_file  # noqa: F401
    assert report.skipped["loader"] == "no_such_library is not installed"
    assert report.skipped["train"].startswith("failed: ModuleNotFoundError")
