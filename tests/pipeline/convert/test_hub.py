"""Checkpoints are published on the Hub as one commit with a card that says what they are, and load by their name."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save

from pipeline.checkpoint import load_checkpoint, read_checkpoint
from pipeline.checkpoint.folder import write_model_files
from pipeline.checkpoint.release import default_info
from pipeline.convert import __main__
from pipeline.convert import run as convert_run
from pipeline.dit import DiT, DiTConfig
from pipeline.runtime.errors import UserError
from sample.evaluate import report
from tests.fake_hub import TOKEN, Repository, serving

# huggingface_hub's upload of LFS files, to httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")
ROOT = Path(__file__).parents[3]
CONFIG = DiTConfig(input_size=4, hidden_size=64, depth=2, num_heads=4, num_classes=3)
NAME = "someone/digits"
HOSTILE = [
    "</td><script>alert(1)</script>",
    "[click](javascript:alert(1)) | ![x](http://evil.example/x.png) @admin `code`",
    "---\nlicense: mit\n# heading\n\n<img src=x> \x1b[31m *bold* _it_ http://evil.example",
]
RESULT = {
    "format": "dit-evaluation",
    "version": 1,
    "metrics": {"FID-50k": 12.345678, "IS-50k | <b>": 101.0},
    "std": {"FID-50k": 0.25},
    "protocol": {"sampler": "ddim", "steps": 50, "guidance": 1.5, "labels": "balanced"},
    "samples": {"images": {"count": 50000}, "made_by": {"recipe": {"checkpoint": {"step": 40, "weights": "ema"}}}},
    "reference": {"statistics": {"count": 1000}},
}
PNG = b"\x89PNG\r\n\x1a\n of samples"


def write(folder, *, classes=("ant", "bee", "cat"), seed=0, **averages):
    info = {**default_info(CONFIG, classes=list(classes), class_ids=["a", "b", "c"])}
    training = {"batch_size": 256, "lr": 1e-4, "samples": 1797, "views": ["center", "center-hflip"]}
    info |= {"step": 40, "vae": {"name": "demo", "scaling_factor": 0.5}, "training": training}
    folder.mkdir(parents=True)
    model = DiT(CONFIG, seed=seed).state_dict()
    write_model_files(folder, info=info, model=None, averages={"ema": model, **averages})
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "run" / "checkpoints" / "step-0000040")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback, and this process's client logged in there."""
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def run(capsys, monkeypatch):
    """The command in this process: (exit status, what it printed, what it complained about)."""

    def call(source, *flags, to=f"hf:{NAME}", kind="dit"):
        words = ["dit-convert", "--from", str(source), "--to", str(to), "--format", kind, *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        status = __main__.main()
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_checkpoint_is_one_commit_and_loads_by_its_name(checkpoint, hub, run):
    status, out, err = run(checkpoint, "--license", "apache-2.0")
    assert status == 0, err
    repository = hub.repositories[NAME]
    assert sorted(repository.files) == [".gitattributes", "README.md", "config.json", "ema.safetensors"]
    assert repository.commits == ["dit-convert --format dit"] and not repository.private
    assert "README.md: a model card with no scores" in out and "read back: max abs difference 0" in out
    assert f"one commit: {hub.address}/{NAME}/commit/" in err
    ours, _ = load_checkpoint(checkpoint)
    for name in (f"hf:{NAME}", NAME):
        model, config = load_checkpoint(name)
        assert same(model, ours) and config == CONFIG
    assert read_checkpoint(f"hf:{NAME}").info["classes"] == ["ant", "bee", "cat"]
    with pytest.raises(UserError, match=r"has no raw weights; pass --weights ema"):
        read_checkpoint(NAME, weights="raw")


def test_weights_that_are_not_in_the_cache_are_told_from_weights_that_are_nowhere(checkpoint, hub, run, monkeypatch):
    assert run(checkpoint, "--license", "mit")[0] == 0
    with pytest.raises(UserError, match="has no raw weights; pass --weights ema"):
        read_checkpoint(NAME, weights="raw")  # which leaves the settings in the cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the local Hub cache, and the Hub"):
        load_checkpoint(f"hf:{NAME}")


def test_only_the_wanted_weights_are_fetched(checkpoint, hub):
    files = {".gitattributes": b"", "config.json": (checkpoint / "config.json").read_bytes()}
    for name in ("ema", "model", "ema-slow"):
        tensors = {key: tensor + 1 for key, tensor in load_file(checkpoint / "ema.safetensors").items()}
        files[f"{name}.safetensors"] = save(tensors, metadata={"of": name})  # the cache knows contents, not names
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].files = files
    for weights, file in (("raw", "model"), ("slow", "ema-slow"), ("ema", "ema")):
        hub.asked.clear()
        read_checkpoint(NAME, weights=weights)
        fetched = [line for line in hub.asked if line.startswith("GET") and line.endswith(".safetensors")]
        assert [line.rpartition("/")[2] for line in fetched] == [f"{file}.safetensors"]


def test_a_diffusers_folder_is_published_too(checkpoint, hub, run):
    status, _, err = run(checkpoint, "--license", "mit", "--vae", "demo", kind="diffusers")
    assert status == 0, err
    files = hub.repositories[NAME].files
    assert {"README.md", "model_index.json", "transformer/config.json", "vae/config.json"} <= set(files)
    assert b"DiTPipeline.from_pretrained" in files["README.md"] and b"library_name: diffusers" in files["README.md"]
    assert same(load_checkpoint(NAME)[0], load_checkpoint(checkpoint)[0])


def test_what_is_there_is_replaced_as_a_whole_and_only_when_asked(checkpoint, hub, run, tmp_path):
    assert run(checkpoint, "--license", "mit")[0] == 0
    other = write(tmp_path / "other", seed=1, **{"ema-slow": DiT(CONFIG, seed=2).state_dict()})
    before = dict(hub.repositories[NAME].files)
    status, _, err = run(other, "--license", "mit")
    assert (status, "holds files; choose another name, or pass --overwrite" in err) == (2, True)
    assert hub.repositories[NAME].files == before
    assert run(other, "--license", "mit", "--weights", "slow", "--overwrite")[0] == 0
    files = hub.repositories[NAME].files
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "ema-slow.safetensors"]
    assert len(hub.repositories[NAME].commits) == 2
    files["train.py"] = b"mine"
    status, _, err = run(checkpoint, "--license", "mit", "--overwrite")
    assert (status, "is not what a conversion leaves (there is 'train.py')" in err) == (2, True)


def test_a_private_repository_is_made_private_and_nothing_public_is_taken_for_one(checkpoint, hub, run):
    assert run(checkpoint, "--license", "other", "--private")[0] == 0
    assert hub.repositories[NAME].private
    hub.repositories["someone/public"] = Repository()
    status, _, err = run(checkpoint, "--license", "other", "--private", to="hf:someone/public")
    assert (status, "is there and public, so --private cannot hold" in err) == (2, True)


@pytest.mark.parametrize(
    ("word", "code", "message"),
    [("create", 403, "log in with `hf auth login` as someone who may"), ("commit", 403, "or set HF_TOKEN to a token")],
)
def test_what_the_hub_refuses_is_one_sentence_and_leaves_nothing(checkpoint, hub, run, word, code, message):
    hub.refuse = {word: code}
    status, _, err = run(checkpoint, "--license", "mit")
    assert status == 2 and message in err and "Traceback" not in err and TOKEN not in err
    assert word == "create" or list(hub.repositories[NAME].files) == [".gitattributes"]


def test_a_disk_that_is_full_before_the_push_is_one_sentence_and_makes_no_commit(checkpoint, hub, run, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(convert_run._WRITERS, "dit", full)
    status, _, err = run(checkpoint, "--license", "mit")
    assert status == 2 and "the disk is full" in err and "Traceback" not in err
    assert all(repository.commits == [] for repository in hub.repositories.values())


def test_without_a_login_nothing_is_read_or_written(checkpoint, hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    status, _, err = run(checkpoint, "--license", "mit")
    assert (status, "nobody is logged in who could write someone/digits" in err) == (2, True)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("flags", "more", "message"),
    [
        ([], {}, "say under which licence with --license"),
        (["--license", "mit"], {"to": "hf:digits"}, "must be hf:OWNER/NAME"),
        (["--license", "mit"], {"to": "hf:a/../b"}, "must be hf:OWNER/NAME"),
        (["--license", "mit"], {"kind": "facebook"}, "a model card or a repository is for --format dit or diffusers"),
        (["--license", "Apache 2: x"], {}, "is no identifier such as apache-2.0"),
        (["--private"], {"to": "folder"}, "--private is for --to hf:OWNER/NAME"),
        (["--license", "mit"], {"to": "folder"}, "--license is for the model card; pass --model-card too"),
        (["--results", "x"], {"to": "folder"}, "--results is for the model card"),
    ],
)
def test_flags_that_make_no_sense_together_are_one_sentence(run, flags, more, message):
    status, _, err = run("nowhere", *flags, **more)
    assert (status, message in err) == (2, True), err


def card_of(folder):
    text = (folder / "README.md").read_text()
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


def test_the_card_says_what_the_checkpoint_is_how_it_was_made_and_how_well_it_does(checkpoint, run, tmp_path):
    (tmp_path / "RESULT.json").write_text(json.dumps(RESULT))
    (tmp_path / "grid.png").write_bytes(PNG)
    flags = ["--model-card", "--license", "cc-by-4.0", "--results", tmp_path / "RESULT.json"]
    status, _, err = run(checkpoint, *flags, "--picture", tmp_path / "grid.png", to=tmp_path / "digits")
    assert status == 0, err
    front, body = card_of(tmp_path / "digits")
    tags = ["diffusion", "dit", "class-conditional"]
    assert front == {"library_name": "dit-pipeline", "license": "cc-by-4.0", "tags": tags}
    html = MarkdownIt("commonmark").enable("table").render(body)
    for said in (
        '<img src="samples.png" alt="Samples"',
        "<td>width, depth, heads</td>\n<td>64, 2, 4</td>",
        "<td>steps</td>\n<td>40</td>",
        "<td>images seen</td>\n<td>10,240</td>",
        "<td>batch size</td>\n<td>256</td>",
        "<td>images</td>\n<td>1,797</td>",
        "<td>classes</td>\n<td>3: ant, bee, cat</td>",
        "<td>FID-50k</td>\n<td>12.3457</td>\n<td>0.25</td>",
        "Protocol: samples 50000, reference images 1000, sampler ddim, steps 50, guidance 1.5, labels balanced",
        "cc-by-4.0, as stated by who published this.",
        "<td>lr</td>\n<td>0.0001</td>",
    ):
        assert said in html, (said, html)
    assert (tmp_path / "digits" / "samples.png").read_bytes() == PNG
    assert load_checkpoint(tmp_path / "digits")[1] == CONFIG
    assert run(checkpoint, *flags, "--overwrite", to=tmp_path / "digits")[0] == 0, "a card does not make it foreign"
    assert str(tmp_path) not in body


def test_names_from_a_checkpoint_stay_text_in_the_card(tmp_path, run):
    checkpoint = write(tmp_path / "in", classes=HOSTILE)
    (tmp_path / "in" / "result.json").write_text(json.dumps(RESULT))
    status, _, err = run(checkpoint, "--model-card", to=tmp_path / "a_b*c")
    assert status == 0, err
    front, body = card_of(tmp_path / "a_b*c")
    assert sorted(front) == ["library_name", "tags"] and body.isprintable() is False
    assert all(line.isprintable() for line in body.splitlines())
    html = MarkdownIt("commonmark", {"linkify": False}).enable("table").render(body)
    for tag in ("<script", "<b>", "<img", "<a ", "<em>", "<strong>", 'javascript:alert(1)"', "<h1>heading"):
        assert tag not in html, tag
    assert "<h1>a_b*c</h1>" in html and "&lt;/td&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<td>") == 2 * html.count("<tr>\n<td>") + 2, "no name begins a cell of its own"


def test_a_result_of_other_weights_or_that_is_none_and_a_picture_that_is_none_are_refused(checkpoint, run, tmp_path):
    cases = [
        (
            {**RESULT, "samples": {"made_by": {"recipe": {"checkpoint": {"step": 20, "weights": "ema"}}}}},
            "of step 20, but",
        ),
        ({**RESULT, "metrics": {"FID": "good"}}, "but must be a number"),
        ({**RESULT, "format": "x"}, "is no result that this dit-evaluate writes"),
    ]
    for content, message in cases:
        (checkpoint.parents[1] / "RESULT.json").write_text(json.dumps(content))  # beside, in the run's folder
        status, _, err = run(checkpoint, "--model-card", to=tmp_path / "out")
        assert (status, message in err) == (2, True), err
    (checkpoint.parents[1] / "RESULT.json").unlink()
    (tmp_path / "x.png").write_bytes(b"GIF89a")
    for picture, message in ((tmp_path / "x.png", "is no PNG"), (tmp_path / "none.png", "cannot be read")):
        status, _, err = run(checkpoint, "--model-card", "--picture", picture, to=tmp_path / "out")
        assert (status, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_the_card_reads_the_results_that_dit_evaluate_writes():
    """`pipeline` cannot import the stage whose file it reads."""
    assert (RESULT["format"], RESULT["version"]) == (report.FORMAT, report.VERSION)


@pytest.mark.slow
def test_commands_of_their_own_publish_and_sample_by_name(checkpoint, tmp_path):
    with serving() as hub:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub.address}
        environment |= {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_OFFLINE": "0"}

        def command(module, *words):
            done = subprocess.run(
                [sys.executable, "-m", module, *map(str, words)],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done

        to = ["--to", f"hf:{NAME}", "--format", "dit", "--license", "mit", "--private"]
        command("pipeline.convert", "--from", checkpoint, *to)
        assert hub.repositories[NAME].private
        flags = ["--num-samples", "2", "--steps", "2", "--guidance", "1", "--device", "cpu"]
        for source, out in ((f"hf:{NAME}", "fetched.safetensors"), (checkpoint, "local.safetensors")):
            command("sample", "--checkpoint", source, "--out", tmp_path / out, *flags)
        fetched, local = (load_file(tmp_path / f"{name}.safetensors") for name in ("fetched", "local"))
        assert fetched.keys() == local.keys() and all(torch.equal(fetched[name], local[name]) for name in local)
        said = command("pipeline.inspect", f"hf:{NAME}").stdout
        assert "ant" in said
        assert TOKEN not in said
