"""Memory, descriptors and threads of long commands stay where they were after their beginning."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.latents import LatentStore
from pipeline.runtime.publish import work_folder_of
from tests.train.runs import ROOT, environment, lines

IMAGES, STEPS, INTERVAL_S = 2000, 5000, 0.1
MIB = 1 << 20


def watched(words: list[str], work_done: Callable[[], float], folder: Path) -> list[tuple[float, int, int, int]]:
    """(work done, resident bytes, open descriptors, threads) of a command, again and again until it ends well."""
    seen = []
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen([sys.executable, *words], env=environment(), cwd=ROOT, stderr=said, stdout=said)
        watch = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error), watch.oneshot():
                seen.append((work_done(), watch.memory_info().rss, watch.num_fds(), watch.num_threads()))
            time.sleep(INTERVAL_S)
    assert process.returncode == 0, (folder / "said").read_text()
    return seen


def assert_flat(seen: list[tuple[float, int, int, int]], whole: float, *, growth_mib: float) -> None:
    """The last quarter of the work holds no more than its second quarter did."""
    second = np.array([row[1:] for row in seen if 0.25 * whole <= row[0] < 0.5 * whole])
    last = np.array([row[1:] for row in seen if 0.75 * whole <= row[0] < whole])
    assert len(second) >= 5 and len(last) >= 5, f"only {len(second)} and {len(last)} looks"
    memory = int(last[:, 0].max() - second[:, 0].max())
    assert memory <= growth_mib * MIB, f"{memory / MIB:.1f} MiB more"
    # What is open for a moment, as a checkpoint's file is, may be seen in one quarter and not in the other.
    descriptors, threads = (last[:, 1:].min(axis=0) - second[:, 1:].max(axis=0)).tolist()
    assert descriptors <= 0, f"{descriptors} descriptors more"
    assert threads <= 0, f"{threads} threads more"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / f"class-{number % 4}"
        place.mkdir(exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def extraction(
    images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[float, int, int, int]]]:
    store = tmp_path_factory.mktemp("store") / "store"
    words = ["-m", "extract", "--data", images, "--vae", "demo", "--image-size", 32, "--samples-per-shard", 25]
    words += ["--batch-size", 5, "--out", store]

    def done() -> float:
        return 25.0 * len(list(store.glob("train-*.json")))

    return store, watched([str(word) for word in words], done, store.parent)


@pytest.fixture(scope="module")
def training(
    extraction: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[float, int, int, int]]]:
    run = tmp_path_factory.mktemp("run") / "run"
    words = ["-m", "train", "--latents", extraction[0], "--out", run, "--model", "DiT-Ti/2", "--hidden-size", 32]
    words += ["--depth", 1, "--num-heads", 2, "--batch-size", 4, "--steps", STEPS, "--log-every", 50]
    words += ["--save-every", 250, "--sample-every", 500, "--preview-steps", 2, "--preview-classes", 2]

    def done() -> float:
        logged = lines(run)
        return logged[-1]["step"] if logged else 0

    return run, watched([str(word) for word in words], done, run.parent)


@pytest.mark.slow
def test_extracting_2000_images_holds_no_more_at_the_end_than_in_its_second_quarter(extraction):
    store, seen = extraction
    assert len(LatentStore(store)) == IMAGES
    assert_flat(seen, IMAGES, growth_mib=16)


@pytest.mark.slow
def test_training_5000_steps_with_checkpoints_and_previews_holds_no_more_at_the_end_than_in_its_second_quarter(
    training,
):
    run, seen = training
    assert lines(run)[-1]["step"] == STEPS
    assert_flat(seen, STEPS, growth_mib=16)


@pytest.mark.slow
def test_sampling_2000_images_holds_no_more_at_the_end_than_in_its_second_quarter(training, tmp_path):
    out = tmp_path / "samples"
    words = ["-m", "sample", "--checkpoint", training[0], "--out", f"{out}/", "--num-samples", IMAGES, "--steps", 2]
    words += ["--batch-size", 8, "--guidance", 1]

    def done() -> float:
        return 8.0 * len(list(work_folder_of(out).glob("chunk-*.safetensors")))

    seen = watched([str(word) for word in words], done, tmp_path)
    assert len(list(out.rglob("*.png"))) == IMAGES
    assert_flat(seen, IMAGES, growth_mib=16)
