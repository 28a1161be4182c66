"""Random trees of everything that lies about on disks, read as a plain walk with the rules of docs/sources.md reads them."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extract.options import SourceOptions
from extract.sources.litter import LITTER
from extract.sources.selection import open_source
from pipeline.runtime.errors import UserError
from tests.extract.test_sources import tar_of

IMAGE = b"\xff\xd8\xff\xe0 looks like a picture"
CLASSES = st.one_of(st.sampled_from(["cat", "dog", "10", "9", "2", "a.b", "ü", "x y"]), st.integers(0, 30).map(str))
LITTERED = st.sampled_from([*LITTER, "THUMBS.DB", ".hidden", "._0.jpg", "Lost+Found"])
NAMES = st.one_of(st.sampled_from(["0.jpg", "1.v2.jpg", "__x__0.png", "é.jpg"]), LITTERED)
PATHS = st.lists(
    st.tuples(st.one_of(CLASSES, CLASSES, LITTERED), st.lists(st.one_of(st.just("in"), LITTERED), max_size=2), NAMES),
    min_size=1,
    max_size=12,
)


def is_litter(part):
    return part.startswith(".") or part.lower() in {name.lower() for name in LITTER}


def plainly(paths):
    """(key, class) of every path without litter; classes as numbers where all are."""
    kept = sorted({path for path in paths if not any(map(is_litter, path.split("/")))})
    tops = {path.split("/")[0] for path in paths if not is_litter(path.split("/")[0])}
    numbers = all(name.isascii() and name.isdigit() for name in tops)
    order = sorted(tops, key=lambda name: (int(name), name) if numbers else (0, name))
    return [(path, path.split("/")[0]) for path in kept], tuple(order)


@given(rows=PATHS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None)
def test_random_trees_are_read_as_a_plain_walk_reads_them(rows):
    paths = {"/".join([top, *inner, name]) for top, inner, name in rows}
    paths = {path for path in paths if not any(other.startswith(f"{path}/") for other in paths)}
    top = Path(tempfile.mkdtemp())
    try:
        for path in paths:
            (top / "d" / path).parent.mkdir(parents=True, exist_ok=True)
            (top / "d" / path).write_bytes(IMAGE)
        (top / "t.tar").write_bytes(tar_of([(path, IMAGE) for path in sorted(paths)]))
        expected, order = plainly(paths)
        options = {"layout": "class-folders"}
        if not expected:
            for place in ("d", "t.tar"):
                try:
                    open_source(SourceOptions(data=str(top / place), **options), top).inputs()
                except UserError as error:
                    assert "holds no files" in str(error)  # noqa: PT017 (both places)
                else:
                    raise AssertionError(f"{place} was read")
            return
        listing = open_source(SourceOptions(data=str(top / "d"), **options), top).inputs()
        assert listing.class_ids == order
        found = zip(listing.keys, (listing.class_ids[label] for label in listing.labels), strict=True)
        assert list(found) == expected
    finally:
        shutil.rmtree(top)
