"""Distances under a vision encoder of the user's: numbers, names, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from scipy.spatial.distance import cdist

from pipeline.runtime.errors import UserError
from sample.evaluate.__main__ import main
from sample.evaluate.metrics import clip_mmd
from sample.evaluate.options import EvaluateOptions
from tests.encoders import write_encoder

transformers = pytest.importorskip("transformers")
SIDE, MEAN, STD = 28, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoders") / "small", width=16)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = write_encoder(tmp_path_factory.mktemp("encoders") / "clip", "CLIPVision", width=16)
    config = transformers.CLIPVisionConfig.from_pretrained(folder, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two sets of images of another size than the encoders'."""
    folder, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 90)):
        np.savez(folder / f"{name}.npz", arr_0=draws.integers(low, 200, (24, 40, 36, 3), dtype=np.uint8))
    return folder


def judged(images, encoder, out, *flags):
    words = ["--samples", images / "a.npz", "--reference", images / "b.npz", "--features", encoder, "--out", out]
    status = main([str(word) for word in [*words, "--device", "cpu", *flags]])
    return status, json.loads(out.read_text()) if out.exists() else None


def prepared(images, name):
    """Normalised pixels, by PIL and the encoder's own figures."""
    rows = np.load(images / f"{name}.npz")["arr_0"]
    small = [np.asarray(Image.fromarray(row).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for row in rows]
    return torch.from_numpy(((np.stack(small) / 255 - MEAN) / STD).astype(np.float32)).permute(0, 3, 1, 2)


def test_fd_is_scipys_distance_of_the_class_tokens_and_is_named_by_the_encoder(dinov2, images, tmp_path):
    status, result = judged(images, dinov2, tmp_path / "r.json")
    assert status == 0 and set(result["metrics"]) == {"FD-DINOv2-24", "Precision-DINOv2-24", "Recall-DINOv2-24"}
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        x, y = (model(prepared(images, name)).last_hidden_state[:, 0].double().numpy() for name in "ab")
    s, t = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(linalg.sqrtm(s) @ t @ linalg.sqrtm(s)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert result["metrics"]["FD-DINOv2-24"] == pytest.approx(expected, rel=1e-3)
    assert result["inception"] is None
    assert (result["encoder"]["name"], result["encoder"]["kind"], result["encoder"]["resolution"]) == (
        "small",
        "dinov2",
        SIDE,
    )


def test_cmmd_is_the_kernel_distance_of_clips_embeddings_and_asked_of_clip_alone(
    clip, dinov2, images, tmp_path, capsys
):
    status, result = judged(images, clip, tmp_path / "r.json")
    assert status == 0 and set(result["metrics"]) == {"FD-CLIP-24", "Precision-CLIP-24", "Recall-CLIP-24", "CMMD-24"}
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    with torch.no_grad():
        x, y = (model(prepared(images, name)).image_embeds for name in "ab")
    x, y = ((rows / rows.norm(dim=1, keepdim=True)).double().numpy() for rows in (x, y))
    kernel = lambda first, second: np.exp(-cdist(first, second, "sqeuclidean") / 200).mean()  # noqa: E731
    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert result["metrics"]["CMMD-24"] == pytest.approx(expected, rel=1e-3) and expected > 0
    assert judged(images, dinov2, tmp_path / "none.json", "--metrics", "cmmd") == (2, None)
    assert "cmmd is of CLIP's image embeddings" in capsys.readouterr().err


def test_cmmd_in_blocks_is_that_of_all_pairs_and_nothing_for_equal_sets():
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(2500, 6)), draws.normal(1, 1, size=(1200, 6))
    kernel = lambda first, second: np.exp(-cdist(first, second, "sqeuclidean") / 200).mean()  # noqa: E731
    assert clip_mmd(x, y) == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=1e-9)
    assert clip_mmd(x, x) == pytest.approx(0, abs=1e-9)


def test_any_batch_size_gives_the_same_to_rounding_and_a_result_is_known_again_by_its_encoder(
    dinov2, clip, images, tmp_path, capsys
):
    first, second = (judged(images, dinov2, tmp_path / f"{n}.json", "--batch-size", str(n))[1] for n in (5, 24))
    for name, value in first["metrics"].items():
        assert second["metrics"][name] == pytest.approx(value, rel=1e-4)
    assert judged(images, dinov2, tmp_path / "5.json", "--batch-size", "5")[0] == 0
    assert "nothing to do" in capsys.readouterr().err
    assert judged(images, clip, tmp_path / "5.json", "--batch-size", "5")[0] == 2
    assert "holds another result" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--metrics", "fid"], "--metrics fid: not defined on --features"),
        (["--features", "/nowhere"], "there is no encoder folder '/nowhere'"),
        (["--make-reference", "r.npz"], "--make-reference holds the FID network's statistics"),
    ],
)
def test_what_does_not_fit_an_encoder_is_refused_in_a_sentence(dinov2, images, tmp_path, capsys, flags, sentence):
    assert judged(images, dinov2, tmp_path / "r.json", *flags) == (2, None)
    assert sentence in capsys.readouterr().err


def test_help_loads_neither_torch_nor_transformers():
    import subprocess

    code = "import sys\nfrom sample.evaluate.__main__ import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
    assert EvaluateOptions(samples="a", reference="b", features="x").wanted[0] == "fd-encoder"
    with pytest.raises(UserError, match="not defined on --features x, which has fd-encoder"):
        EvaluateOptions(samples="a", reference="b", features="x", metrics="fd-pixels")
