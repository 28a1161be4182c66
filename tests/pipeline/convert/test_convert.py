"""Conversion: each form into each other computes the same, appears whole or not at all, and is refused by name."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import folder, load_checkpoint, read_checkpoint
from pipeline.checkpoint.diffusers_read import from_diffusers, to_diffusers
from pipeline.checkpoint.diffusers_write import fold_normalization
from pipeline.checkpoint.folder import write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.convert import __main__
from pipeline.convert.features import listed
from pipeline.convert.parity import fix
from pipeline.diffusion import GaussianDiffusion, RectifiedFlow
from pipeline.dit import DiT, DiTConfig
from pipeline.latents.manifest import sealed
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of

CLASSES = [f"class {letter}, the {letter}" for letter in "abcdefghij"]


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A VAE of diffusers as small as they get: four latent channels, down-factor 8."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae") / "small-vae"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=2,
            scaling_factor=0.3,
        )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def released(tmp_path, state):
    """A state dict as the public release leaves it."""
    path = tmp_path / "released.pt"
    torch.save({"ema": state, "model": {name: tensor + 0.01 for name, tensor in state.items()}}, path)
    return path


@pytest.fixture
def ours(tmp_path, state, vae_folder):
    """A checkpoint folder of ours with the same weights, class names and a VAE."""
    from pipeline.vae import load_vae

    config = DiTConfig(input_size=8, hidden_size=64, depth=3, num_heads=4, num_classes=10)
    info = {
        **default_info(config, classes=CLASSES, class_ids=[f"id{k}" for k in range(10)]),
        "step": 123,
        "vae": {**load_vae(str(vae_folder)).describe(), "name": str(vae_folder)},
    }
    folder = tmp_path / "ours"
    folder.mkdir()
    state = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    write_model_files(folder, info=info, model=None, averages={"ema": state})
    return folder


@pytest.fixture
def run(capsys):
    """The command in this process: (exit status, what it printed, what it complained about)."""

    def call(source, target, kind, *flags):
        arguments = ["--from", str(source), "--to", str(target), "--format", kind, *map(str, flags)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["dit-convert", *arguments])
            status = __main__.main()
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def output(model, golden):
    with torch.no_grad():
        return model(golden["forward.x"], golden["forward.t"], golden["forward.y"])


def difference(path, golden, **options):
    model, _ = load_checkpoint(path, **options)
    return float((output(model, golden) - golden["forward.out"]).abs().max())


def test_the_releases_weights_become_ours_with_the_parity_printed(tmp_path, golden, released, run):
    status, out, _ = run(released, tmp_path / "new", "dit", "--num-heads", 4)
    assert status == 0
    assert "read back: max abs difference 0 (below 1e-05)" in out
    assert difference(tmp_path / "new", golden) < 2e-5
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "ema.safetensors"]
    assert not list(tmp_path.glob(".*")), "no work folder is left"


def test_raw_weights_are_converted_on_request(tmp_path, state, released, run):
    assert run(released, tmp_path / "new", "dit", "--num-heads", 4, "--weights", "raw")[0] == 0
    kept = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(kept["x_embedder.proj.bias"], state["x_embedder.proj.bias"] + 0.01)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_ours_become_a_state_dict_that_the_release_loads_strictly(tmp_path, golden, state, ours, run, suffix):
    target = tmp_path / f"for-release{suffix}"
    status, out, _ = run(ours, target, "facebook")
    assert (status, "max abs difference 0 (below" in out) == (0, True)
    tensors = torch.load(target, weights_only=True) if suffix == ".pt" else load_file(target)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {k: v.shape for k, v in state.items()}
    torch.testing.assert_close(tensors, state, rtol=0, atol=1e-6)
    assert difference(target, golden, num_heads=4) < 2e-5


def test_ours_become_a_folder_that_diffusers_opens_and_samples(tmp_path, golden, ours, run):
    from diffusers import DiTPipeline

    status, out, err = run(ours, tmp_path / "pipe", "diffusers")
    assert status == 0, err
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipe")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.get_label_ids(["class c", "the j"]) == [2, 9]
    assert pipeline.vae.config.scaling_factor == 0.3
    generator = torch.Generator().manual_seed(0)
    images = pipeline(class_labels=[2, 9], num_inference_steps=3, guidance_scale=4.0, generator=generator).images
    assert [image.size for image in images] == [(64, 64)] * 2

    def theirs():
        inputs = (golden["forward.x"], golden["forward.t"], golden["forward.y"])
        with torch.no_grad():
            return pipeline.transformer(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample

    assert 0.1 < float((theirs() - golden["forward.out"]).abs().max()) < 1, "the known difference"
    assert "diffusers as it is: max abs difference 0." in out
    fix(pipeline.transformer)
    assert float((theirs() - golden["forward.out"]).abs().max()) < 2e-5
    assert "downscale_freq_shift = 0 and norm3.eps = 1e-6 in every block: max abs difference" in out
    assert "(below 1e-05)" in out


def test_the_exported_scheduler_is_the_process_the_network_was_trained_on(tmp_path, ours, run):
    from diffusers import DDIMScheduler

    process = GaussianDiffusion(prediction="v", schedule="cosine")
    rewrite(ours, diffusion=process.to_json())
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "pipe" / "scheduler")
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), process.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert (scheduler.config.prediction_type, scheduler.config.clip_sample) == ("v_prediction", False)


def rewrite(folder, **changes):
    info = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**info, **changes}))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers' own solver
def test_a_flow_network_is_exported_with_a_scheduler_that_knows_flow(tmp_path, ours, run):
    from diffusers import DiTPipeline

    rewrite(ours, diffusion=RectifiedFlow().to_json())
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipe")
    pipeline.set_progress_bar_config(disable=True)
    pipeline(class_labels=[1], num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    assert read_checkpoint(tmp_path / "pipe").process == RectifiedFlow()


def test_there_and_back_through_diffusers_loses_nothing(tmp_path, ours, vae_folder, run):
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    status, out, _ = run(tmp_path / "pipe", tmp_path / "back", "dit")
    assert status == 0
    assert "diffusers as it is: max abs difference 0." in out
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (ours, tmp_path / "back"))
    assert (before["vae"].pop("name"), after["vae"].pop("name")) == (str(vae_folder), vae_folder.name)
    assert list(after.pop("files")) == ["ema.safetensors"]
    assert after == before, "and the VAE is no longer known by a path"
    assert (tmp_path / "back" / "ema.safetensors").read_bytes() == (ours / "ema.safetensors").read_bytes()


def test_a_pipeline_folder_and_its_transformer_folder_are_checkpoints(tmp_path, golden, ours, run):
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    transformer = tmp_path / "pipe" / "transformer"
    for path in (tmp_path / "pipe", transformer, transformer / "diffusion_pytorch_model.safetensors"):
        assert difference(path, golden) < 2e-5
    info = read_checkpoint(tmp_path / "pipe").info
    assert info["classes"] == CLASSES
    assert info["vae"]["name"] == str(tmp_path / "pipe" / "vae")


def test_pickled_and_sharded_weights_of_diffusers_are_read(tmp_path, golden, ours, run):
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    folder = tmp_path / "pipe" / "transformer"
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = {name: file for file, part in files.items() for name in part}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert difference(folder, golden) < 2e-5
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "../a.safetensors"}}))
    with pytest.raises(UserError, match=r"safetensors file beside it, but names '\.\./a\.safetensors'"):
        load_checkpoint(folder)
    index.unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    assert difference(folder, golden) < 2e-5


def test_settings_of_diffusers_that_make_no_sense_are_one_sentence(tmp_path, ours, run):
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    config = tmp_path / "pipe" / "transformer" / "config.json"
    settings = json.loads(config.read_text())
    for changes, complaint in [
        ({"num_layers": "many"}, "config.json is damaged: num_layers is 'many', but must be a whole"),
        ({"num_layers": 5}, "does not hold a DiT of 5 blocks: missing transformer_blocks.3.attn1"),
        ({"attention_head_dim": 8}, "does not fit its network and is not loaded"),
        ({"norm_type": "ada_norm"}, "with norm 'ada_norm', not the DiT"),
    ]:
        config.write_text(json.dumps({**settings, **changes}))
        with pytest.raises(UserError, match=re.escape(complaint)):
            load_checkpoint(tmp_path / "pipe")
    config.write_text(json.dumps(settings))
    scheduler = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}))
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_dit": {}}))
    with pytest.raises(UserError, match="describes a noise schedule that is not known here"):
        load_checkpoint(tmp_path / "pipe")


def test_embedders_that_differ_between_blocks_are_refused(state):
    config = DiTConfig(input_size=8, hidden_size=64, depth=3, num_heads=4, num_classes=10)
    tensors = to_diffusers(state, config, label_rows=11)
    back = from_diffusers(tensors, depth=3, origin="w")
    assert {name: tensor for name, tensor in state.items() if name != "pos_embed"}.keys() == back.keys()
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(UserError, match=f"its embedders differ between blocks.*block 0: {name}"):
        from_diffusers({**tensors, name: tensors[name] + 1}, depth=3, origin="w")
    del tensors[name]
    with pytest.raises(UserError, match=f"missing {name}; surplus extra"):
        from_diffusers({**tensors, "extra": torch.zeros(1)}, depth=3, origin="w")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conditioning": "adaln"}, "conditioning is adaln, not adaln-zero"),
        ({"input_size": [8, 4]}, "latent is 8×4, not square"),
        ({"qk_norm": True}, "queries and keys are normalised"),
        ({"middle_head": True}, "it has a middle head"),
        ({"head_width": 32}, "it has a wide head"),
        ({"mlp": "swiglu"}, "MLP is SwiGLU"),
        ({"norm": "rms"}, "norms are RMSNorm"),
        ({"rotary": True}, "positions are rotary"),
        ({"value_residual": True}, "mix in the first block's values"),
    ],
)
@pytest.mark.parametrize("kind", ["diffusers", "facebook"])
def test_what_another_form_cannot_hold_is_refused_with_the_reason(tmp_path, run, changes, reason, kind):
    config = DiTConfig(**{"input_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 2, **changes})
    folder = tmp_path / "ours"
    folder.mkdir()
    weights = DiT(config).state_dict()
    write_model_files(folder, info=default_info(config), model=None, averages={"ema": weights})
    target = tmp_path / "new.pt"
    status, _, err = run(folder, target, kind)
    assert status == 2
    assert reason in err
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))


def test_an_unfaithful_conversion_fails_and_leaves_nothing(tmp_path, released, run, monkeypatch):
    original = folder.save_safetensors

    def spoiled(path, tensors):
        original(path, {name: tensor + 0.01 for name, tensor in tensors.items()})

    monkeypatch.setattr(folder, "save_safetensors", spoiled)
    status, _, err = run(released, tmp_path / "new", "dit", "--num-heads", 4)
    assert status == 2
    assert "does not compute the same: max abs difference" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released.pt"]


def test_an_existing_target_is_replaced_only_when_asked_and_only_if_a_conversion_made_it(tmp_path, released, run):
    target = tmp_path / "new"
    heads = ("--num-heads", 4)
    assert run(released, target, "dit", *heads)[0] == 0
    (target / "config.json").write_text("{}")
    status, _, err = run(released, target, "dit", *heads)
    assert (status, "exists; choose another --to, or pass --overwrite" in err) == (2, True)
    assert run(released, target, "dit", *heads, "--overwrite")[0] == 0
    assert load_checkpoint(target)[1].hidden_size == 64
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "one.jpg").touch()
    status, _, err = run(released, precious, "dit", *heads, "--overwrite")
    assert (status, "is not what a conversion leaves" in err) == (2, True)
    status, _, err = run(target, target, "dit", "--overwrite")
    assert (status, "is, or holds, what --from" in err) == (2, True)
    assert load_checkpoint(target)[1].hidden_size == 64


def test_what_no_conversion_made_is_never_replaced(tmp_path, released, ours, vae_folder, run):
    heads = ("--num-heads", 4, "--overwrite")
    diary, vae = tmp_path / "diary", tmp_path / "vae"
    diary.mkdir()
    (diary / "config.json").write_text("{}")
    (diary / "thesis.txt").write_text("years of work")
    shutil.copytree(vae_folder, vae)
    photo = tmp_path / "photo.pt"
    photo.write_text("no weights")
    for target, kind in ((diary, "dit"), (vae, "diffusers"), (photo, "facebook")):
        status, _, err = run(released, target, kind, *heads)
        assert (status, "so it is not replaced" in err) == (2, True), err
    assert (diary / "thesis.txt").read_text() == "years of work" and photo.read_text() == "no weights"
    checkpoint_of_run = tmp_path / "run" / "checkpoints" / "step-0000001"
    shutil.copytree(ours, checkpoint_of_run)
    status, _, err = run(tmp_path / "run", checkpoint_of_run, "dit", "--overwrite")
    assert (status, "is, or holds, what --from" in err) == (2, True)


@pytest.mark.parametrize("kind", ["dit", "facebook", "diffusers"])
def test_one_weight_file_of_a_checkpoint_converts_into_every_form(tmp_path, golden, ours, run, kind):
    shutil.copy(ours / "ema.safetensors", ours / "ema-slow.safetensors")
    shutil.copy(ours / "ema.safetensors", ours / "model.safetensors")
    for file in ("ema", "ema-slow", "model"):
        target = tmp_path / f"{file}.pt" if kind == "facebook" else tmp_path / file
        status, _, err = run(ours / f"{file}.safetensors", target, kind)
        assert status == 0, err
        weights = {"ema-slow": "slow", "model": "raw"}.get(file, file) if kind == "dit" else "ema"
        with torch.no_grad():
            found = output(read_checkpoint(target, weights=weights, num_heads=4).model, golden)
        assert float((found - golden["forward.out"]).abs().max()) < 2e-5
    assert run(ours, tmp_path / "slow", "dit", "--weights", "slow")[0] == 0
    assert (tmp_path / "slow" / "ema-slow.safetensors").is_file()


def test_raw_weights_stay_raw_through_diffusers_and_back(tmp_path, ours, run):
    (ours / "ema.safetensors").rename(ours / "model.safetensors")
    assert run(ours, tmp_path / "pipe", "diffusers", "--weights", "raw")[0] == 0
    assert run(tmp_path / "pipe", tmp_path / "back", "dit")[0] == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


def test_a_full_disk_is_one_sentence_that_names_the_target_and_leaves_nothing(tmp_path, ours, run):
    """The system refuses files beyond 100 kB, as a full disk refuses any."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(path.name for path in tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, allowed[1]))
    try:
        for target, kind in (("new", "dit"), ("new.pt", "facebook"), ("new.safetensors", "facebook")):
            status, _, err = run(ours, tmp_path / target, kind)
            assert status == 2
            assert err.splitlines()[-1].startswith(f"dit-convert: error: cannot write {tmp_path / target}: the file ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_written_weights_may_be_read_by_whom_the_umask_lets(tmp_path, ours, run):
    before = os.umask(0o027)
    try:
        assert run(ours, tmp_path / "new", "dit")[0] == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()} == {0o640}


def test_what_the_releases_format_cannot_say_is_said(tmp_path, ours, run):
    diffusion = GaussianDiffusion(schedule="cosine", prediction="v", steps=500).to_json()
    rewrite(ours, diffusion=diffusion)
    _, _, err = run(ours, tmp_path / "w.pt", "facebook")
    for unsaid in ("its schedule is cosine", "its steps is 500", "its prediction is v"):
        assert unsaid in err


def test_a_transformer_folder_without_its_pipeline_is_a_checkpoint_whose_classes_are_numbers(tmp_path, ours, run):
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    alone = (tmp_path / "pipe" / "transformer").rename(tmp_path / "alone")
    found = read_checkpoint(alone)
    assert found.config == read_checkpoint(ours).config
    assert found.info["classes"] == [str(label) for label in range(found.config.num_classes)]


def test_the_transformer_of_a_pipeline_knows_its_process(tmp_path, ours, run):
    rewrite(ours, diffusion=GaussianDiffusion(prediction="v").to_json())
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    assert read_checkpoint(tmp_path / "pipe" / "transformer").process == GaussianDiffusion(prediction="v")


def test_heads_that_contradict_a_pipeline_are_refused(tmp_path, ours, run):
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    status, _, err = run(tmp_path / "pipe", tmp_path / "new", "dit", "--num-heads", 8)
    assert (status, "--num-heads 8 contradicts" in err) == (2, True)


@pytest.mark.parametrize("kind", ["dit", "diffusers"])
def test_another_vae_than_the_recorded_is_refused(tmp_path, ours, run, kind):
    status, _, err = run(ours, tmp_path / "new", kind, "--vae", "demo")
    assert (status, "its weights or settings differ" in err) == (2, True)
    rewrite(ours, vae={"name": None, "scaling_factor": 1.0}, model=DiTConfig(in_channels=8, input_size=8, hidden_size=64, depth=3, num_heads=4, num_classes=10).to_json())  # fmt: skip
    tensors = load_file(ours / "ema.safetensors")
    tensors["x_embedder.proj.weight"] = torch.zeros(64, 8, 2, 2)
    tensors["final_layer.linear.weight"], tensors["final_layer.linear.bias"] = torch.zeros(64, 64), torch.zeros(64)
    save_file(tensors, ours / "ema.safetensors")
    status, _, err = run(ours, tmp_path / "new", kind, "--vae", "demo")
    assert (status, "has latents of 4 channels and cells of 8 pixels, but 8 channels are needed" in err) == (2, True)


def test_weights_that_are_no_numbers_are_not_converted(tmp_path, released, state, run):
    torch.save({**state, "blocks.1.mlp.fc1.bias": torch.full((256,), float("nan"))}, released)
    status, _, err = run(released, tmp_path / "new", "dit", "--num-heads", 4)
    assert (status, "hold values that are not finite: blocks.1.mlp.fc1.bias" in err) == (2, True)


def test_large_outputs_are_compared_in_their_own_size(tmp_path, ours, run):
    """Rounding grows with the numbers: outputs of some hundreds differ by more than 1e-5 between two faithful networks."""
    tensors = load_file(ours / "ema.safetensors")
    tensors["final_layer.linear.weight"] *= 3000
    save_file(tensors, ours / "ema.safetensors")
    status, out, err = run(ours, tmp_path / "pipe", "diffusers")
    assert status == 0, err
    assert "(below 1e-05 of the largest output, " in out


def test_class_names_may_be_given(tmp_path, released, run):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    assert run(released, tmp_path / "new", "dit", "--num-heads", 4, "--class-names", names)[0] == 0
    assert read_checkpoint(tmp_path / "new").info["classes"] == CLASSES
    names.write_text("only one\n")
    status, _, err = run(released, tmp_path / "other", "dit", "--num-heads", 4, "--class-names", names)
    assert (status, "has 1 lines, but one name per line is needed for each of the 10 classes" in err) == (2, True)


def test_a_vae_that_cannot_be_found_leaves_a_folder_that_takes_one(tmp_path, ours, vae_folder, run):
    from diffusers import AutoencoderKL, DiTPipeline

    rewrite(ours, vae={"name": "somewhere", "scaling_factor": 1.0})
    status, _, err = run(ours, tmp_path / "pipe", "diffusers")
    assert (status, "the folder has no VAE" in err) == (0, True)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    assert DiTPipeline.from_pretrained(tmp_path / "pipe", vae=vae).vae is vae
    assert run(ours, tmp_path / "with", "diffusers", "--vae", vae_folder)[0] == 0
    assert DiTPipeline.from_pretrained(tmp_path / "with").vae.config.scaling_factor == 0.3


def test_a_vae_with_a_shift_is_exported_so_that_the_pipeline_decodes_it_right(tmp_path, ours, run):
    from diffusers import AutoencoderKL

    from pipeline.vae import denormalize, load_vae

    demo = load_vae("demo")
    rewrite(ours, vae=demo.describe())
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    exported = AutoencoderKL.from_pretrained(tmp_path / "pipe" / "vae")
    assert (exported.config.shift_factor, exported.config.scaling_factor) == (None, demo.scaling_factor)
    normalised = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = exported.decode(normalised / exported.config.scaling_factor).sample
        ours_ = demo.model.decode(denormalize(normalised, demo.scaling_factor, demo.shift_factor)).sample
    torch.testing.assert_close(theirs, ours_, rtol=0, atol=1e-4)
    assert read_checkpoint(tmp_path / "pipe").info["vae"] == demo.describe(), "and ours still names the VAE it knew"


def test_a_factor_and_a_shift_per_channel_fold_into_the_layers_beside_the_latent(vae_folder):
    from diffusers import AutoencoderKL

    config = json.loads((vae_folder / "config.json").read_text())
    weights = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    scale, shift = torch.tensor([0.5, 2.0, 1.0, 0.1]), torch.tensor([0.3, -1.0, 0.0, 2.0])
    config_after, folded = fold_normalization(config, weights, scale.tolist(), shift.tolist())
    assert config_after["scaling_factor"] == 1.0
    before = AutoencoderKL.from_pretrained(vae_folder)
    after = AutoencoderKL.from_pretrained(vae_folder)
    after.load_state_dict(folded)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, u = before.encode(pixels).latent_dist, after.encode(pixels).latent_dist
        factors, shifts = scale[:, None, None], shift[:, None, None]
        torch.testing.assert_close(u.mean, (z.mean - shifts) * factors, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(u.std, z.std * factors, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after.decode(u.mean).sample, before.decode(z.mean).sample, rtol=1e-4, atol=1e-5)


def test_features_of_fast_dit_become_a_store_of_points(tmp_path, run):
    from pipeline.latents import LatentStore

    draws = np.random.default_rng(0)
    scaled = draws.standard_normal((7, 1, 4, 4, 4)).astype(np.float32)
    for name in ("some_features", "some_labels"):
        (tmp_path / "fast" / name).mkdir(parents=True)
    for k in range(7):
        np.save(tmp_path / "fast" / "some_features" / f"{k}.npy", scaled[k])
        np.save(tmp_path / "fast" / "some_labels" / f"{k}.npy", np.array([k % 3]))
    names = tmp_path / "names.txt"
    names.write_text("zero\none\ntwo\n")
    status, out, err = run(tmp_path / "fast", tmp_path / "store", "store", "--class-names", names)
    assert status == 0, err
    assert out.startswith("7 points of 4×4×4 in 1 shards, 3 classes, unscaled by 0.18215 (stabilityai/sd-vae-ft-ema)")
    with LatentStore(tmp_path / "store") as store:
        order = store.indices().numpy()
        latents, labels = store[np.arange(7)]
        assert (store.manifest["latent"]["kind"], store.manifest["classes"]) == ("point", ["zero", "one", "two"])
    np.testing.assert_allclose(latents.float().numpy(), scaled[order] / 0.18215, rtol=2e-3)
    assert labels.tolist() == (order % 3).tolist()
    manifest = (tmp_path / "store" / "manifest.json").read_bytes()
    assert run(tmp_path / "fast", tmp_path / "store", "store", "--class-names", names, "--overwrite")[0] == 0
    assert (tmp_path / "store" / "manifest.json").read_bytes() == manifest
    assert run(tmp_path / "fast", tmp_path / "store", "store", "--vae", "demo", "--overwrite")[0] == 0
    with LatentStore(tmp_path / "store") as store:
        assert (len(store), store.manifest["vae"]["name"]) == (7, "demo")
    status, _, err = run(tmp_path / "store", tmp_path / "other", "store")
    assert (status, "holds no latents that are known here; what can become a store is: fast-dit" in err) == (2, True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("label", [[1.5], [1.0], [True], [0, 1], []])
def test_a_label_of_fast_dit_that_is_not_one_whole_number_is_refused(tmp_path, label):
    for kind, value in (("features", np.ones((1, 4, 4, 4), "f4")), ("labels", np.array(label))):
        (tmp_path / "fast" / f"some_{kind}").mkdir(parents=True)
        np.save(tmp_path / "fast" / f"some_{kind}" / "0.npy", value)
    with pytest.raises(UserError, match=r"some_labels/0\.npy holds \w+ \(\d,\), not one whole number"):
        listed(tmp_path / "fast")


def test_a_store_is_replaced_only_by_features_that_were_found_right_and_only_if_an_import_made_it(tmp_path, run):
    for kind, value in (("features", np.ones((1, 4, 4, 4), "f4")), ("labels", np.array([0]))):
        (tmp_path / "fast" / f"some_{kind}").mkdir(parents=True)
        np.save(tmp_path / "fast" / f"some_{kind}" / "0.npy", value)
    store = tmp_path / "store"
    assert run(tmp_path / "fast", store, "store")[0] == 0
    (store / "notes-00001.tar").write_text("mine")
    kept = {path.name: path.read_bytes() for path in store.iterdir()}
    for source, flags in ((tmp_path / "nowhere", ()), (tmp_path / "fast", ("--vae", tmp_path / "no-vae"))):
        assert run(source, store, "store", "--overwrite", *flags)[0] == 2
        assert {path.name: path.read_bytes() for path in store.iterdir()} == kept
    (store / "notes-00001.tar").rename(tmp_path / "notes-00001.tar")
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_bytes(sealed(manifest | {"extraction": {}}))
    status, _, err = run(tmp_path / "fast", store, "store", "--overwrite")
    assert (status, "holds a store that dit-extract made" in err) == (2, True)
    assert (store / "train-00000.safetensors").is_file()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The Hub's local cache, empty, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name, folder):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        (place / "snapshots").mkdir()
        (place / "snapshots" / ("0" * 40)).symlink_to(folder)

    return put


def test_a_hub_name_is_a_checkpoint_through_the_hubs_own_cache(tmp_path, golden, ours, run, hub_cache):
    assert run(ours, tmp_path / "pipe", "diffusers")[0] == 0
    hub_cache("someone/DiT-tiny", tmp_path / "pipe")
    assert difference("someone/DiT-tiny", golden) < 2e-5
    assert run("someone/DiT-tiny", tmp_path / "fetched", "dit")[0] == 0
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="on the Hub is a StableDiffusionPipeline, not a DiTPipeline"):
        load_checkpoint("someone/DiT-tiny")


class HubServer(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that a download uses, over one folder, with a note of every file fetched."""

    folder: Path
    fetched: list[str]
    commit = "1" * 40

    def do_GET(self):
        route = urlsplit(self.path).path
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        names = [str(path.relative_to(self.folder)) for path in files]
        if route.startswith("/api/") and "/tree/" in route:
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": self.etag(path)}
                for name, path in zip(names, files, strict=True)
            ]
            self.answer(json.dumps(tree).encode(), "application/json")
        elif route.startswith("/api/"):
            info = {"id": "someone/DiT-tiny", "sha": self.commit, "siblings": [{"rfilename": n} for n in names]}
            self.answer(json.dumps(info).encode(), "application/json")
        else:
            name = route.split("/resolve/")[1].partition("/")[2]
            if self.command == "GET":
                self.fetched.append(name)
            self.answer((self.folder / name).read_bytes(), "application/octet-stream", self.etag(self.folder / name))

    do_HEAD = do_GET  # noqa: N815 -- the name is the protocol's

    @staticmethod
    def etag(path):
        return sha256_of(path)[:40]

    def answer(self, body, kind, etag="none"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """Serve a folder as the Hub's repository someone/DiT-tiny: a function of it that gives the list of fetched files."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def serve(folder):
        HubServer.folder, HubServer.fetched = folder, []
        return HubServer.fetched

    yield serve
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_the_hub_only_what_is_needed_is_fetched(tmp_path, golden, ours, run, hub_server):
    pipe = tmp_path / "pipe"
    assert run(ours, pipe, "diffusers")[0] == 0
    weights = pipe / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.with_suffix(".fp16.safetensors").write_bytes(weights.read_bytes())
    fetched = hub_server(pipe)
    assert difference("someone/DiT-tiny", golden) < 2e-5
    assert sorted(name for name in fetched if not name.endswith(".json")) == [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    del fetched[:]
    assert difference("someone/DiT-tiny", golden) < 2e-5
    assert fetched == [], "the second time everything is in the cache"


def test_a_hub_repository_with_pickled_weights_alone_is_read_too(tmp_path, golden, ours, run, hub_server):
    pipe = tmp_path / "pipe"
    assert run(ours, pipe, "diffusers")[0] == 0
    weights = pipe / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    hub_server(pipe)
    assert difference("someone/DiT-tiny", golden) < 2e-5


def test_a_vae_in_shards_comes_from_the_hub_without_its_pickles(tmp_path, vae_folder, hub_server):
    from diffusers import AutoencoderKL

    from pipeline.vae import load_vae

    repository = tmp_path / "repository"
    AutoencoderKL.from_pretrained(vae_folder).save_pretrained(repository, max_shard_size="20KB")
    assert len(list(repository.glob("*.safetensors"))) > 1
    (repository / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    fetched = hub_server(repository)
    assert load_vae("someone/DiT-tiny").sha256 == load_vae(str(vae_folder)).sha256
    assert "diffusion_pytorch_model.bin" not in fetched


def test_a_hub_name_offline_gives_one_clear_sentence(run, tmp_path, hub_cache):
    status, _, err = run("facebook/DiT-XL-2-256", tmp_path / "new", "dit")
    assert status == 2
    assert "neither a file or folder facebook/DiT-XL-2-256 here nor could the Hub's repository" in err
    assert len(err.strip().splitlines()) == 1


def test_help_does_not_load_torch_and_names_every_flag():
    code = "import sys; from pipeline.convert.__main__ import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    for flag in ("--from", "--to", "--format", "--weights", "--num-heads", "--overwrite"):
        assert flag in done.stdout
