"""Which class each image shows."""

import re

import numpy as np
import pytest

from pipeline.runtime.errors import UserError
from sample.labels import KnownClasses, choose_labels
from sample.options import ImageOptions

KNOWN = KnownClasses(count=3, names=("ant", "bee", "cat"), ids=("a", "b", "c"))


def labels(seed=0, known=KNOWN, **options):
    return choose_labels(ImageOptions(**options), known, seed=seed)


def test_by_class_gives_rows_of_each_class_in_the_order_asked_for():
    chosen = labels(classes="cat,0", samples_per_class=2)
    assert chosen.values.tolist() == [2, 2, 0, 0]
    assert chosen.rule["rule"] == "by-class"
    assert chosen.rule["samples_per_class"] == 2


def test_that_many_classes_are_drawn_is_said_before_it_takes_its_time(monkeypatch):
    monkeypatch.setattr("sample.labels._SOON_DRAWN", 9)
    said = []
    monkeypatch.setattr("sample.labels.say", said.append)
    assert labels(num_samples=9).rule["rule"] == "random" and not said
    assert labels(num_samples=10).rule["rule"] == "random"
    assert said == ["drawing the classes of 10 samples; a million take some seconds"]


def test_without_a_word_every_class_is_shown_eight_times():
    assert labels().values.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_of_many_classes_a_plain_command_shows_eight_drawn_by_the_seed():
    many = KnownClasses(count=1000)
    first, second = labels(known=many), labels(known=many, seed=1)
    assert len(set(first.values.tolist())) == 8
    assert len(first) == 64
    assert set(first.values.tolist()) != set(second.values.tolist())


def test_a_random_label_depends_on_the_seed_and_its_own_number_alone():
    few, many = labels(num_samples=7, labels="random"), labels(num_samples=300)
    assert (many.values[:7] == few.values).all()
    assert (labels(num_samples=300, seed=1).values != many.values).any()


def test_random_labels_are_uniform():
    counts = np.bincount(labels(num_samples=30_000).values)
    assert np.abs(counts - 10_000).max() < 4 * np.sqrt(30_000 * 2 / 9)


def test_balanced_labels_take_each_class_in_turn():
    assert labels(num_samples=5, labels="balanced").values.tolist() == [0, 1, 2, 0, 1]
    assert labels(num_samples=4, labels="balanced", classes="2,1").values.tolist() == [2, 1, 2, 1]


def test_padding_repeats_the_last_label():
    assert labels(num_samples=5, labels="balanced").of_batch(3, 4).tolist() == [0, 1, 1, 1]


def test_labels_come_from_a_text_file_an_npy_or_an_npz(tmp_path):
    (tmp_path / "l.txt").write_bytes(b"\xef\xbb\xbfcat\r\n\r\n0\r\nb\r\n")  # as Windows writes it
    np.save(tmp_path / "l.npy", np.array([2, 0, 1], dtype=np.int32))
    np.savez(tmp_path / "l.npz", np.zeros(3), np.array([2, 0, 1]))
    for name in ("l.txt", "l.npy", "l.npz"):
        assert labels(labels=str(tmp_path / name)).values.tolist() == [2, 0, 1]
    assert labels(labels=str(tmp_path / "l.txt"), num_samples=2).values.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("0\n1\n", {"num_samples": 3}, "holds 2 labels, but 3 are needed"),
        ("", {}, "holds 0 labels"),
        ("dog\n9\n", {}, "class 'dog' is unknown.*class 9 is not a label"),
    ],
)
def test_a_bad_label_file_is_refused_with_what_is_wrong(tmp_path, content, options, message):
    (tmp_path / "l.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        labels(labels=str(tmp_path / "l.txt"), **options)


@pytest.mark.parametrize(("wrong", "more"), [(5, None), (6, 1), (8, 3)])
def test_of_many_wrong_labels_the_first_five_are_named_and_the_others_counted(tmp_path, wrong, more):
    (tmp_path / "l.txt").write_text("\n".join(f"dog{number}" for number in range(wrong)))
    with pytest.raises(UserError) as raised:
        labels(labels=str(tmp_path / "l.txt"))
    assert re.findall(r"'dog(\d)'", str(raised.value)) == list("01234")
    assert re.findall(r"and (\d+) more", str(raised.value)) == ([str(more)] if more else [])


def test_label_arrays_of_another_kind_or_range_are_refused(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros(3))
    np.save(tmp_path / "far.npy", np.array([0, 3]))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    for name, message in (
        ("f", "float64"),
        ("far", "0 to 3, but the checkpoint's are 0 to 2"),
        ("object", "Python objects"),
    ):
        with pytest.raises(UserError, match=message):
            labels(labels=str(tmp_path / f"{name}.npy"))
    with pytest.raises(UserError, match="neither random nor balanced nor a file"):
        labels(labels=str(tmp_path / "missing.txt"))


def test_an_unconditional_network_has_samples_but_no_classes():
    assert labels(known=KnownClasses(count=0), num_samples=3).values.tolist() == [-1] * 3
    with pytest.raises(UserError, match="--classes asks for classes, but this checkpoint is unconditional"):
        labels(known=KnownClasses(count=0), classes="0")


def test_more_images_than_one_job_may_have_are_refused_before_their_labels_are_made():
    with pytest.raises(UserError, match="20000000 images of each of 3 classes are 60000000, more than the 20000000 of"):
        labels(samples_per_class=20_000_000)
