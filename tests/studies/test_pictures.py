"""The pictures of a report, by what is in them."""

import io
from types import SimpleNamespace

import numpy as np
from PIL import Image

from studies import pictures


def test_every_row_of_samples_has_its_cells_whole_name_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "samples_of", lambda _: np.zeros((10, 64, 64, 3), np.uint8))
    result = SimpleNamespace(seed=0, flags={})
    cells = {name: [result] for name in ("adaln-zero", "adaln", "cross-attention", "in-context")}
    place = SimpleNamespace(folder=lambda run: tmp_path / run.cell)
    figure = pictures.draw_samples(None, cells, place)
    file = io.BytesIO()
    figure.savefig(file)
    pixels = np.asarray(Image.open(file).convert("L"))
    assert [axes.get_ylabel() for axes in figure.axes] == list(cells)
    assert (pixels[:, :2] == 255).all(), "a name is cut"
    beside = pixels[:, : int(figure.axes[0].get_window_extent().x0)]
    assert len(np.flatnonzero(np.diff((beside < 128).any(axis=1)))) == 2 * len(cells), "each row has a name"
