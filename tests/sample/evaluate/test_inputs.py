"""Inputs are told apart by what lies there; what is none of them is refused with what could be given."""

import fsspec
import numpy as np
import pytest

from pipeline.runtime.errors import UserError
from sample.evaluate.inputs import kind_of, open_inputs
from sample.evaluate.options import EvaluateOptions


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        ("store/manifest.json", "store"),
        ("run/checkpoints/step-1/config.json", "checkpoint"),
        ("checkpoints/step-1/config.json", "checkpoint"),
        ("checkpoint/config.json", "checkpoint"),
        ("images/a.png", "folder"),
    ],
)
def test_a_folder_is_told_by_what_is_in_it(tmp_path, made, kind):
    (tmp_path / made).parent.mkdir(parents=True)
    (tmp_path / made).write_text("{}")
    assert kind_of(str(tmp_path / made.partition("/")[0]), "--samples") == kind


@pytest.mark.parametrize(("name", "kind"), [("x.npz", "npz"), ("x.NPZ", "npz"), ("DiT-XL-2.pt", "checkpoint")])
def test_a_file_is_told_by_its_suffix(tmp_path, name, kind):
    (tmp_path / name).touch()
    assert kind_of(str(tmp_path / name), "--samples") == kind


def test_an_address_is_a_latent_store_unless_a_run_or_checkpoint_is_there():
    assert kind_of("memory://evaluated/store", "--reference") == "store"
    files = fsspec.filesystem("memory")
    for name in ("config.yaml", "config.json"):
        files.pipe_file(f"/evaluated/run/{name}", b"{}")
        assert kind_of("memory://evaluated/run", "--samples") == "checkpoint"
        files.rm("/evaluated", recursive=True)


def test_nothing_there_and_an_unknown_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--samples .*gone does not exist"):
        kind_of(str(tmp_path / "gone"), "--samples")
    (tmp_path / "x.txt").touch()
    with pytest.raises(
        UserError, match=r"--reference .*x.txt is of no kind that is known here; give a folder of images"
    ):
        kind_of(str(tmp_path / "x.txt"), "--reference")


def test_an_npz_without_images_or_statistics_names_what_it_holds(tmp_path):
    np.savez(tmp_path / "x.npz", labels=np.zeros(3), other=np.zeros(2))
    with pytest.raises(UserError, match="holds labels, other, but images"):
        open_inputs(EvaluateOptions(samples=str(tmp_path / "x.npz"), metrics="is"))


def test_a_folder_takes_a_size_that_is_asked_for_before_the_other_sides(tmp_path, pictures, save_pictures):
    save_pictures(tmp_path / "folder", pictures(2))
    np.savez(tmp_path / "x.npz", pictures(2, size=16))
    sides = {"samples": str(tmp_path / "folder"), "reference": str(tmp_path / "x.npz"), "metrics": "kid"}
    sizes = {}
    for asked in (None, 12):
        inputs = open_inputs(EvaluateOptions(**sides, image_size=asked))
        assert list(inputs) == ["--samples", "--reference"]
        sizes[asked] = [given.images.size for given in inputs.values()]
    assert sizes == {None: [(16, 16), (16, 16)], 12: [(12, 12), (16, 16)]}


def test_a_folder_takes_no_size_that_is_no_square(tmp_path, pictures, save_pictures):
    save_pictures(tmp_path / "folder", pictures(2))
    np.savez(tmp_path / "x.npz", pictures(2)[:, :16])
    inputs = open_inputs(
        EvaluateOptions(samples=str(tmp_path / "folder"), reference=str(tmp_path / "x.npz"), metrics="kid")
    )
    assert [given.images.size for given in inputs.values()] == [(24, 24), (24, 16)]
