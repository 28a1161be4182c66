"""The judge of a store: learns, is one folder that dit-evaluate takes, and its numbers are what they are called."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from scipy.spatial.distance import cdist

from pipeline.features.encoder import find_encoder, load_encoder
from pipeline.latents import LatentStore
from pipeline.runtime.errors import UserError
from pipeline.vae import load_vae
from sample.evaluate.__main__ import main as evaluate
from studies.judge import PX, main, make_judge, train_judge
from tests.train.runs import make_store

transformers = pytest.importorskip("transformers")
NAMES = ["dark", "bright", "striped"]


def pictures(count, *, seed, side=40):
    """Pictures of three kinds that tell themselves apart, and their kinds."""
    draws, labels = np.random.default_rng(seed), np.arange(count) % 3
    found = draws.integers(0, 90, (count, side, side, 3))
    found[labels == 1] += 120
    found[labels == 2, :, ::8] += 150
    return found.astype(np.uint8), labels


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(
        tmp_path_factory.mktemp("store") / "latents", samples=30, classes=3, vae=load_vae("demo").describe()
    )


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges") / "judge"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.judge.BATCHES", 60)
        assert train_judge(*pictures(192, seed=0), NAMES, folder) == 1.0
    return folder


@pytest.fixture(scope="module")
def judged(judge, tmp_path_factory):
    """(result, features of the samples, of the reference) of pictures of which six were asked for as other kinds."""
    folder = tmp_path_factory.mktemp("judged")
    made, real = pictures(48, seed=1), pictures(60, seed=2)
    asked = made[1].copy()
    asked[:6] = (asked[:6] + 1) % 3
    np.savez(folder / "made.npz", arr_0=made[0], arr_1=asked)
    np.savez(folder / "real.npz", arr_0=real[0])
    words = ["--samples", folder / "made.npz", "--reference", folder / "real.npz", "--features", judge]
    words += ["--metrics", "fd-encoder,precision-encoder,recall-encoder,recognised", "--device", "cpu"]
    assert evaluate([str(word) for word in [*words, "--out", folder / "r.json"]]) == 0
    model = transformers.ResNetModel.from_pretrained(judge).eval()

    def pooled(images):
        small = [np.asarray(Image.fromarray(image).resize((PX, PX), Image.Resampling.BICUBIC)) for image in images]
        x = torch.from_numpy(np.stack(small) / 127.5 - 1).float().permute(0, 3, 1, 2)
        with torch.no_grad():
            return model(pixel_values=x).pooler_output.flatten(1).double().numpy()

    return json.loads((folder / "r.json").read_text()), pooled(made[0]), pooled(real[0])


def test_its_distance_is_scipys_of_the_pooled_features_and_is_named_after_its_folder(judged):
    result, x, y = judged
    s, t = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(s + 1e-9 * np.eye(len(s))) @ linalg.sqrtm(t + 1e-9 * np.eye(len(t)))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * linalg.svdvals(root.real).sum()
    assert result["metrics"]["FD-judge-48"] == pytest.approx(expected, rel=1e-2)
    assert (result["encoder"]["name"], result["encoder"]["kind"]) == ("judge", "resnet")


def test_its_precision_and_recall_are_shares_within_balls_to_the_third_neighbour(judged):
    result, x, y = judged

    def inside(points, centers):
        radii = np.sort(cdist(centers, centers), axis=1)[:, 3]
        return (cdist(points, centers) <= radii).any(1).mean()

    assert result["metrics"]["Precision-judge-48"] == pytest.approx(inside(x, y), abs=0.021)
    assert result["metrics"]["Recall-judge-48"] == pytest.approx(inside(y, x), abs=0.021)


def test_recognised_is_the_share_that_is_of_the_class_asked_for(judged):
    assert judged[0]["metrics"]["Recognised-judge-48"] == 42 / 48
    assert judged[0]["details"]["Recognised-judge-48"] == {"classes": 3}


def test_it_is_the_same_for_the_same_pictures_whatever_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("studies.judge.BATCHES", 2)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        train_judge(*pictures(90, seed=0), NAMES, tmp_path / str(threads))
        found.append(find_encoder(str(tmp_path / str(threads))).sha256)
    torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_map_of_a_convolutional_network_is_read_as_tokens_row_by_row(judge):
    encoder = load_encoder(find_encoder(str(judge)), device=torch.device("cpu"), dtype=torch.float32)
    assert (encoder.about.grid, encoder.about.width, encoder.has_cls) == ((2, 2), 64, False)
    x = torch.linspace(-1, 1, 3 * PX * PX).reshape(1, 3, PX, PX)
    with torch.no_grad():
        seen = encoder.model(pixel_values=x).last_hidden_state
    torch.testing.assert_close(encoder.tokens(x)[0][0, 1], seen[0, :, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "kind", "sentence"),
    [
        ({}, "judge", "compares with the classes that images were made for"),
        ({"arr_1": np.full(9, 3)}, "judge", "has classes up to 3, but the classifier of --features judge knows 3"),
        ({"arr_1": np.full(8, 1)}, "judge", "must be 9 whole numbers"),
        ({"arr_1": np.full(9, 1)}, "headless", "is what a classifier names, but --features headless has none"),
    ],
)
def test_what_cannot_be_recognised_is_refused_in_a_sentence(judge, tmp_path, capsys, arrays, kind, sentence):
    np.savez(tmp_path / "made.npz", arr_0=pictures(9, seed=1)[0], **arrays)
    folder = judge
    if kind == "headless":
        folder = tmp_path / kind
        transformers.ResNetModel.from_pretrained(judge).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_bytes((judge / "preprocessor_config.json").read_bytes())
    words = ["--samples", tmp_path / "made.npz", "--features", folder, "--metrics", "recognised", "--device", "cpu"]
    assert evaluate([str(word) for word in words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_makes_the_judge_of_a_store_once_and_refuses_another_stores(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("studies.judge.BATCHES", 1)
    words = ["--data", str(store), "--out", str(tmp_path / "judge")]
    assert main(words) == 0 and "training a judge of 30 pictures in 3 classes" in capsys.readouterr().err
    about = json.loads((tmp_path / "judge" / "judge.json").read_text())
    assert about["format"] == "dit-judge" and 0 <= about["recognised"] <= 1
    assert find_encoder(str(tmp_path / "judge")).classes == 3
    assert main(words) == 0 and "training" not in capsys.readouterr().err
    other = make_store(tmp_path / "other", samples=31, classes=3, vae=load_vae("demo").describe())
    assert main(["--data", str(other), "--out", str(tmp_path / "judge")]) == 2
    assert "is no judge of this store; choose another name" in capsys.readouterr().err


def test_a_store_without_classes_has_no_judge(tmp_path):
    store = LatentStore(make_store(tmp_path / "store", samples=4, classes=0))
    with pytest.raises(UserError, match="has pictures without one"):
        make_judge(store, list, tmp_path / "judge")
    assert not (tmp_path / "judge").exists()
