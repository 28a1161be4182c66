"""docs/sources.md takes images out of other libraries' files: its scripts, with stand-ins for those libraries.

The stand-ins give what the real ones gave when the scripts were run with them: mosaicml-streaming 0.13.0, lmdb 3.0.0
and tfrecord 1.14.6.
"""

import contextlib
import io
import re
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sources.md"
PIXELS = np.random.default_rng(0).integers(0, 255, (8, 6, 3), dtype=np.uint8)


def encoded(form):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form)
    return file.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")


def module(**content):
    made = types.ModuleType("a stand-in")
    made.__dict__.update(content)
    return made


def run_script(library, monkeypatch, folder, **modules):
    """The members of the tar that the page's script for a library writes."""
    scripts = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (script,) = [script for script in scripts if f"\nfrom {library}" in script or f"import {library}\n" in script]
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name.replace("_", "."), content)
    monkeypatch.chdir(folder)
    Path("tars").mkdir()
    exec(compile(script, str(PAGE), "exec"), {"__name__": "script"})
    with tarfile.open("tars/train-000000.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (lambda: JPEG, JPEG),
        (lambda: Image.open(io.BytesIO(JPEG)), JPEG),
        (lambda: Image.open(io.BytesIO(PNG)), PNG),
        (lambda: Image.fromarray(PIXELS), None),
    ],
)
def test_mds_gives_the_bytes_that_were_stored_or_the_very_pixels(column, wanted, monkeypatch, tmp_path):
    samples = [{"image": column(), "label": np.int64(4)}]
    found = run_script("streaming", monkeypatch, tmp_path, streaming=module(StreamingDataset=lambda **_: samples))
    assert sorted(found) == ["000000000.cls", "000000000.jpg"]
    assert found["000000000.cls"] == b"4"
    assert wanted in {None, found["000000000.jpg"]}
    if wanted is None:
        assert (np.asarray(Image.open(io.BytesIO(found["000000000.jpg"]))) == PIXELS).all()


def test_lmdb_gives_its_values(monkeypatch, tmp_path):
    entries = types.SimpleNamespace(cursor=lambda: iter([(b"a", JPEG), (b"b", PNG)]))
    opened = types.SimpleNamespace(begin=lambda: contextlib.nullcontext(entries))
    found = run_script("lmdb", monkeypatch, tmp_path, lmdb=module(open=lambda *_, **__: opened))
    assert found == {"000000000.jpg": JPEG, "000000001.jpg": PNG}


def test_tfrecords_of_imagenet_give_labels_from_0(monkeypatch, tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "train-00000-of-00001").touch()
    sample = {"image/encoded": np.frombuffer(JPEG, np.uint8), "image/class/label": np.array([1])}
    reader = module(tfrecord_loader=lambda *_: iter([sample]))
    found = run_script("tfrecord", monkeypatch, tmp_path, tfrecord=module(), tfrecord_reader=reader)
    name = "train-00000-of-00001-000000"
    assert found == {f"{name}.jpg": JPEG, f"{name}.cls": b"0"}
