"""What the page samples is what dit-sample samples, and can be watched and stopped on its way."""

import json
import shlex
from io import BytesIO

import msgspec
import numpy as np
import pytest
from PIL import Image

from pipeline.runtime.cli import parse_options
from pipeline.runtime.errors import UserError
from sample.__main__ import main
from sample.options import SampleOptions
from view import sampling as view_sampling
from view.given import NetworkChoice, describe_network, find_given
from view.jobs import Job
from view.options import ViewOptions
from view.sampling import NOTHING_YET, SampleRequest, command_of, options_for, sampling

QUICK = {"steps": 3, "samples_per_class": 2, "classes": "class 1, 3"}
NEWEST = NetworkChoice(network=0)


def finished(request, given, options):
    job = Job(*sampling(request, given, options))
    job.run()
    return job


@pytest.mark.parametrize(
    ("asked", "step", "words"),
    [
        ({"networks": (NEWEST,)}, 4, []),
        (
            {"networks": (NetworkChoice(network=0, step=2, weights="raw"),), "sampler": "ddim", "seed": -7},
            2,
            ["--weights", "raw", "--sampler", "ddim", "--seed", "-7"],
        ),
        (
            {"networks": (NetworkChoice(network=0, step=4, weights="sigma=0.08"),), "guidance": 1.0},
            4,
            ["--weights", "sigma=0.08", "--guidance", "1"],
        ),
        (
            {"networks": (NEWEST,), "source": "network", "guide": NetworkChoice(network=0, step=2, weights="raw")},
            4,
            ["--guide", "{run}/checkpoints/step-0000002@raw"],
        ),
        ({"networks": (NEWEST,), "sampler": "dpm++", "guidance": 1.5}, 4, ["--sampler", "dpm++", "--guidance", "1.5"]),
    ],
    ids=["plain", "raw weights of a step", "any average", "another checkpoint guides", "sampler and scale"],
)
def test_picture_and_sidecar_are_byte_for_byte_those_of_dit_sample(asked, step, words, given, options, run, tmp_path):
    job = finished(SampleRequest(**{**QUICK, **asked}), given, options)
    assert (job.state, job.sentence) == ("done", "")
    out, checkpoint = tmp_path / "samples.png", f"{run}/checkpoints/step-{step:07d}"
    same = ["--classes", "class 1,3", "--samples-per-class", "2", "--steps", "3", "--device", "cpu"]
    more = [word.format(run=run) for word in words]
    assert main(["--checkpoint", checkpoint, "--out", str(out), *same, *more]) == 0
    assert job.pictures[0].files == {
        "samples.png": out.read_bytes(),
        "samples.png.json": out.with_name("samples.png.json").read_bytes(),
    }
    assert job.pictures[0].png == out.read_bytes()


def test_a_flow_without_classes_guided_by_its_middle_head_is_sampled_too(flow_run, tmp_path):
    options = ViewOptions(checkpoint=(str(flow_run),), device="cpu")
    given, about = find_given(options), describe_network(str(flow_run))
    assert (about["classes"], about["can_guide"], about["middle"]) == ([], False, True)
    assert [one["name"] for one in about["samplers"]] == ["heun", "euler", "sde", "dpm++2m"]
    assert (about["sampler"], about["steps"]) == ("dpm++2m", 20)
    request = SampleRequest(
        networks=(NEWEST,), samples_per_class=5, steps=2, sampler=about["sampler"], source="middle", guidance=1.4
    )
    job = finished(request, given, options)
    assert (job.state, job.sentence) == ("done", "")
    out = tmp_path / "samples.png"
    words = ["--samples-per-class", "5", "--steps", "2", "--sampler", "dpm++2m", "--guidance-source", "middle"]
    assert main(["--checkpoint", str(flow_run), "--out", str(out), *words]) == 0
    assert job.pictures[0].files["samples.png"] == out.read_bytes()


def test_the_command_shown_asks_for_the_very_same(given, options):
    request = SampleRequest(
        networks=(NetworkChoice(network=0, step=2, weights="sigma=0.08"),),
        classes="class 1,--x y",
        seed=-3,
        sampler="ddim",
        guidance=0.0,
        source="network",
        guide=NetworkChoice(network=0, step=4, weights="raw"),
    )
    asked = options_for(request, request.networks[0], given, options)
    words = shlex.split(command_of(asked))
    assert words[0] == "dit-sample"
    assert parse_options(SampleOptions, words[1:], prog="dit-sample", description="") == asked


def test_every_cell_shows_the_expected_image_on_the_way_and_is_grey_before(given, options, monkeypatch):
    monkeypatch.setattr(view_sampling, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(view_sampling, "PAUSE_TIMES", 0.0)
    states = []
    job = Job(*sampling(SampleRequest(networks=(NEWEST,), **{**QUICK, "samples_per_class": 4}), given, options))
    job.show = lambda number, png: states.append(np.asarray(Image.open(BytesIO(png))))
    job.run()
    assert job.state == "done"
    grey = [np.mean((state == NOTHING_YET).all(-1)) for state in states]
    assert grey[0] > 0.5
    assert sorted(grey, reverse=True) == grey, "cells fill one lane after the other"
    assert grey[-1] < 0.02
    assert len({state.tobytes() for state in states}) > 6, "four lanes of three steps, seen at every step"


def test_padding_of_a_batch_is_never_seen_as_another_image(given, options, monkeypatch):
    monkeypatch.setattr(view_sampling, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(view_sampling, "PAUSE_TIMES", 0.0)
    # 10 images in lanes of 3: the last lane is filled up with two copies
    request = SampleRequest(networks=(NEWEST,), classes="0,1", samples_per_class=5, steps=2)
    states = []
    job = Job(*sampling(request, given, options))
    job.show = lambda number, png: states.append(png)
    job.run()
    assert job.state == "done"
    last_seen, result = (np.asarray(Image.open(BytesIO(state))) for state in states[-2:])
    np.testing.assert_array_equal(last_seen, result)


def test_several_checkpoints_start_from_the_same_noise(given, options):
    choices = (NetworkChoice(network=0, step=2), NetworkChoice(network=0, step=4), NetworkChoice(network=0, step=2))
    job = finished(SampleRequest(networks=choices, **QUICK), given, options)
    first, other, again = (picture.files["samples.png"] for picture in job.pictures)
    assert first == again
    assert first != other
    assert [picture.title for picture in job.pictures] == ["run, step 2, ema", "run, step 4, ema", "run, step 2, ema"]
    steps = [json.loads(picture.files["samples.png.json"])["recipe"]["checkpoint"]["step"] for picture in job.pictures]
    assert steps == [2, 4, 2]


def test_a_job_stops_at_its_next_step_and_keeps_what_was_seen(given, options):
    job = Job(*sampling(SampleRequest(networks=(NEWEST,), **{**QUICK, "steps": 1000}), given, options))
    told = job.progress

    def stop_at_once(share, sentence):
        if "steps" in sentence:
            job.stop()
        told(share, sentence)

    job.progress = stop_at_once
    job.run()
    assert job.state == "stopped"
    assert job.share < 0.1
    assert job.pictures[0].version > 0
    assert job.pictures[0].files == {}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"classes": "clas 1"}, "class 'clas 1' is unknown; did you mean class 1"),
        ({"samples_per_class": 64, "classes": "", "networks": (NEWEST, NEWEST)}, "more than the 256 that this page"),
        ({"sampler": "euler"}, "--sampler euler does not fit this checkpoint's process"),
        ({"source": "middle"}, "needs a middle head"),
        ({"networks": (NetworkChoice(network=0, weights="nothing"),)}, "has no nothing weights"),
    ],
)
def test_what_cannot_be_sampled_is_one_sentence(asked, said, given, options):
    job = finished(SampleRequest(**{"networks": (NEWEST,), **QUICK, **asked}), given, options)
    assert job.state == "failed"
    assert said in job.sentence


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"networks": (NetworkChoice(network=5),)}, "there is no checkpoint number 5"),
        ({"networks": (NetworkChoice(network=0, step=3),)}, "has no checkpoint at step 3"),
        ({"source": "network"}, "choose the checkpoint to guide away from"),
    ],
)
def test_what_is_not_there_is_refused_before_it_waits(asked, said, given, options):
    with pytest.raises(UserError, match=said):
        sampling(SampleRequest(**{"networks": (NEWEST,), **asked}), given, options)


@pytest.mark.parametrize("weights", ["../raw", "/etc/passwd", "", "a" * 65, "ema\n", "-x", "a b", "é"])
def test_weights_are_a_plain_word(weights):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"networks": [{"network": 0, "weights": weights}]}, SampleRequest)
