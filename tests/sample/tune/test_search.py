"""What is tried: lists and ranges of the command line, every combination, and golden sections that find a valley."""

import math

import pytest

from pipeline.runtime.errors import UserError
from sample.tune.judge import _evaluation
from sample.tune.options import TuneOptions
from sample.tune.search import Setting, Space, golden_section, grid_of, search


def space(**settings):
    return TuneOptions(checkpoint="run", reference="ref", out="out", **settings).space


@pytest.mark.parametrize("valley", [1.0, 1.37, 2.2, 4.0])
@pytest.mark.parametrize("function", [lambda d: d * d, abs, lambda d: math.expm1(abs(d)) + 0.1 * d * (d > 0)])
def test_a_golden_section_finds_the_valley_of_a_known_function_to_what_is_left_of_the_range(valley, function):
    asked = []

    def values(places):
        asked.extend(places)
        return [function(place - valley) for place in places]

    found = golden_section(values, 1.0, 4.0, points=12)
    assert len(asked) == 12
    assert abs(found - valley) <= 3.0 * 0.618034**11 + 1e-6
    assert all(1 <= place <= 4 for place in asked)


def test_two_points_are_the_fewest():
    assert golden_section(lambda places: [abs(place) for place in places], 0.0, 1.0, points=2) == pytest.approx(
        0.382, abs=1e-3
    )


def test_lists_are_tried_in_every_combination_and_once_each():
    found = space(
        steps="10,20,10", guidance="1,1.5", sampler="ddim,dpm++", guidance_interval="always,0.2:0.8", weights="raw"
    )
    assert len(found.grid) == 2 * 2 * 2 * 2
    assert found.grid[:2] == tuple(
        Setting(sampler="ddim", steps=10, guidance=scale, interval=None, weights="raw") for scale in (1.0, 1.5)
    )
    assert found.grid[-1] == Setting(sampler="dpm++", steps=20, guidance=1.5, interval="0.2:0.8", weights="raw")
    assert found.starts == found.grid
    assert space().grid == (Setting(),)
    assert [setting.weights for setting in space(sigma="0.05,0.1").grid] == ["sigma=0.05", "sigma=0.1"]


def test_a_range_is_searched_in_every_combination_of_the_lists():
    asked = []
    searched = space(guidance="1:3", steps="10,20")

    def values(settings):
        asked.extend(settings)
        return [abs(setting.guidance - (1.5 if setting.steps == 10 else 2.5)) for setting in settings]

    search(searched, values, points=9)
    assert searched.starts[0] == Setting(steps=10, guidance=2.0)
    for steps, valley in ((10, 1.5), (20, 2.5)):
        scales = [setting.guidance for setting in asked if setting.steps == steps]
        assert len(scales) == 9
        assert min(abs(scale - valley) for scale in scales) < 0.05
        assert all(scale == float(f"{scale:.4g}") for scale in scales)


def test_two_ranges_are_searched_in_turn_until_both_are_near_their_valley():
    asked = set()

    def values(settings):
        asked.update(settings)
        found = [(s.guidance - 1.4 + 2 * (sigma(s) - 0.1), sigma(s) - 0.12) for s in settings]
        return [x * x + 100 * y * y for x, y in found]

    def sigma(setting):
        return float(setting.weights.removeprefix("sigma="))

    search(space(guidance="1:3", sigma="0.02:0.25"), values, points=10)
    best = min(asked, key=lambda setting: values([setting])[0])
    assert best.guidance == pytest.approx(1.36, abs=0.05) and sigma(best) == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": "3:1"}, "--guidance 3:1 must be a list, or a range A:B with 0 ≤ A < B"),
        ({"guidance": "a:b"}, "--guidance a:b must be a list, or a range"),
        ({"guidance": "1,x"}, "--guidance 1,x is no list of values"),
        ({"guidance": "1,-1"}, "--guidance -1.0 must be at least 0"),
        ({"steps": "10,0"}, "--steps 0 must be at least 1"),
        ({"steps": "10,2.5"}, "--steps 10,2.5 is no list of values"),
        ({"guidance_interval": "0.5:0.1"}, "--guidance-interval 0.5:0.1 must be A:B"),
        ({"sigma": "0.1", "weights": "raw"}, "--sigma and --weights both name the weights"),
        ({"points": 1}, "--points 1 must be at least 2"),
        ({"repeat": 0}, "--repeat 0 must be at least 1"),
    ],
)
def test_what_is_no_list_and_no_range_is_refused_with_the_flag(settings, message):
    with pytest.raises(UserError) as refused:
        space(**settings)
    assert message in str(refused.value)


def test_the_last_field_of_a_grid_changes_fastest():
    assert [(s.steps, s.guidance) for s in grid_of(steps=[1, 2], guidance=[3.0, 4.0])] == [
        (1, 3),
        (1, 4),
        (2, 3),
        (2, 4),
    ]
    assert Space(grid=(Setting(),), ranges={"sigma": (0.1, 0.2)}).starts == (Setting(weights="sigma=0.15"),)


def test_each_point_is_evaluated_as_the_search_was_asked_to():
    """What is given here is none of the defaults, and is found again under its own name."""
    same = {"checkpoint": "run", "reference": "ref", "features": "pixels", "inception": "file.pth", "image_size": 24}
    same |= {"num_samples": 77, "labels": "balanced", "vae": "vae", "allow_other_vae": True, "workers": 3}
    of_sampling = {"eta": 0.5, "guide": "other", "guidance_source": "both", "middle_guidance": 1.2}
    of_sampling |= {"guidance_channels": 3, "objective": "flow", "num_heads": 2}
    setting = Setting(sampler="ddim", steps=7, guidance=1.5, interval="0.2:0.8", weights="raw")
    asked = _evaluation(TuneOptions(out="out", **same, **of_sampling), setting, 5)
    reverse = asked.reverse
    same["samples"] = same.pop("checkpoint")
    assert {name: getattr(asked, name) for name in same} == same and asked.weights == "raw"
    assert {name: getattr(reverse, name) for name in of_sampling} == of_sampling
    found = (reverse.sampler, reverse.steps, reverse.guidance, reverse.guidance_interval, reverse.seed)
    assert found == ("ddim", 7, 1.5, "0.2:0.8", 5)
