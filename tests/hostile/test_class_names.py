"""Two classes of one name, and a name of a million characters: told by label, and shown shortened."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from extract.class_names import class_names
from pipeline.checkpoint.info import read_info
from pipeline.classes import MOST_SHOWN, describe_class, find_class, find_classes, short_name
from pipeline.image_grid import can_be_drawn, grid
from pipeline.inspect.store import counts_of
from pipeline.inspect.tables import shortened, table
from pipeline.latents.manifest import parse_manifest
from pipeline.runtime.errors import UserError
from sample.labels import KnownClasses
from sample.resolve import SamplingJob
from tests.hostile.test_mutants import CONFIG, MANIFEST, MODEL

LONG = "n" * 10**6
CLASSES = {"classes": ["ant", "ant", LONG, LONG], "class_ids": ["a", "a", LONG, LONG[1:]]}
pytestmark = pytest.mark.timeout(20)


@pytest.fixture(params=["manifest", "config.json"])
def read(request, tmp_path):
    if request.param == "manifest":
        return parse_manifest(json.dumps(MANIFEST | CLASSES).encode(), "m", check_seal=False)
    content = CONFIG | CLASSES | {"model": MODEL | {"num_classes": 4}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return read_info(tmp_path)


def test_of_a_manifest_and_a_checkpoint_the_classes_are_shown_shortened_and_doubles_are_asked_about(read):
    names, ids = read.classes, read.class_ids
    for word in ("ant", "a"):
        with pytest.raises(UserError, match=r"is ambiguous: it could be 0 \(a, ant\), 1 \(a, ant\); give the label"):
            find_class(word, names, ids, count=4)
    for word in (LONG, f"{LONG}, ant", "b" * 10**5 + "n" * 9 * 10**5, "nn", "label:9"):
        with pytest.raises(UserError) as refusal:
            find_classes(word, names, ids, count=4)
        assert len(str(refusal.value)) < 2000
    assert find_class("label:3", names, ids, count=4) == find_class(LONG[1:], names, ids, count=4) == 3
    rows = counts_of(names, ids, np.arange(4))
    assert max(map(len, table(("label", "id", "class", "samples"), rows))) < 3 * MOST_SHOWN
    assert all(len(f(2, names, ids)) < 3 * MOST_SHOWN for f in (short_name, describe_class))
    assert len(shortened(list(names))) < 3 * MOST_SHOWN


def test_as_folders_of_samples_such_classes_have_their_labels():
    ids = ("a", "a", LONG, "b", "\x1b[2J", "x\0", "../y", "é" * 101)
    job = SimpleNamespace(known=KnownClasses(count=8, ids=ids))
    names = [SamplingJob.folder_name(job, label) for label in range(8)]
    assert names == ["0000", "0001", "0002", "b", "0004", "0005", "0006", "0007"]


def test_a_picture_shows_as_much_of_a_name_as_it_has_room_for():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    for name in (LONG, "n " * 10**6, "\u00e9" * 10**6):
        assert can_be_drawn(name)
        sheet = grid(images, 2, captions=[name] * 2, row_labels=[name], title="x")
        assert max(sheet.size) < 1000


def test_a_file_of_labels_with_such_names_is_read_and_doubles_are_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("extract.class_names.warn", told.append)
    (tmp_path / "n.txt").write_text(f"{LONG}\nx\n{LONG}\nx\n")
    assert class_names(("a", "b", "c", "d"), str(tmp_path / "n.txt")) == (LONG, "x", LONG, "x")
    assert len(told) == 1 and "calls the classes 0, 2 all 'nnn" in told[0] and "and 1 more such" in told[0]
    assert len(told[0]) < 1000
    (tmp_path / "n.json").write_text(json.dumps({"a": "x"}))
    with pytest.raises(UserError, match="has no name for 1 of 2 classes: nnn") as refusal:
        class_names(("a", LONG), str(tmp_path / "n.json"))
    assert len(str(refusal.value)) < 1000
    assert class_names(("a", "b"), None) == ("a", "b") and len(told) == 1
