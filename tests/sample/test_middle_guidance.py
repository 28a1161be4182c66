"""Guidance from the middle head: `--guidance-source middle|both`."""

import numpy as np
import pytest
import torch

from pipeline.diffusion.guidance import MiddleHead, guided
from tests.pipeline.dit.test_model import inputs, lively, tiny
from tests.sample.test_guide import FEW, made


@pytest.fixture(scope="module")
def headed(make_checkpoint):
    return make_checkpoint("headed", depth=3, middle_head=True)


def test_the_middle_head_guides_in_one_pass_on_the_batch_itself_and_its_variance_stays_the_networks():
    model = lively(tiny(depth=3, middle_head=True))
    x, t, y = inputs(model.config)
    passes = []
    model.x_embedder.register_forward_hook(lambda _module, arguments, _output: passes.append(len(arguments[0])))
    with torch.no_grad():
        found = guided(MiddleHead(model, y), scale=1.7)(x, t)
        assert passes == [len(x)]
        final, middle = model.forward_with_middle(x, t, y)
        torch.testing.assert_close(found[:, :4], middle[:, :4] + 1.7 * (final[:, :4] - middle[:, :4]))
        assert torch.equal(found[:, 4:], final[:, 4:])
        assert torch.equal(guided(MiddleHead(model, y), scale=1.0)(x, t), model(x, t, y))


def test_scale_1_is_no_guidance_and_the_default_is_the_papers(command, tmp_path, headed):
    def sampled(name, *arguments):
        return made(command, tmp_path / f"{name}.safetensors", *arguments, checkpoint=headed)

    plain = sampled("plain", "--guidance", 1)
    middle = ("--guidance-source", "middle")
    assert np.array_equal(plain, sampled("one", *middle, "--guidance", 1))
    assert np.array_equal(sampled("default", *middle), sampled("said", *middle, "--guidance", 1.4))
    assert not np.array_equal(plain, sampled("again", *middle))


def test_both_is_the_class_where_the_middle_is_1_and_the_middle_where_the_class_is_1(command, tmp_path, headed):
    def sampled(name, *arguments):
        return made(command, tmp_path / f"{name}.safetensors", *arguments, checkpoint=headed)

    both = ("--guidance-source", "both", "--guidance")
    np.testing.assert_allclose(
        sampled("class", "--guidance", 2), sampled("both", *both, 2, "--middle-guidance", 1), rtol=1e-5, atol=1e-5
    )
    assert np.array_equal(
        sampled("middle", "--guidance-source", "middle", "--guidance", 1.4), sampled("both of 1", *both, 1)
    )
    assert not np.array_equal(sampled("class again", "--guidance", 2), sampled("both again", *both, 2))


def test_an_unconditional_network_can_be_guided_by_its_middle(command, tmp_path, make_checkpoint):
    alone = make_checkpoint("alone", depth=3, middle_head=True, num_classes=0)
    plain = made(command, tmp_path / "plain.safetensors", checkpoint=alone)
    led = made(command, tmp_path / "led.safetensors", "--guidance-source", "middle", checkpoint=alone)
    assert not np.array_equal(plain, led)


def test_the_sidecar_records_the_source_and_says_nothing_of_it_without(command, tmp_path, headed, read_json):
    for name, arguments, wanted in (
        ("class", (), {}),
        ("middle", ("--guidance-source", "middle"), {"guidance_source": "middle"}),
        ("both", ("--guidance-source", "both"), {"guidance_source": "both", "middle_guidance": 1.4}),
    ):
        status, said = command("--out", tmp_path / f"{name}.npz", *FEW, *arguments, checkpoint=headed)
        assert status == 0
        recipe = read_json(tmp_path / f"{name}.npz.json")["recipe"]
        assert {key: recipe[key] for key in recipe.keys() & {"guidance_source", "middle_guidance"}} == wanted
        assert ("middle head" in said) == (name != "class")


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, ("--guidance-source", "middle"), "--guidance-source middle needs a middle head, which"),
        ({"middle_head": True}, ("--guidance-source", "both", "--guide", "x"), "two sources to guide from; give one"),
        (
            {"middle_head": True, "class_dropout_prob": 0.0},
            ("--guidance-source", "both"),
            "--guidance-source both needs classes and a null class",
        ),
    ],
)
def test_a_source_that_is_not_there_is_refused(command, tmp_path, make_checkpoint, fields, arguments, message):
    checkpoint = make_checkpoint("refused", **fields)
    arguments = tuple(checkpoint if word == "x" else word for word in arguments)
    status, said = command("--out", tmp_path / "a.npz", *FEW, *arguments, checkpoint=checkpoint)
    assert status == 2
    assert message in said
    assert not (tmp_path / "a.npz").exists()
