"""Runs on the page: what was logged, curves, previews, and nothing from outside of the run."""

from io import BytesIO

import pytest
from PIL import Image

from pipeline.runtime.errors import UserError
from view.given import GivenNetwork, find_given
from view.options import ViewOptions
from view.runs import curves, describe, preview


def png(path):
    Image.new("RGB", (4, 4)).save(path)


@pytest.fixture
def young(tmp_path):
    """A run that has saved, drawn and logged nothing yet."""
    folder = tmp_path / "young"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "samples").mkdir()
    return GivenNetwork(name="young", path=str(folder))


def test_a_run_is_described_by_its_last_numbers_its_previews_and_its_checkpoints(given):
    about = describe(given.networks[0])
    assert (about["step"], about["previews"], about["checkpoints"], about["problem"]) == (4, [2, 4], [2, 4], "")
    assert {"loss", "images_per_second", "data_wait_share", "grad_norm"} <= about["last"].keys()


def test_a_run_that_has_logged_nothing_says_so_and_is_no_error(young):
    about = describe(young)
    assert (about["step"], about["previews"]) == (None, [])
    assert "has logged a step" in about["problem"]


def test_the_preview_of_a_step_is_the_file_that_training_wrote(given, run):
    assert preview(given.networks[0], 4) == (run / "samples" / "step-0000004.png").read_bytes()
    with pytest.raises(UserError, match="no preview of step 3"):
        preview(given.networks[0], 3)


def test_a_link_out_of_the_run_is_not_followed(young, tmp_path):
    png(tmp_path / "private.png")
    (tmp_path / "young" / "samples" / "step-1.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(UserError, match="a link out of its run"):
        preview(young, 1)


def test_what_is_no_picture_is_not_served(young, tmp_path):
    (tmp_path / "young" / "samples" / "step-1.png").write_text("<script>")
    with pytest.raises(UserError, match="is no PNG"):
        preview(young, 1)


def test_curves_of_several_runs_are_one_picture(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    lines = "".join(f'{{"step": {step}, "loss": {1 / step}}}\n' for step in range(1, 9))
    (other / "metrics.jsonl").write_text(
        lines + '{"step": 9, "loss": "text"}\n{"step": "x", "loss": 1}\n{"step": 9, "lo'
    )
    given = find_given(ViewOptions(checkpoint=(str(run), str(other))))
    both, alone = (Image.open(BytesIO(curves(given, numbers, smoothing=0.9))) for numbers in ([0, 1], [1]))
    assert both.size[1] > alone.size[1], "the short log has one panel"
    with pytest.raises(UserError, match="choose at least one"):
        curves(given, [], smoothing=0.9)
    with pytest.raises(UserError, match="no checkpoint number 7"):
        curves(given, [7], smoothing=0.9)


def test_a_log_without_anything_to_draw_is_one_sentence(young, tmp_path):
    (tmp_path / "young" / "metrics.jsonl").write_text('{"step": 1, "mine": 2}\n')
    given = find_given(ViewOptions(checkpoint=(young.path,)))
    with pytest.raises(UserError, match="young logged nothing that is drawn"):
        curves(given, [0], smoothing=0.9)
