"""What the command names is looked at once; the page is told what each checkpoint can do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.runtime.errors import UserError
from view.__main__ import main
from view.given import describe_network, find_given
from view.options import ViewOptions

ROOT = Path(__file__).parents[2]


def test_runs_of_one_name_are_told_apart_by_their_folders(run, store, tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "run" / "checkpoints").mkdir(parents=True)
    given = find_given(ViewOptions(checkpoint=(f"{tmp_path}/a/run", f"{tmp_path}/b/run/"), latents=(str(store),)))
    assert [one.name for one in given.networks] == ["a/run", "b/run"]
    assert [one.name for one in given.stores] == ["latents"]


def test_a_checkpoint_says_what_it_can_do(run):
    about = describe_network(str(run))
    assert (about["step"], about["model"], about["image_px"]) == (4, "DiT-Ti/2", 64)
    assert about["classes"] == ["class 0", "class 1", "class 2", "class 3"]
    assert about["weights"] == ["ema", "raw", "sigma-0.05", "sigma-0.1"] or about["weights"][0] == "ema"
    assert about["sigmas"] == [0.05, 0.1]
    assert [one["name"] for one in about["samplers"]] == ["ddpm", "ddim", "dpm++", "unipc"]
    assert about["samplers"][2]["most"] == 999
    assert (about["sampler"], about["steps"], about["can_guide"], about["middle"]) == ("dpm++", 20, True, False)


def test_weights_that_came_alone_are_described_too(run, tmp_path):
    save_file(load_file(run / "checkpoints" / "step-0000004" / "ema.safetensors"), tmp_path / "alone.safetensors")
    about = describe_network(str(tmp_path / "alone.safetensors"))
    assert (about["sigmas"], about["classes"], about["can_guide"]) == ([], ["0", "1", "2", "3"], True)
    assert not find_given(ViewOptions(checkpoint=(f"{tmp_path}/alone.safetensors",))).networks[0].is_run


def test_a_run_behind_a_url_is_sampled_from_as_one_on_a_disk(run, s3, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for file in (run / "checkpoints" / "step-0000004").rglob("*"):
        if file.is_file():
            s3.files().pipe_file(f"{s3.bucket}/run/{file.relative_to(run)}", file.read_bytes())
    given = find_given(ViewOptions(checkpoint=(f"{s3.url}/run",)))
    (network,) = given.networks
    assert (network.name, network.is_run, network.steps()) == ("run", False, {})
    about = describe_network(network.place(None))
    assert (about["step"], about["classes"][3]) == (4, "class 3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is nothing to show"),
        (("--checkpoint", "{tmp}/none"), "does not exist"),
        (("--checkpoint", "{store}"), "is a latent store; name it with --latents"),
        (("--latents", "{tmp}"), "is no latent store"),
        (("--latents", "{store}", "--data", "/nowhere"), "--data /nowhere does not exist"),
        (("--checkpoint", "http://127.0.0.1:9/run"), "127.0.0.1:9"),
        (("--latents", "{store}", "--port", "70000"), "--port 70000 must be"),
        (("--latents", "{store}", "--host", ""), "--host is empty"),
        (("--latents", "{store}", "--host", "203.0.113.7"), "cannot be listened at"),
        (("--latents", *["{store}"] * 65), "--latents names 65 things"),
        (("--latents", "{store}", "--share"), "unknown flag --share"),
    ],
)
def test_what_is_wrong_is_one_sentence(words, said, store, tmp_path, capsys, quick_urls):
    assert main([word.format(store=store, tmp=tmp_path) for word in words]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_a_step_that_is_gone_is_one_sentence(given):
    with pytest.raises(UserError, match="no checkpoint at step 7 .any more.; choose another"):
        given.networks[0].place(7)


def test_several_processes_of_a_launcher_are_refused(store, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--latents", str(store), "--port", "0"]) == 2
    assert "start it without accelerate launch or torchrun" in capsys.readouterr().err


def test_help_loads_neither_torch_nor_the_server():
    code = (
        "import sys, view.__main__ as page\n"
        "try: page.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'aiohttp', 'gradio', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--checkpoint RUN" in done.stdout
