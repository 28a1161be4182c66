"""Sampling, encoding, decoding, judging and previews on a GPU, seen without one: what waits, what is copied and held."""

import pytest

from tests.fake_cuda.runs import GIB, MARKS, findings

pytestmark = MARKS


@pytest.fixture(scope="module")
def traced(guard):
    return findings("inference.py", guard)


def beyond(found):
    """GiB at the peak beside what was there before."""
    return (found["peak"] - found["fixed"]) / GIB


def waits(found):
    return sum(found["reads"].values()) + sum(found["uploads"].values())


def test_no_sampler_waits_in_a_step(traced):
    assert {"ddpm", "ddim", "dpm++", "unipc", "euler", "heun", "sde", "dpm++2m"} <= traced["samplers"].keys()
    for name, (four, five) in traced["samplers"].items():
        assert five["kernels"] > four["kernels"] and waits(five) == waits(four), name


def test_no_way_of_guiding_or_editing_waits_in_a_step(traced):
    """Neither an interval nor a mask, another network or the middle head: what they need is sent once."""
    assert len(traced["ways"]) == 16
    for name, (four, five) in traced["ways"].items():
        assert five["kernels"] > four["kernels"] and waits(five) == waits(four), name


def test_a_number_that_every_step_uploads_is_found(guard):
    four, five = findings("inference.py", guard, "upload")
    assert waits(five) == waits(four) + 1


@pytest.mark.parametrize("what", ["decoder", "encoder", "feature networks"])
def test_a_pass_is_copied_to_the_host_once_and_sent_once_at_most(traced, what):
    for name, found in traced[what].items():
        assert sum(found["reads"].values()) == 1, (name, found["reads"])
        assert sum(found["uploads"].values()) <= 1, (name, found["uploads"])


def test_a_lanes_memory_does_not_grow_with_the_image_and_stays_below_its_bound(traced):
    """16 images decoded and 32 encoded at 256 px in float32, a quarter of them at 512; three images of a preview."""
    for what, most in (("decoder", 3.1), ("encoder", 5.2)):
        assert beyond(traced[what]["512"]) == pytest.approx(beyond(traced[what]["256"]), rel=0.01)
        assert beyond(traced[what]["256"]) < most
    assert beyond(traced["feature networks"]["FID"]) < 0.5
    assert beyond(traced["previews"]["512"]) < 0.8 and beyond(traced["previews"]["256"]) < 0.8  # of 16 images


def test_the_formulas_of_sampling_lanes_and_previews_are_what_is_traced_to_5_percent(traced):
    compared = traced["fits"] | traced["previews"]
    assert len(compared) == 18
    off = {name: found["formula"] / found["peak"] for name, found in compared.items()}
    assert {name: ratio for name, ratio in off.items() if not 0.95 < ratio < 1.05} == {}


def test_the_vaes_values_keep_their_order_where_channels_last_would_copy_them_at_every_norm_and_convolution(traced):
    last = traced["channels last"]
    assert traced["decoder"]["256"]["layouts"] < 0.01 * last["decoder"]["layouts"]
    assert traced["encoder"]["256"]["layouts"] < 0.01 * last["encoder"]["layouts"]
