"""Names with counts, and what is computed of what: on features made up here."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.runtime.errors import UserError
from sample.evaluate.image_set import digest_of, names_of
from sample.evaluate.inputs import Input
from sample.evaluate.metrics import METRICS, MetricSpec, Outcome
from sample.evaluate.options import EvaluateOptions
from sample.evaluate.report import table
from sample.evaluate.scoring import Comparison, Side, compute_scores, count_name, resolve_metrics, warn_of_few

SETTINGS = {"seed": 0, "kid_subsets": 2, "kid_subset_size": 10, "device": "cpu"}


class Rows(list):
    """Blocks of one feature."""

    def rows(self):
        return np.concatenate(self)


def side(count=3000, *, flag="--samples", sorted_by_name=False, **features):
    images = SimpleNamespace(count=count, sorted_by_name=sorted_by_name, describe=dict)
    made = Side(Input(flag=flag, path="x", images=images, statistics=None, made_by=None))
    made.blocks = {name: Rows([rows]) for name, rows in features.items()}
    return made


@pytest.mark.parametrize(
    ("count", "name"), [(50_000, "FID-50k"), (2500, "FID-2500"), (2048, "FID-2048"), (10_000, "FID-10k"), (None, "FID")]
)
def test_a_metric_is_named_with_its_count(count, name):
    assert count_name("fid", count) == name


def test_the_limits_are_2048_for_fid_and_four_for_neighbours():
    assert resolve_metrics(("fid", "sfid"), side(2048), side(2048), asked=True) == ("fid", "sfid")
    with pytest.raises(UserError, match="fid and sfid: at least 2048 images are needed, but --reference x has 2047"):
        resolve_metrics(("fid", "sfid", "kid"), side(), side(2047, flag="--reference"), asked=False)
    with pytest.raises(UserError, match="precision and recall: at least 4 images are needed"):
        resolve_metrics(("precision", "recall"), side(4), side(3), asked=True)
    assert resolve_metrics(("is", "kid"), side(2), side(2), asked=True) == ("is", "kid")


def test_the_inception_score_of_a_folder_does_not_depend_on_its_class_folders():
    """12,000 images in the order of ten classes: splits of 5,000 in that order would hold half of the classes each."""
    logits = np.repeat(np.eye(10) * 100, 1200, axis=0)
    in_order = inception_score_of(side(12_000, logits_unbiased=logits))
    shuffled = inception_score_of(side(12_000, sorted_by_name=True, logits_unbiased=logits))
    assert in_order.value < 6
    assert shuffled.value == pytest.approx(10, rel=0.01)
    assert (shuffled.details["splits"], shuffled.details["order"]) == (3, "shuffled")


def inception_score_of(samples):
    return compute_scores(("is",), Comparison(samples=samples, reference=samples, **SETTINGS))[0]


@pytest.mark.parametrize(
    ("metrics", "read"),
    [(("fid", "sfid"), ["gaussian features_2048", "gaussian spatial"]), (("kid",), ["features"]), (("is",), [])],
)
def test_of_a_file_of_statistics_each_metric_checks_what_it_reads_before_anything_is_computed(metrics, read):
    asked = []
    statistics = SimpleNamespace(
        has_features=True,
        has_gaussian=lambda _feature: True,
        gaussian=lambda feature: asked.append(f"gaussian {feature}"),
        features=lambda: asked.append("features"),
    )
    Side(Input(flag="--reference", path="x.npz", images=None, statistics=statistics, made_by=None)).check(metrics)
    side().check(metrics)  # of images nothing is known yet
    assert asked == read


def test_ten_thousand_images_are_not_few(caplog):
    warn_of_few(("fid", "kid"), side(10_000), side(9_999, flag="--reference"))
    assert [record.message.count("--reference x has 9999") for record in caplog.records] == [1]


def test_many_images_are_named_by_the_first_four():
    named = SimpleNamespace(name_of=lambda index: f"image {index}")
    assert names_of(named, 10, [0, 2]) == "image 10, image 12"
    assert names_of(named, 0, [0, 1, 2, 3]) == "image 0, image 1, image 2, image 3"
    assert names_of(named, 0, [0, 1, 2, 3, 9]) == "image 0, image 1, image 2, image 3 and 1 more"


def test_what_is_asked_in_another_order_is_the_same_work():
    assert digest_of([{"a": 1, "b": {"c": 2, "d": 3}}]) == digest_of([{"b": {"d": 3, "c": 2}, "a": 1}])
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_a_metric_is_one_row_and_shows_wherever_metrics_are_named(monkeypatch):
    """A further row of the table is asked for, checked, computed and reported without another line of code."""
    spec = MetricSpec(
        title="Mean",
        function=lambda compared: Outcome(value=float(compared.samples.features.mean()), details={"of": "all"}),
        features="features_2048",
        compares=False,
        fewest=3,
    )
    monkeypatch.setitem(METRICS, "mean", spec)
    options = EvaluateOptions(samples="a", metrics="mean")
    assert options.wanted == ("mean",)
    rows = np.arange(8.0).reshape(4, 2)
    samples = side(4, features_2048=rows)
    assert samples.needs("mean") == "features_2048"
    with pytest.raises(UserError, match="mean: at least 3 images are needed"):
        resolve_metrics(("mean",), side(2), None, asked=True)
    assert resolve_metrics(("mean",), samples, None, asked=True) == ("mean",)
    (score,) = compute_scores(("mean",), Comparison(samples=samples, reference=samples, **SETTINGS))
    assert (score.name, score.value, score.details) == ("Mean-4", 3.5, {"of": "all"})


def test_the_table_stands_at_its_points():
    lines = table({"FID-50k": 2.5, "IS-50k": 123.25}, {"IS-50k": 1.5}).splitlines()
    assert lines == [
        "metric            value           std",
        "FID-50k        2.500000",
        "IS-50k       123.250000      1.500000",
    ]
