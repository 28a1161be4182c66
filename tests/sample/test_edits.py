"""--vary, --inpaint and --interpolate: on Gaussians whose answer is known, and through the command."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from pipeline.diffusion import SAMPLERS, GaussianDiffusion, RectifiedFlow
from pipeline.diffusion.sit import REPAFlow, SiTFlow
from pipeline.dit import DiTConfig
from sample.edits import Inpainting, Interpolation, Variation, slerp, steps_from

COUNT = 4000
SHAPE = (1, 1, 2)
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
PROCESSES = [
    *(GaussianDiffusion(prediction=p, variance="fixed-small") for p in ("epsilon", "v", "x0")),
    *(RectifiedFlow(prediction=p, time_shift=s) for p, s in (("v", 1.0), ("x0", 2.0))),
    *(kind(path=path) for kind in (REPAFlow, SiTFlow) for path in ("linear", "cosine")),
    *(SiTFlow(path=path, prediction=p) for path, p in (("linear", "noise"), ("cosine", "score"), ("vp", "v"))),
]


def covariance(correlation):
    return torch.tensor([[0.64, 0.48 * correlation], [0.48 * correlation, 0.36]], dtype=torch.float64)


def best_network(process, spread, center=MEAN):
    """The network that knows the mean of x_0 given x_t, for data N(center, spread)."""

    def denoise(x, t):
        if isinstance(process, GaussianDiffusion):
            alpha_bar = GaussianDiffusion().alphas_cumprod[int(t[0])]
            a, b, at = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), t.long()
        else:
            at = t / process.time_scale
            a, b = 1 - at[0], at[0]
        z = torch.linalg.solve(a * a * spread + b * b * torch.eye(2, dtype=x.dtype), (x.flatten(1) - a * center).T).T
        return process.output_for((center + a * z @ spread).view_as(x), x, at)

    return denoise


def normals(seed, count=COUNT):
    draws = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(count, *SHAPE, generator=draws, dtype=torch.float64)


def data(spread, seed):
    root = torch.linalg.cholesky(spread)
    return (MEAN + normals(seed)().flatten(1) @ root.T).view(COUNT, *SHAPE)


def moments(x):
    x = x.flatten(1)
    return x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)


@pytest.mark.parametrize(
    "process", PROCESSES, ids=lambda p: f"{p.objective}-{getattr(p, 'path', p.to_json().get('prediction'))}"
)
def test_what_a_network_would_give_that_knows_x_0_leads_back_to_it(process):
    x_start, noise = normals(1, 5)(), normals(2, 5)()
    if isinstance(process, GaussianDiffusion):
        t = torch.tensor([0, 3, 500, 900, 999])
        x_t = process.q_sample(x_start, t, noise)
        found = process.predict_x_start(process.output_for(x_start, x_t, t), x_t, t)
    else:
        t = torch.tensor([0.01, 0.2, 0.5, 0.9, process.ends[1]], dtype=torch.float64)
        x_t = process.q_sample(x_start, t, noise)
        velocity = process.velocity(lambda x, _: process.output_for(x_start, x, t), x_t, t)
        torch.testing.assert_close(velocity, process.target(x_start, t, noise))
        found = process.predict_x_start(velocity, x_t, t)
    torch.testing.assert_close(found, x_start)


@pytest.mark.parametrize(
    ("name", "process"),
    [("ddim", PROCESSES[0]), ("ddpm", PROCESSES[1]), ("dpm++", PROCESSES[0]), ("heun", RectifiedFlow())],
)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_variations_of_data_are_data(name, process, share):
    """Whatever the noise they begin with: x_t of data is what the sampler expects to find there."""
    spread = covariance(0.7)
    begun = steps_from(share, process, 200 if name in ("ddim", "ddpm") else 60, None)
    latents = data(spread, 3)
    draw, images = normals(4), np.arange(COUNT)
    start = Variation(latents=latents, first=begun[0]).start(process, draw(), images)
    x = SAMPLERS[name](process, best_network(process, spread), start, draw, steps=len(begun), timesteps=begun)
    mean, found = moments(x)
    assert (mean - MEAN).abs().max() < 0.07
    assert (found - spread).abs().max() < 0.07
    similar = torch.corrcoef(torch.stack([x[:, 0, 0, 0], latents[:, 0, 0, 0]]))[0, 1]
    assert similar > 0.25 or share > 0.3


def test_a_variation_from_all_noise_is_no_longer_of_anything_and_one_from_none_is_refused():
    process, noise = RectifiedFlow(), normals(1, 3)()
    begun = steps_from(1.0, process, 5, None)
    assert begun == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert torch.equal(Variation(latents=noise + 7, first=1.0).start(process, noise, np.arange(3)), noise)
    assert steps_from(0.5, GaussianDiffusion(), 5, None) == (250, 0)
    assert steps_from(0.5, GaussianDiffusion(), 5, (999.0, 400.0)) == (400.0,)
    with pytest.raises(Exception, match="--vary …@0.1 leaves no step to make"):
        steps_from(0.1, process, 5, None)


SAMPLED = [("ddim", PROCESSES[0], 200), ("ddpm", PROCESSES[1], 250), ("dpm++", PROCESSES[2], 40), ("unipc", PROCESSES[0], 40),
           ("heun", RectifiedFlow(), 40), ("dpm++2m", PROCESSES[4], 40), ("euler", RectifiedFlow(), 100)]  # fmt: skip


@pytest.mark.parametrize(("name", "process", "steps"), SAMPLED)
@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_what_is_kept_ends_as_it_is_and_what_is_made_anew_fits_it(name, process, steps, correlation):
    """Independent of it, it has its own distribution; correlated, its mean moves with it, if not all the way."""
    spread = covariance(correlation)
    known = torch.full((1, *SHAPE), 1.3, dtype=torch.float64)  # one standard deviation above the mean
    edit = Inpainting(latents=known, anew=torch.tensor([[False, True]]))
    draw = normals(5)
    denoise = edit.within(process, best_network(process, spread), np.arange(COUNT))
    x = SAMPLERS[name](process, denoise, draw(), draw, steps=steps)
    torch.testing.assert_close(x[:, 0, 0, 0], known.expand(COUNT, -1, -1, -1)[:, 0, 0, 0], rtol=0, atol=1e-5)
    made = x[:, 0, 0, 1]
    conditional = -1.0 + correlation * 0.6  # of N(MEAN, spread), given one deviation more
    if correlation:
        assert -1.0 + 0.5 * correlation * 0.6 < made.mean() < conditional + 0.05
    else:
        assert made.mean() == pytest.approx(-1.0, abs=0.05)
        assert made.std() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(("name", "process", "steps"), SAMPLED)
def test_between_two_gaussian_classes_of_one_covariance_lies_the_gaussian_between_them(name, process, steps):
    """Whatever the process, the sampler and what the network predicts."""
    spread, apart = covariance(0.6), torch.tensor([2.0, -1.0], dtype=torch.float64)
    edit = Interpolation(config=DiTConfig(), to_seed=None, to_class=1, in_a_row=5)
    images, draw = np.full(COUNT, 7), normals(6)  # 2 of 4 steps along its row

    def guided(labels):
        assert len(set(labels.tolist())) == 1
        return best_network(process, spread, MEAN + labels[0] * apart)

    denoise = edit.of_classes(guided, np.zeros(COUNT, dtype=np.int64), images)
    start = edit.start(process, draw(), images)
    mean, found = moments(SAMPLERS[name](process, denoise, start, draw, steps=steps))
    assert (mean - (MEAN + 0.5 * apart)).abs().max() < 0.07
    assert (found - spread).abs().max() < 0.07


def test_a_great_circle_has_both_ends_and_unit_variance_between():
    first, second = torch.eye(2)[:, None, None, :].double()
    share = torch.tensor([0, 1 / 3, 0.5, 1], dtype=torch.float64)[:, None, None, None]
    on_it = slerp(first.expand(4, 1, 1, 2), second.expand(4, 1, 1, 2), share).view(4, 2)
    wanted = [[math.cos(s * math.pi / 2), math.sin(s * math.pi / 2)] for s in (0, 1 / 3, 0.5, 1)]
    torch.testing.assert_close(on_it, torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(slerp(first[None], first[None], share[1:2]), first[None])
    long = normals(1, 2)().new_ones(1, 4, 64, 64).normal_(generator=torch.Generator().manual_seed(1))
    other = torch.empty_like(long).normal_(generator=torch.Generator().manual_seed(2))
    assert slerp(long, other, share[2:3]).std() == pytest.approx(1, abs=0.01)


# ---- the command

FEW = ("--batch-size", 4)


def latents(path):
    return load_file(path)["latents"]


def made(command, path, *arguments, **settings):
    status, said = command("--out", path, *FEW, *arguments, vae=None, **settings)
    assert status == 0, said
    return latents(path)


@pytest.fixture
def given(command, tmp_path):
    made(command, tmp_path / "given.safetensors", "--classes", "2,5", "--samples-per-class", 2)
    return tmp_path / "given.safetensors"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_strip_begins_and_ends_at_image_0_of_both_seeds(command, tmp_path, read_json, sampler):
    rows = ("--classes", "2,5", "--samples-per-class", 4, "--sampler", sampler)
    strip = made(command, tmp_path / "strip.safetensors", *rows, "--seed", 3, "--interpolate", 8)
    alone = ("--classes", 2, "--samples-per-class", 1, "--sampler", sampler, "--seed")
    first, last = (made(command, tmp_path / f"{seed}.safetensors", *alone, seed)[0] for seed in (3, 8))
    np.testing.assert_allclose(strip[0], first, atol=1e-4)
    if sampler == "ddim":  # on the way ddpm draws what --seed says, along the whole row
        np.testing.assert_allclose(strip[3], last, atol=1e-4)
    assert np.abs(strip[4] - strip[0]).max() > 1e-3, "rows are of different classes"
    steps = [np.abs(b - a).mean() for a, b in itertools.pairwise(strip[:4])]
    assert max(steps) < np.abs(strip[3] - strip[0]).mean()
    assert read_json(tmp_path / "strip.safetensors.json")["recipe"]["edit"] == {"kind": "interpolation", "to_seed": 8}


@pytest.mark.parametrize("guidance", [1, 3])
def test_a_strip_goes_from_its_class_to_the_other_and_both_ends_are_those_images(
    command, tmp_path, read_json, guidance
):
    how = ("--sampler", "ddim", "--seed", 3, "--guidance", guidance)
    rows = ("--classes", "2,5", "--samples-per-class", 4, "--interpolate-class", "golden retriever", *how)
    strip = made(command, tmp_path / "strip.safetensors", *rows)
    alone = ("--samples-per-class", 1, *how)
    ends = [made(command, tmp_path / f"{c}.safetensors", "--classes", c, *alone)[0] for c in (2, 5)]
    np.testing.assert_allclose(strip[0], ends[0], atol=1e-4)
    np.testing.assert_allclose(strip[3], ends[1], atol=1e-4)
    np.testing.assert_allclose(strip[4:], np.broadcast_to(ends[1], strip[4:].shape), atol=1e-4)
    assert np.abs(strip[1] - strip[0]).max() > 1e-3 and np.abs(strip[2] - strip[3]).max() > 1e-3
    assert read_json(tmp_path / "strip.safetensors.json")["recipe"]["edit"] == {"kind": "interpolation", "to_class": 5}


def test_a_strip_between_classes_and_seeds_ends_at_the_other_class_of_the_other_seed(command, tmp_path, read_json):
    rows = ("--classes", 2, "--samples-per-class", 3, "--sampler", "ddim", "--seed", 3)
    strip = made(command, tmp_path / "strip.safetensors", *rows, "--interpolate", 8, "--interpolate-class", 5)
    alone = ("--classes", 5, "--samples-per-class", 1, "--sampler", "ddim", "--seed", 8)
    np.testing.assert_allclose(strip[2], made(command, tmp_path / "end.safetensors", *alone)[0], atol=1e-4)
    edit = read_json(tmp_path / "strip.safetensors.json")["recipe"]["edit"]
    assert edit == {"kind": "interpolation", "to_seed": 8, "to_class": 5}


def test_variations_take_the_classes_of_their_latents_and_stay_near_them(command, given, tmp_path, read_json):
    near = made(command, tmp_path / "near.safetensors", "--vary", f"{given}@0.05", "--sampler", "ddim", steps=100)
    far = made(command, tmp_path / "far.safetensors", "--vary", f"{given}@1", "--sampler", "ddim", steps=100)
    assert load_file(tmp_path / "near.safetensors")["label"].tolist() == [2, 2, 5, 5]
    distance = [np.abs(found - latents(given)).mean() for found in (near, far)]
    assert distance[0] < 0.5 * distance[1]
    recipe = read_json(tmp_path / "near.safetensors.json")["recipe"]
    assert (recipe["edit"]["kind"], recipe["edit"]["from_time"], recipe["edit"]["latents"]) == ("variation", 0.05, 4)
    assert recipe["timesteps"][0] <= 0.05 * 999 and recipe["steps"] == len(recipe["timesteps"])
    assert str(tmp_path) not in (tmp_path / "near.safetensors.json").read_text()


def test_where_the_mask_is_black_the_latent_stays(command, given, tmp_path, read_json):
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = made(command, tmp_path / "out.safetensors", "--inpaint", f"{given}@{tmp_path / 'mask.png'}", "--seed", 4)
    np.testing.assert_allclose(found[..., :4], latents(given)[..., :4], atol=1e-3)
    assert np.abs(found[..., 4:] - latents(given)[..., 4:]).mean() > 0.1
    edit = read_json(tmp_path / "out.safetensors.json")["recipe"]["edit"]
    assert edit["kind"] == "inpainting" and len(edit["mask_sha256"]) == len(edit["latents_sha256"]) == 64


def test_what_cannot_be_is_refused_in_a_sentence(command, given, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    save_file({"latents": np.zeros((2, 4, 4, 4), dtype=np.float32)}, tmp_path / "small.safetensors")
    save_file(
        {"latents": np.zeros((1, 4, 8, 8), dtype=np.float32), "label": np.array([9])}, tmp_path / "odd.safetensors"
    )
    for words, message in (
        (("--vary", f"{given}@0.5", "--interpolate", 1), "--vary and --interpolate are two ways to begin; give one"),
        (("--vary", f"{given}@2"), "must be LATENTS@T with 0 < T ≤ 1"),
        (("--vary", str(given)), "must be LATENTS@T"),
        (("--inpaint", str(given)), "must be LATENTS@MASK"),
        (("--inpaint", f"{given}@{tmp_path / 'black.png'}"), "is black everywhere"),
        (("--inpaint", f"{given}@{tmp_path / 'none.png'}"), "cannot be read"),
        (
            ("--vary", f"{tmp_path / 'small.safetensors'}@0.5"),
            "latents [2, 4, 4, 4], but finite ones of shape [N, 4, 8, 8]",
        ),
        (
            ("--vary", f"{tmp_path / 'odd.safetensors'}@0.5"),
            "labels reach from 9 to 9, but the checkpoint's are 0 to 7",
        ),
        (("--vary", f"{tmp_path / 'a.npz'}@0.5"), "must be latents, a .safetensors"),
        (
            ("--interpolate", 1, "--num-samples", 4),
            "--interpolate makes a row of each class; give --samples-per-class 2",
        ),
        (("--vary", f"{given}@0"), "0 < T"),
        (("--interpolate-class", "2", "--num-samples", 4), "--interpolate-class makes a row of each class"),
        (("--interpolate-class", "crane", "--samples-per-class", 2), "--interpolate-class: "),
        (("--inpaint", f"{given}@m.png", "--interpolate-class", "2"), "--inpaint and --interpolate-class are two ways"),
    ):
        status, said = command("--out", tmp_path / "x.npz", *FEW, *words)
        assert (status, message in said) == (2, True), said
    assert not (tmp_path / "x.npz").exists()
