"""The options of `dit-evaluate`: what contradicts itself is refused before anything is loaded."""

import pytest

from pipeline.runtime.errors import UserError
from sample.evaluate.options import EvaluateOptions


def refusal(**settings):
    with pytest.raises(UserError) as caught:
        EvaluateOptions(**settings)
    return str(caught.value)


def test_metrics_are_known_names_in_the_order_of_the_report():
    assert EvaluateOptions(samples="a", reference="b", metrics="KID, fid").wanted == ("fid", "kid")
    assert EvaluateOptions(samples="a", reference="b").wanted == ("fid", "sfid", "is", "precision", "recall")
    message = refusal(samples="a", reference="b", metrics="fdi,recal")
    assert "'fdi' (did you mean fid?)" in message
    assert "'recal' (did you mean recall?)" in message
    assert "unknown nothing" in refusal(samples="a", reference="b", metrics=",")


def test_what_is_missing_is_named():
    assert "--samples is missing" in refusal()
    assert "--samples is missing" in refusal(reference="b")
    assert "--reference is missing" in refusal(samples="a")
    assert EvaluateOptions(samples="a", metrics="is").wanted == ("is",)


def test_a_reference_can_be_all_that_is_asked_for():
    assert EvaluateOptions(samples="a", make_reference="x.npz").only_makes_reference
    assert EvaluateOptions(reference="a", make_reference="x.npz").only_makes_reference
    assert not EvaluateOptions(samples="a", reference="b", make_reference="x.npz").only_makes_reference
    assert not EvaluateOptions(samples="a", metrics="is", make_reference="x.npz").only_makes_reference


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": "r.txt"}, "--out r.txt must end in .json"),
        ({"make_reference": "r"}, "--make-reference r must end in .npz"),
        ({"image_size": 0}, "--image-size 0 must be at least 1"),
        ({"kid_subset_size": 1}, "--kid-subset-size 1 must be at least 2"),
        ({"reference_features": True}, "give both"),
    ],
)
def test_settings_out_of_range_name_their_flag(settings, words):
    assert words in refusal(samples="a", reference="b", **settings)


@pytest.mark.parametrize(
    "settings",
    [{"image_size": 1}, {"kid_subsets": 1}, {"kid_subset_size": 2}, {"num_samples": 1}, {"workers": 1}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_least_that_a_setting_may_be_is_taken(settings):
    options = EvaluateOptions(samples="a", reference="b", **settings)
    (name, value), *_ = settings.items()
    assert getattr(options, name) == value


def test_files_of_the_right_names_are_taken():
    options = EvaluateOptions(samples="a", reference="b", out="r.json", make_reference="m.npz", reference_features=True)
    assert (options.out, options.make_reference) == ("r.json", "m.npz")
    assert options.wanted
