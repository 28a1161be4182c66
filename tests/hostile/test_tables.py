"""Parquet of a stranger: damaged, absurd or of other types, it ends in one sentence before memory is taken."""

import mmap
import os
import random
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from extract.sources.huggingface import TableSource, open_table
from extract.sources.listing import UnreadableInputError
from extract.sources.pages import MOST_UNPACKED, _name, _pages, _struct
from extract.sources.tables import check_table, holds_images
from pipeline.runtime.errors import UserError
from tests.hostile.limits import run_each

pytestmark = pytest.mark.timeout(60)
IMAGE = {"bytes": b"\xff\xd8" + bytes(40), "path": None}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def written(path, **columns):
    """A table at a path; what is no list says how `parquet.write_table` does it."""
    path.parent.mkdir(exist_ok=True)
    how = {name: columns.pop(name) for name in list(columns) if not isinstance(columns[name], list)}
    parquet.write_table(pa.table(columns), path, **how)
    return path


def opened(path, *columns):
    """Read a folder of tables as dit-extract does: the listing, and every image."""
    files = sorted(path.parent.iterdir())
    source = open_table(str(path.parent), "train", *(columns or (None, None)), files=files)
    listing = source.inputs()
    return [source.read(listing, row) for row in range(min(len(listing.keys), 10))]


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def with_rows(path, rows):
    """The footer's count of rows (Thrift's compact form: a zigzag varint) made another, of the file and of its parts."""
    data, count = path.read_bytes(), parquet.read_metadata(path).num_rows
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer = data[end:-8].replace(b"\x16" + varint(2 * count), b"\x16" + varint(2 * rows))
    path.write_bytes(data[:end] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    return path


@pytest.mark.parametrize("rows", [10**12, (1 << 62) - 1])
def test_an_absurd_row_count_in_the_footer_is_refused(rows, tmp_path):
    table = with_rows(written(tmp_path / "d" / "x.parquet", image=[IMAGE] * 77, label=[1] * 77), rows)
    assert parquet.read_metadata(table).num_rows == rows
    with pytest.raises(UserError, match=r"x.parquet is damaged: it claims [\d,]+ rows"):
        opened(table)


@pytest.mark.parametrize(("at_once", "refused"), [(-1, True), (0, False), (1000, False), (1001, True)])
def test_a_part_of_less_than_nothing_or_more_than_memory_is_refused(at_once, refused, tmp_path, monkeypatch):
    group = SimpleNamespace(num_rows=2, total_byte_size=at_once)
    footer = SimpleNamespace(num_rows=2, num_row_groups=1, row_group=lambda _number: group)
    table = written(tmp_path / "d" / "x.parquet", image=[IMAGE] * 2)
    monkeypatch.setattr(parquet, "read_metadata", lambda _path: footer)
    monkeypatch.setattr("pipeline.runtime.devices.machine_bytes", lambda: 1000)
    with pytest.raises(UserError, match="claims more at once .* or less than nothing") if refused else nullcontext():
        check_table(table)


@pytest.mark.parametrize("length", [0, 8, 1 << 30, (1 << 32) - 1])
def test_a_footer_of_another_length_is_refused(length, tmp_path):
    table = written(tmp_path / "d" / "x.parquet", image=[IMAGE], label=[1])
    table.write_bytes(table.read_bytes()[:-8] + length.to_bytes(4, "little") + b"PAR1")
    with pytest.raises(UserError, match="x.parquet cannot be read as parquet"):
        opened(table)


def test_columns_outside_of_the_file_are_one_sentence(tmp_path):
    images = [random.Random(row).randbytes(4000) for row in range(9)]
    table = written(tmp_path / "d" / "x.parquet", image=images, label=[1] * 9)
    data = table.read_bytes()
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    table.write_bytes(b"PAR1" + data[end:])
    with pytest.raises(UserError, match="x.parquet cannot be read as parquet"):
        opened(table)


def test_an_image_that_claims_more_than_its_page_is_refused(tmp_path):
    (tmp_path / "d").mkdir()
    table = tmp_path / "d" / "x.parquet"
    rows = pa.table({"image": pa.array([b"A" * 40] * 3, pa.binary()), "label": [0, 1, 1]})
    parquet.write_table(rows, table, use_dictionary=False, compression="none")
    table.write_bytes(table.read_bytes().replace(b"\x28\0\0\0" + b"A" * 40, b"\xff\xff\xff\x7f" + b"A" * 40))
    with pytest.raises(UserError, match="x.parquet cannot be read as parquet"):
        opened(table)


def bomb(path, *, cell, rows, **how):
    """A parquet of some thousand bytes whose rows have one value, of so many bytes, each."""
    path.parent.mkdir()
    table = pa.table({"image": [{"bytes": bytes(cell), "path": None}], "label": [1]})
    parquet.write_table(pa.concat_tables([table] * rows), path, compression="zstd", **how)
    assert path.stat().st_size < 100_000
    return path


def test_a_part_that_unpacks_to_more_than_memory_is_refused_before_it_is_taken_at_once(tmp_path, monkeypatch):
    table = bomb(tmp_path / "d" / "x.parquet", cell=10**6, rows=1000)
    assert parquet.read_metadata(table).row_group(0).total_byte_size < 2 * 10**6, "a dictionary has the value once"
    monkeypatch.setattr("pipeline.runtime.devices.machine_bytes", lambda: 10**8)

    def read(_):
        with pytest.raises(
            UserError, match=r"x.parquet holds 10\d\.\d MB and more in a part once it is unpacked, where"
        ):
            opened(table)
        return ""

    assert run_each(1, read, most=6 * 10**8) == [""]


def test_a_page_that_claims_more_than_it_unpacks_to_is_refused(tmp_path):
    table = bomb(tmp_path / "d" / "x.parquet", cell=14 * 10**7, rows=1, use_dictionary=False)
    data, page = table.read_bytes(), b"\x15\x00\x15"  # the header: a data page, of so many bytes (zigzag) unpacked
    at = data.index(page) + len(page)
    assert data[at + 3 : at + 5] == varint(2 * 14 * 10**7)[3:], "in five bytes"
    table.write_bytes(data[:at] + varint(2 * 2**28) + data[at + 5 :])

    def read(_):
        with pytest.raises(UserError, match=r"x.parquet cannot be read as parquet \("):
            opened(table)
        return ""

    assert run_each(1, read) == [""]


@pytest.mark.slow
@pytest.mark.parametrize("column", ["image", "file_name"])
def test_a_page_that_unpacks_to_far_more_than_its_bytes_is_refused_before_it_is_unpacked(column, tmp_path):
    path = tmp_path / "d" / "x.parquet"
    cell = bytes(3 * MOST_UNPACKED // 2) if column == "image" else "x" * (3 * MOST_UNPACKED // 2)
    written(path, **{column: [cell], "label": [1]}, compression="zstd", use_dictionary=False)
    del cell
    assert path.stat().st_size < 100_000

    def read(_):
        why = (
            rf"x.parquet: a page of its column '{column}' claims 805.3 MB unpacked, of [\d,]+ bytes in the file \(with"
        )
        for look in (holds_images, lambda *_: opened(path)) if column == "file_name" else (lambda *_: opened(path),):
            with pytest.raises(UserError, match=why):
                look(path.parent, [path], None)
        return ""

    assert run_each(1, read, most=3 * 10**8) == [""]


def test_many_columns_whose_pages_are_large_together_are_refused(tmp_path):
    path = tmp_path / "d" / "x.parquet"
    columns = {f"c{number}": [bytes(MOST_UNPACKED // 20)] for number in range(25)}
    written(path, image=[IMAGE], **columns, compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=r"column 'c\d+' claims 26.8 MB unpacked, of .* \(with the other columns' 671"):
        opened(path)


@pytest.mark.parametrize(
    "how",
    [
        {"use_dictionary": False},
        {"data_page_version": "2.0"},
        {"compression": "gzip", "row_group_size": 7},
        {"compression": "none", "data_page_size": 10, "write_batch_size": 3},
        {"write_page_index": True, "write_page_checksum": True},
    ],
)
def test_pages_are_found_as_the_library_wrote_them(how, tmp_path):
    images = [{"bytes": bytes([row]) * 99, "path": None} for row in range(40)]
    path = written(tmp_path / "d" / "x.parquet", image=images, label=[None, 1] * 20, boxes=[[1.5, 2]] * 40, **how)
    footer = parquet.read_metadata(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = len(data) - 8 - footer.serialized_size
        parts = _struct(data, begin)[0][4]
        assert len(parts) == footer.num_row_groups
        for number, part in enumerate(parts):
            for place, column in enumerate(part[1]):
                wanted = footer.row_group(number).column(place)
                pages = list(_pages(data, column, begin))
                headers = wanted.total_compressed_size - sum(page.held for page in pages)
                assert _name(column) == wanted.path_in_schema and headers > 0
                assert sum(page.unpacked for page in pages) == wanted.total_uncompressed_size - headers
    assert len(opened(path)) == 10


def test_a_cell_that_unpacks_to_more_than_an_image_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("extract.sources.tables._MOST_AT_ONCE", 10**7)
    table = bomb(tmp_path / "d" / "x.parquet", cell=2 * 10**7, rows=1)
    with pytest.raises(UserError, match=r"x.parquet holds 20\.\d MB and more in few rows once it is unpacked"):
        opened(table)


def test_what_is_copied_already_is_not_unpacked_again(tmp_path, monkeypatch):
    table = written(tmp_path / "d" / "x.parquet", image=[IMAGE] * 3, label=[0, 1, 2])
    looked = []
    monkeypatch.setattr("extract.sources.huggingface.check_contents", lambda path, _kind: looked.append(path))
    assert len(opened(table)) == len(opened(table)) == 3 and looked == [table]


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        ([[1, 2], [3, 4]], "but images are bytes, paths, or both"),
        ([[b"a"], [b"b"]], "but images are bytes, paths, or both"),
        ([1.5, 2.5], "but images are bytes, paths, or both"),
        ([{"bytes": [1, 2], "path": "x"}] * 2, "but images are bytes, paths, or both"),
        ([{"bytes": "text", "path": "x"}] * 2, "but images are bytes, paths, or both"),
        ([{"bytes": b"x", "path": [1]}] * 2, "but images are bytes, paths, or both"),
    ],
)
def test_a_column_of_another_type_holds_no_images(cells, why, tmp_path):
    table = written(tmp_path / "d" / "x.parquet", image=cells, label=[0, 1])
    with pytest.raises(UserError, match=why):
        opened(table, "image", "label")


@pytest.mark.parametrize(
    "labels", [[[1], [0]], [{"a": 1}] * 2, ["\x1b[2J", {}][:1] * 2, [10**18, -(10**18)], [b"a"] * 2]
)
def test_labels_of_any_type_are_classes_or_one_sentence(labels, tmp_path):
    table = written(tmp_path / "d" / "x.parquet", image=[IMAGE] * 2, label=labels)
    said = ""
    try:
        opened(table)
    except UserError as error:
        said = str(error)
    assert (said or "x").isprintable() and len(said) < 2000


@pytest.mark.parametrize(("labels", "wrong"), [([0, 1, None, -1], None), ([0, 2], 2), ([3, None], 3)])
def test_labels_go_as_far_as_the_names_of_their_column(labels, wrong):
    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b"])})
    column = pa.table({"label": pa.array(labels, pa.int64())}, schema=features.arrow_schema)
    table = datasets.Dataset(column)
    source = TableSource(name="x", table=table, image_column="image", label_column="label")
    if wrong is None:
        assert source.inputs().labels.tolist() == [0, 1, -1, -1]
        return
    with pytest.raises(UserError, match=f"'label' of x has the label {wrong}, but names 2 classes"):
        source.inputs()


def test_a_label_without_a_name_is_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [IMAGE] * 2, "label": [0, 1]}, features=features)
    (tmp_path / "d").mkdir()
    rows.to_parquet(tmp_path / "d" / "x.parquet")
    table = parquet.read_table(tmp_path / "d" / "x.parquet")
    parquet.write_table(table.set_column(1, "label", pa.array([0, 10**15])), tmp_path / "d" / "x.parquet")
    parquet.write_table(
        parquet.read_table(tmp_path / "d" / "x.parquet").replace_schema_metadata(table.schema.metadata),
        tmp_path / "d" / "x.parquet",
    )
    with pytest.raises(UserError, match="has the label 1000000000000000, but names 2 classes|cannot be opened"):
        opened(tmp_path / "d" / "x.parquet")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("pipe", "is a named pipe, where a file is expected"),
        ("zero", "is a device, where a file is expected"),
        ("/dev/zero", "is a device, where a file is expected"),
        ("d/../pipe", "is a named pipe, where a file is expected"),
        (".", "is a folder, where a file is expected"),
        ("a\0b", "neither bytes nor a path"),
        ("x" * 5000, "cannot be opened"),
        ("huge", r"has more than the 1\.1 GB"),
        (7, "which is neither bytes nor a path"),
        ([b"x"], "which is neither bytes nor a path"),
    ],
)
def test_a_cell_that_leads_to_no_image_is_a_bad_input(value, why, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "d").mkdir()
    table = SimpleNamespace(table=[{"image": value}], image_column="image", folders=(tmp_path, tmp_path / "d"))
    with pytest.raises(UnreadableInputError, match=why):
        TableSource.read(table, None, 0)


@pytest.mark.parametrize("leads_to", ["pipe", "/dev/zero", "folder"])
def test_a_table_that_is_no_file_is_never_opened(leads_to, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.parquet").symlink_to(leads_to)
    with pytest.raises(UserError, match=r"x.parquet is a (named pipe|device|folder), where a file is expected"):
        check_table(tmp_path / "x.parquet")
