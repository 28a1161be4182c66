"""What a user sees while a run goes on: lines, events, pictures, the summary."""

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoint import read_checkpoint
from pipeline.diffusion import SAMPLERS, RectifiedFlow, classifier_free_guidance
from pipeline.dit import DiT, DiTConfig
from pipeline.image_grid import grid
from pipeline.randomness import normal
from pipeline.vae import Vae, denormalize, load_vae
from tests.train.runs import QUICK, ROOT, assert_same_run, command, environment, lines, make_store, train
from train import previews
from train.__main__ import main
from train.optimizer import Optimizer
from train.options import PreviewOptions
from train.plot import distinct_names, draw_curves, read_series, smoothed
from train.plot.__main__ import main as plot

NUMBERS = {"step", "loss", "mse", "vb", "loss_q0", "loss_q1", "loss_q2", "loss_q3", "grad_norm", "lr"}
NUMBERS |= {"images_per_second", "data_wait_share", "skipped_steps", "memory_bytes", "save_pause_seconds"}


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory):
    """A store that names the demo VAE, so that previews can be decoded."""
    return make_store(tmp_path_factory.mktemp("demo") / "latents", vae=load_vae("demo").describe())


@pytest.fixture(scope="module")
def watched(demo_store, tmp_path_factory):
    run = tmp_path_factory.mktemp("watched") / "run"
    flags = ["--sample-every", "2", "--preview-steps", "3", "--preview-classes", "3", "--validation-share", "0.2"]
    flags += ["--validate-every", "2", "--tensorboard", "--log-every", "2", "--save-every", "2"]
    assert train(demo_store, run, *flags, steps=4) == 0
    return run


def test_every_logged_step_has_its_numbers_and_the_loss_is_its_parts(watched):
    assert [line["step"] for line in lines(watched)] == [2, 4]
    for line in lines(watched):
        assert line.keys() == NUMBERS | {"validation_loss", "validation_loss_ema"}
        assert line["loss"] == pytest.approx(line["mse"] + line["vb"])
        assert line["images_per_second"] > 0 and 0 <= line["data_wait_share"] <= 1 and line["memory_bytes"] > 1e8
    assert lines(watched)[1]["save_pause_seconds"] > 0


def test_previews_show_raw_and_averaged_weights_with_their_classes(watched):
    names = sorted(path.name for path in (watched / "samples").iterdir())
    assert names == ["step-0000002.png", "step-0000004.png"]
    first, second = (picture(watched / "samples" / name) for name in names)
    assert first.shape == second.shape and not np.array_equal(first, second)


def test_tensorboard_events_hold_the_same_numbers(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx({line["step"]: line["loss"] for line in lines(watched)}, rel=1e-6)
    assert [event.step for event in events.Images("previews")] == [2, 4]


def test_watching_changes_nothing(demo_store, watched, tmp_path):
    """The same run without previews, validation losses (but with its split), events or checkpoints in between."""
    flags = ["--validation-share", "0.2", "--validate-every", "2", "--log-every", "2", "--save-every", "100"]
    assert train(demo_store, tmp_path / "run", *flags, steps=4) == 0
    assert_same_run(watched, tmp_path / "run", 4)


def test_curves_are_drawn_without_tensorboard(watched, tmp_path, capsys):
    assert plot([str(watched), "--out", str(tmp_path / "curves.png")]) == 0
    assert picture(tmp_path / "curves.png").shape[1] > 800
    assert plot([str(watched)]) == 0 and (watched / "curves.png").is_file()
    (tmp_path / "empty").mkdir()
    assert plot([str(tmp_path / "empty")]) == 2
    assert "does not exist; name the folder of a run that has logged a step" in capsys.readouterr().err


def test_runs_of_one_name_are_drawn_apart(watched, tmp_path):
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run"), Path("/a/z")]) == ["x/run", "y/run", "a/z"]
    assert distinct_names([Path("/a/run"), Path("/b/other")]) == ["run", "other"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text((watched / "metrics.jsonl").read_text() + "[1]\n")
    assert plot([str(tmp_path / "run"), "--out", str(tmp_path / "new" / "curves.png")]) == 0


def test_smoothing_is_a_running_mean_without_a_bias_at_the_start():
    assert smoothed([(1, 4.0), (2, 4.0)], 0.9) == [(1, pytest.approx(4.0)), (2, pytest.approx(4.0))]
    assert smoothed([(1, 1.0), (2, 3.0)], 0.5)[1][1] == pytest.approx((0.25 * 1 + 0.5 * 3) / 0.75)


def test_the_summary_says_what_is_trained_on_what_and_where_it_resumes(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", steps=2, depth=None) == 0
    spoken = capsys.readouterr().err
    for part in (
        "1.9 M parameters",
        "GFLOPs forward",
        "8 per process × 1 accumulation × 1 processes = 8",
        "50 samples",
    ):
        assert part in spoken
    for part in ("nobody/knows (555555555555", "precision no (default here)", "from the beginning", "alone"):
        assert part in spoken
    assert train(store, tmp_path / "run", steps=3, depth=None) == 0
    assert "going on after step 2" in capsys.readouterr().err


def test_a_long_run_says_how_long_it_will_take(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", "--batch-size", "2", steps=52) == 0
    assert "at this pace the remaining 2 steps take about" in capsys.readouterr().err


def test_a_setting_that_is_not_the_presets_is_said(store, tmp_path, capsys):
    flags = ["--config", "small-data", "--latents", str(store), "--out", str(tmp_path / "run"), "--steps", "1", *QUICK]
    assert main(flags) == 0
    spoken = capsys.readouterr().err
    assert "--batch-size is 8, but small-data means 128" in spoken
    assert "--model is DiT-Ti/2, but small-data means DiT-B/2" in spoken


def test_a_store_that_is_not_what_a_preset_means_is_said(store, tmp_path, capsys):
    flags = ["--config", "paper-256", "--latents", str(store), "--out", str(tmp_path / "run"), "--steps", "1", *QUICK]
    assert main(flags) == 0
    assert "the store's images have 64 px, but paper-256 means 256" in capsys.readouterr().err


def test_without_the_stores_vae_there_is_one_warning_and_no_previews(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train(store, tmp_path / "run", "--sample-every", "1", steps=2) == 0
    assert capsys.readouterr().err.count("no preview grids will be drawn") == 1
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--wandb-project", "x"], "--trackers wandb needs the package wandb; pip install wandb"),
        (["--trackers", "mlflow"], "--trackers mlflow needs the package mlflow; pip install mlflow"),
        (["--trackers", "aim,weights"], "Accelerate has no tracker of that name; it has aim, clearml, comet_ml"),
        (["--trackers", "tensorboard"], "TensorBoard is logged to anyway"),
    ],
)
def test_a_tracker_that_is_not_installed_or_not_known_is_said_before_anything_is_made(
    store, tmp_path, capsys, monkeypatch, flags, sentence
):
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in {"wandb", "mlflow"} else there(name))
    monkeypatch.setitem(
        sys.modules, "aim", types.SimpleNamespace(__spec__=importlib.util.spec_from_loader("aim", None))
    )
    assert train(store, tmp_path / "run", *flags, steps=1) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_finished_run_whose_log_was_removed_still_ends_well(store, tmp_path, capsys):
    assert train(store, tmp_path / "run", steps=2) == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert train(store, tmp_path / "run", steps=2) == 0
    assert "16 images seen" in capsys.readouterr().err


def test_a_finished_run_says_what_it_came_to_and_the_next_command(store, tmp_path, capsys):
    run = tmp_path / "my run"
    assert train(store, run, "--validation-share", "0.2", "--validate-every", "2", steps=4) == 0
    said = capsys.readouterr().err
    best = min((line["validation_loss_ema"], line["step"]) for line in lines(run) if "validation_loss_ema" in line)
    assert (
        f"32 images seen in N of training; best validation loss, of the average, {best[0]:.4f} at step {best[1]}"
        in (re.sub(r"seen in [\w ]+ of", "seen in N of", said))
    )
    assert f"next: dit-sample --checkpoint '{run}' --out samples.png" in said


STAND_IN = """
import json, os, types
def _write(**values):
    with open(os.environ["STAND_IN_LOG"], "a") as file:
        file.write(json.dumps(values) + "\\n")
def init(project, **_):
    _write(project=project)
    return types.SimpleNamespace(log=lambda values, step, **_: _write(step=step, **values), finish=lambda: _write(end=1))
config = types.SimpleNamespace(update=lambda values, **_: _write(config=values))
Image = lambda pixels, **_: list(pixels.shape)
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--wandb-project", "x"], ["--trackers", "wandb", "--tracker-project", "x"]])
def test_a_tracker_gets_the_same_numbers_and_the_pictures_through_accelerate(demo_store, tmp_path, flags):
    """A stand-in package of that name, as the real one is not installed here."""
    for name, text in (
        ("wandb/__init__.py", STAND_IN),
        ("wandb-1.0.dist-info/METADATA", "Name: wandb\nVersion: 1.0\n"),
    ):
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    log = tmp_path / "log.jsonl"
    extra = {"PYTHONPATH": f"{ROOT}:{tmp_path / 'packages'}", "STAND_IN_LOG": str(log)}
    words = [
        sys.executable,
        *command(demo_store, tmp_path / "run", *flags, "--sample-every", "2", "--preview-steps", "2", steps=2),
    ]
    subprocess.run(words, env=environment(**extra), cwd=tmp_path, capture_output=True, timeout=300, check=True)
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    assert seen[0] == {"project": "x"} and seen[1]["config"]["model"] == "DiT-Ti/2" and seen[-1] == {"end": 1}
    numbers = [(line["step"], line["loss"]) for line in seen[2:-1] if "loss" in line]
    assert numbers == [(logged["step"], logged["loss"]) for logged in lines(tmp_path / "run")]
    (picture,) = [line for line in seen if "previews" in line]
    assert picture["step"] == 2 and picture["previews"][0][2] == 3


def test_a_checkpoint_says_all_that_sampling_needs(watched, demo_store):
    info = json.loads((watched / "checkpoints" / "step-0000004" / "config.json").read_text())
    manifest = json.loads((demo_store / "manifest.json").read_text())
    assert (info["format"], info["version"], info["step"]) == ("dit-checkpoint", 1, 4)
    for key in ("classes", "class_ids", "vae", "latent", "image"):
        expected = {name: manifest[key][name] for name in info[key]} if isinstance(info[key], dict) else manifest[key]
        assert info[key] == expected
    assert info["diffusion"]["objective"] == "ddpm" and info["model"]["num_classes"] == 4
    assert info["training"]["batch_size"] == 8


@pytest.fixture(scope="module")
def cells(demo_store, tmp_path_factory):
    """(run, the images of its last preview in the order of the grid, their captions)."""
    run, seen = tmp_path_factory.mktemp("cells") / "run", []

    def noted(images, columns, **kwargs):
        seen.append((images, kwargs["captions"]))
        return grid(images, columns, **kwargs)

    flags = ["--sample-every", "2", "--preview-steps", "3", "--preview-classes", "3", "--lr", "1e-2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.previews.grid", noted)
        assert train(demo_store, run, *flags, steps=2) == 0
    return run, *seen[-1]


def test_every_preview_cell_is_its_own_image_of_its_own_class_by_its_own_weights(cells):
    """Each cell against the same image made alone: noise of its place, label of its column, raw above averaged."""
    run, images, captions = cells
    assert len(images) == len(captions) == 12 and captions[:3] == ["class 0", "class 2", "class 3"]
    assert all(not np.array_equal(a, b) for k, a in enumerate(images) for b in images[k + 1 :])
    vae = load_vae("demo")
    for row, weights in enumerate(("raw", "raw", "ema", "ema")):
        checkpoint = read_checkpoint(run, weights=weights)
        for column, label in enumerate((0, 2, 3)):
            place = (row % 2) * 3 + column
            denoise = classifier_free_guidance(
                checkpoint.model,
                torch.tensor([label]),
                scale=1.5,
                null_class=4,
                time_scale=checkpoint.process.time_scale,
            )
            noise = normal((4, 8, 8), 0, "preview", place)[None]
            made = SAMPLERS["ddim"](checkpoint.process, denoise, noise, lambda _, same=noise: same, steps=3)
            alone = vae.decode(denormalize(made, vae.scaling_factor, vae.shift_factor))[0]
            difference = np.abs(alone.numpy().astype(int) - images[row * 3 + column].astype(int))
            assert difference.max() <= 1, (row, column)


@pytest.mark.parametrize("where", ["train.previews.classifier_free_guidance", "pipeline.vae.Vae.decode"])
def test_a_preview_that_runs_out_of_memory_is_said_and_changes_nothing(
    demo_store, watched, tmp_path, monkeypatch, capsys, where
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(where, full)
    flags = ["--sample-every", "2", "--validation-share", "0.2", "--validate-every", "2", "--log-every", "2"]
    assert train(demo_store, tmp_path / "run", *flags, "--save-every", "2", steps=4) == 0
    assert "no preview of step 4: memory ran out; lower --preview-classes or --preview-rows" in capsys.readouterr().err
    assert_same_run(watched, tmp_path / "run", 4)
    assert not (tmp_path / "run" / "samples").exists()


def test_a_preview_is_decoded_in_pieces_of_a_bounded_size(demo_store, cells, tmp_path, monkeypatch):
    sizes, decode = [], Vae.decode

    def noted(self, latents):
        sizes.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr("train.previews.PREVIEWED_PX", 4 * 64 * 64)
    monkeypatch.setattr("pipeline.vae.Vae.decode", noted)
    flags = ["--sample-every", "2", "--preview-steps", "3", "--preview-classes", "3", "--lr", "1e-2"]
    assert train(demo_store, tmp_path / "run", *flags, steps=2) == 0
    assert sizes == [4, 2, 4, 2]


def falling_run(folder, *, scale=1.0):
    """A run whose loss falls a hundredfold and whose rate jumps once."""
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "loss": scale * 10 ** (-step / 50), "lr": 1e-3 if step < 50 else 1e-4} for step in range(1, 101)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_loss_that_falls_is_drawn_falling_on_a_logarithmic_axis(tmp_path):
    """By pixels: a hundredfold fall at a constant rate is a straight line from the upper left to the lower right."""
    run = falling_run(tmp_path / "run")
    assert plot([str(run), "--smoothing", "0"]) == 0
    image = picture(run / "curves.png")[:340, :600, :3].astype(int)  # the first panel
    drawn = np.abs(image - [0x1F, 0x77, 0xB4]).sum(axis=2) < 40
    columns = np.flatnonzero(drawn.any(axis=0))
    heights = np.array([np.flatnonzero(drawn[:, column]).mean() for column in columns])
    steady = slice(5, -5)
    assert heights[-1] - heights[0] > 200 and np.all(np.diff(heights[steady]) >= 0)
    straight = np.interp(columns, columns[[0, -1]], heights[[0, -1]])
    assert np.abs(heights - straight).max() < 6


def test_the_rate_is_drawn_as_it_was_logged_and_every_axis_has_readable_ticks(tmp_path):
    series = read_series(falling_run(tmp_path / "run"))
    figure = draw_curves({"run": series}, smoothing=0.9)
    figure.canvas.draw()
    loss, rate = figure.axes
    assert [tuple(point) for point in rate.lines[0].get_xydata()] == series["lr"] and len(rate.lines) == 1
    for axes in (loss, rate):
        low, high = axes.get_ylim()
        labels = [
            t.get_text() for t, y in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if low <= y <= high
        ]
        assert low < high and 3 <= len(labels) == len(set(labels)) and max(map(len, labels)) <= 7
        assert axes.get_xlabel() == "step"


def test_several_runs_share_one_picture_and_are_told_apart(tmp_path):
    runs = {name: read_series(falling_run(tmp_path / name, scale=k)) for k, name in ((1, "one"), (2, "two"))}
    figure = draw_curves(runs, smoothing=0.5)
    loss = figure.axes[0]
    named = [line for line in loss.lines if not line.get_label().startswith("_")]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["one loss", "two loss"]
    assert len({line.get_color() for line in named}) == 2


def test_the_rate_of_the_optimizers_groups_is_the_schedules_at_every_step_as_logged_and_as_drawn(
    store, tmp_path, monkeypatch
):
    used, real = [], Optimizer.step

    def step(self, gradients, rate):
        result = real(self, gradients, rate)
        (rate,) = {group["lr"] for group in self._adamw.param_groups}
        used.append(rate)
        return result

    monkeypatch.setattr(Optimizer, "step", step)
    flags = ["--lr", "1e-3", "--lr-end", "1e-4", "--lr-schedule", "wsd", "--decay-steps", "8", "--decay-start", "4"]
    assert train(store, tmp_path / "run", *flags, "--lr-warmup-steps", "2", steps=9) == 0
    expected = [0.5, 1, 1, 1, 0.55, 0.1 + 0.9 * (1 - 0.5**0.5), 0.1 + 0.9 * (1 - 0.75**0.5), 0.1, 0.1]
    assert used == pytest.approx([1e-3 * share for share in expected])
    assert [line["lr"] for line in lines(tmp_path / "run")] == used
    figure = draw_curves({"run": read_series(tmp_path / "run")}, smoothing=0.9)
    axes = next(axes for axes in figure.axes if axes.get_title(loc="left") == "learning rate")
    assert [rate for _, rate in axes.lines[0].get_xydata()] == used


def drawing(*, processes=1, **fields):
    """Previews of a small network on one of so many processes, the other of which has the cells between."""
    config = DiTConfig(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=1, learn_sigma=False, **fields)
    hardware = types.SimpleNamespace(
        processes=processes,
        rank=0,
        device=torch.device("cpu"),
        is_main=True,
        broadcast=lambda value: value,
        accelerator=types.SimpleNamespace(gather=lambda made: torch.cat([made, made + 1])),
    )
    options = PreviewOptions(sample_every=0, preview_steps=1, preview_classes=2, preview_rows=1, preview_guidance=3.0)
    return previews.Previews(options, None, config, RectifiedFlow(), hardware, folder=None, seed=0), DiT(config)


@pytest.mark.parametrize(("classes", "scale"), [(3, 3.0), (0, 1.0)])
def test_previews_are_guided_as_asked_where_there_are_classes(monkeypatch, classes, scale):
    asked = []

    def guided(*given, **how):
        asked.append(how["scale"])
        return classifier_free_guidance(*given, **how)

    monkeypatch.setattr(previews, "classifier_free_guidance", guided)
    drawn, network = drawing(num_classes=classes)
    drawn._latents(network)
    assert asked == [scale]


def test_the_cells_of_two_processes_are_dealt_back_in_the_order_of_the_grid():
    drawn, _ = drawing(processes=2, num_classes=3)
    mine = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1, 1)
    assert drawn._in_order(mine, 5).flatten().tolist() == [0, 1, 2, 3, 4]
