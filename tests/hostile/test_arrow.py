"""Arrow files of a stranger, those of saved data sets and what `hf:` names lead to: compared before memory is taken."""

import json
import os
import struct
from contextlib import nullcontext

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from extract.sources.arrow_buffers import check_buffers
from extract.sources.huggingface import open_table
from extract.sources.tables import check_contents, holds_images
from pipeline.runtime import devices
from pipeline.runtime.errors import UserError
from tests.hostile.limits import run_each

pytestmark = pytest.mark.timeout(60)
IMAGE = b"\xff\xd8" + bytes(4000)
FORMS = pytest.mark.parametrize(("codec", "form"), [("lz4", pa.ipc.new_stream), ("zstd", pa.ipc.new_file)])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def images(count=3, image=IMAGE):
    return pa.table({"image": pa.array([image] * count, pa.binary()), "label": pa.array(range(count), pa.int64())})


def written(path, table, codec=None, form=pa.ipc.new_stream):
    path.parent.mkdir(exist_ok=True)
    with form(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table)
    return path


def with_claim(path, was, claim):
    """The size that a compressed buffer claims made another: of the last one, behind the places of its values."""
    before, found, after = path.read_bytes().rpartition(struct.pack("<q", was))
    assert found
    path.write_bytes(before + struct.pack("<q", claim) + after)
    return path


def saved(folder, table=None):
    """A data set as `save_to_disk` leaves it, and its one file with the rows."""
    datasets.Dataset(images() if table is None else table).save_to_disk(str(folder))
    (data,) = folder.glob("data-*")
    return data


def opened(name, **how):
    """Every image of the data set, as dit-extract reads them."""
    source = open_table(str(name), "train", None, None, **how)
    listing = source.inputs()
    return [source.read(listing, row) for row in range(len(listing))]


def opened_folder(folder):
    return opened(folder, files=sorted(folder.glob("*.arrow")))


@FORMS
@pytest.mark.parametrize("claim", [1 << 42, (1 << 29) + 1, -5])
def test_a_compressed_buffer_that_claims_far_more_than_its_bytes_is_refused_before_it_is_unpacked(
    codec, form, claim, tmp_path
):
    path = with_claim(written(tmp_path / "d" / "x.arrow", images(), codec, form), 3 * len(IMAGE), claim)
    why = "claims less than nothing" if claim < 0 else r"x.arrow: its buffers claim [\d.,]+ .B unpacked at once, of"

    def read(_):
        for look in (check_contents, lambda path: opened_folder(path.parent)):
            with pytest.raises(UserError, match=why):
                look(path)
        return ""

    assert run_each(1, read, most=3 * 10**8) == [""]


@FORMS
def test_what_buffers_claim_is_what_they_unpack_to(codec, form, tmp_path):
    table = pa.table({"image": [IMAGE] * 7, "name": ["a", None] * 3 + ["b"], "boxes": [[1.5, 2.0]] * 7})
    path = written(tmp_path / "d" / "x.arrow", table, codec, form)
    assert check_buffers(path) == sum(
        buffer.size for column in table.columns for buffer in column.chunk(0).buffers() if buffer is not None
    )
    assert check_buffers(written(path, table, None, form)) == 0, "mapped into memory as it is"
    path = written(path, pa.table({"image": pa.array([IMAGE, IMAGE]).dictionary_encode()}), codec, form)
    assert check_buffers(path) == 3 * len(IMAGE) + 2 * 4 + 2 * 4, "a dictionary, and each row with its value"


@FORMS
@pytest.mark.parametrize(("most", "refused"), [(3 * len(IMAGE) + 40, False), (3 * len(IMAGE) + 39, True)])
def test_buffers_of_one_batch_count_together_and_a_file_may_always_unpack_to_four_times_its_bytes(
    codec, form, most, refused, tmp_path, monkeypatch
):
    path = written(tmp_path / "d" / "x.arrow", images(), codec, form)
    monkeypatch.setattr("extract.sources.pages.MOST_UNPACKED", most)
    with pytest.raises(UserError, match=r"claim 12\.0 kB unpacked at once") if refused else nullcontext():
        check_contents(path)
    check_contents(written(path, images(image=os.urandom(4000)), codec, form))


@FORMS
def test_a_dictionary_that_claims_far_more_than_its_bytes_is_refused(codec, form, tmp_path):
    table = pa.table({"image": pa.array([IMAGE]), "name": pa.array(["x" * 999]).dictionary_encode()})
    path = with_claim(written(tmp_path / "d" / "x.arrow", table, codec, form), 999, 1 << 40)
    with pytest.raises(UserError, match=r"claim 1,?099\S* .B unpacked at once|claim 1\.1 TB unpacked at once"):
        check_contents(path)


@FORMS
@pytest.mark.parametrize("cut", [0, 4, 7, 100, 3000, -1, -9])
def test_a_file_that_is_cut_off_is_one_sentence(codec, form, cut, tmp_path):
    path = written(tmp_path / "d" / "x.arrow", images(image=os.urandom(4000)), codec, form)
    path.write_bytes(path.read_bytes()[:cut])
    if cut == -1 and form is pa.ipc.new_stream:
        return  # of its end mark alone, which a stream may lack
    with pytest.raises(UserError, match=r"x.arrow cannot be read as arrow \(.*\); fetch it again, or leave it out by"):
        check_contents(path)


def test_a_footer_that_names_a_part_a_thousand_times_is_refused(tmp_path):
    path = written(tmp_path / "d" / "x.arrow", pa.concat_tables([images()] * 9), "zstd", pa.ipc.new_file)
    data = path.read_bytes()
    end = len(data) - 10
    begin = end - int.from_bytes(data[end : end + 4], "little")
    blocks = [struct.unpack_from("<qi4xqq", data, at) for at in range(begin, end - 32)]
    at = begin + next(k for k, (at, told, held, then) in enumerate(blocks) if at > 8 and then == at + told + held)
    path.write_bytes(data[: at + 24] + data[at : at + 8] + data[at + 32 :])
    with pytest.raises(UserError, match="its footer names a part twice, or not in order"):
        check_contents(path)


@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
def test_a_value_outside_of_the_files_bytes_is_refused_and_ends_no_process(form, tmp_path):
    path = written(tmp_path / "d" / "x.arrow", images(), None, form)
    places = struct.pack("<4i", 0, 4002, 8004, 12006)
    assert path.read_bytes().count(places) == 1
    damaged = path.read_bytes().replace(places, struct.pack("<4i", 0, 4002, 2**31 - 9, 2**31 - 1))
    path.write_bytes(damaged)
    (data := saved(tmp_path / "saved")).write_bytes(damaged)
    looks = [(path, check_contents), (data, lambda path: opened_folder(path.parent))]

    def read(number):
        path, look = looks[number]
        with pytest.raises(UserError, match=rf"{path.name} cannot be read as arrow \(.*; fetch it again"):
            look(path)
        return ""

    assert run_each(len(looks), read) == ["", ""]


@pytest.mark.parametrize("kind", ["parquet", "stream", "saved"])
def test_a_value_that_a_dictionary_has_once_for_a_million_rows_is_refused_before_each_row_has_it(
    kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(devices, "machine_bytes", lambda: 10**8)
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 10**6, pa.int32()), pa.array([IMAGE]))
    table = pa.table({"image": image, "label": pa.array([0] * 10**6, pa.int8())})
    path = tmp_path / "d" / ("x.parquet" if kind == "parquet" else "x.arrow")
    if kind == "saved":
        path = saved(path.parent)
    if kind == "parquet":
        path.parent.mkdir()
        parquet.write_table(table.slice(0, 10**5), path)
        monkeypatch.setattr("extract.sources.tables._ROWS_AT_ONCE", 10**4)
    else:
        written(path, table)

    def read(_):
        with pytest.raises(UserError, match=r"buffers claim 4\.0 GB unpacked at once|unpacks to|once it is unpacked"):
            opened(path.parent, files=[path])
        return ""

    assert run_each(1, read, most=8 * 10**8) == [""]


def test_classes_that_a_dictionary_names_are_read(tmp_path):
    table = images(4).set_column(1, "label", pa.array([7, 9, 9, 7]).dictionary_encode())
    (tmp_path / "d").mkdir()
    parquet.write_table(table, tmp_path / "d" / "x.parquet")
    source = open_table(str(tmp_path / "d"), "train", None, None, files=[tmp_path / "d" / "x.parquet"])
    assert source.inputs().labels.tolist() == [7, 9, 9, 7]


@pytest.mark.parametrize("kind", ["a label", "a label of a time", "a column's name"])
def test_what_python_has_no_value_for_is_one_sentence(kind, tmp_path):
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "x.parquet"
    label = pa.array([2**60] * 3, pa.timestamp("us")) if "time" in kind else pa.array(["ZZZZ"] * 3)
    table = images().set_column(1, "label", label).append_column("YYYY", pa.array([1, 2, 3]))
    parquet.write_table(table, path, use_dictionary=False, compression="none", store_schema=False)
    odd = {"a label": b"ZZZZ", "a column's name": b"YYYY"}.get(kind, b"nothing")
    path.write_bytes(path.read_bytes().replace(odd, b"\xff\xfe\xff\xfe"))
    with pytest.raises(
        UserError, match=r"column 'label' of d cannot be read \(|x.parquet cannot be read as parquet \("
    ):
        holds_images(path.parent, [path], None)
        opened(path.parent, files=[path])


# --- what save_to_disk leaves ------------------------------------------------------------------------------------


def test_a_saved_data_set_is_read_compressed_or_not_whatever_format_it_was_saved_with(tmp_path):
    data = saved(tmp_path / "d")
    assert opened_folder(data.parent) == [IMAGE] * 3
    written(data, pa.ipc.open_stream(data.read_bytes()).read_all(), "zstd")
    state = json.loads((tmp_path / "d" / "state.json").read_text())
    state |= {"_format_type": "torch", "_format_kwargs": {"device": "no such device"}}
    (tmp_path / "d" / "state.json").write_text(json.dumps(state))
    assert opened_folder(data.parent) == [IMAGE] * 3


def test_a_saved_data_set_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    data = saved(tmp_path / "d")
    written(data, pa.ipc.open_stream(data.read_bytes()).read_all(), "zstd")
    monkeypatch.setattr(devices, "machine_bytes", lambda: 10_000)
    with pytest.raises(UserError, match=r"d unpacks to 12\.0 kB, more than this machine's memory"):
        opened_folder(data.parent)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ([{"filename": "../other/data-00000-of-00001.arrow"}], r"state.json is damaged: _data_files\[0\].filename is"),
        ([{"filename": "/etc/passwd"}], r"_data_files\[0\].filename is '/etc/passwd', but must be"),
        ([7], r"_data_files\[0\] is 7, but must be"),
        (None, "_data_files is None, but must be a list"),
        ([{"filename": ".."}], "is a folder, where a file is expected"),
        ([{"filename": "pipe"}], "is a named pipe, where a file is expected"),
    ],
)
def test_a_saved_data_set_has_its_rows_in_its_own_folder(files, why, tmp_path):
    saved(tmp_path / "other")
    folder = saved(tmp_path / "d").parent
    os.mkfifo(folder / "pipe")
    state = json.loads((folder / "state.json").read_text()) | {"_data_files": files}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=why):
        opened_folder(folder)


# --- hf: names: a folder stands in for the Hub, whose files `datasets` fetches into a cache and reads the same way


def test_what_an_hf_name_leads_to_is_read(tmp_path):
    (tmp_path / "d").mkdir()
    parquet.write_table(images(), tmp_path / "d" / "x.parquet")
    assert opened(f"hf:{tmp_path}/d") == opened(f"hf:{tmp_path}/d") == [IMAGE] * 3


@pytest.mark.parametrize("suffix", ["parquet", "gpq", "arrow"])
def test_tables_that_an_hf_name_leads_to_are_looked_through_before_memory_is_taken(suffix, tmp_path):
    path = tmp_path / "d" / f"x.{suffix}"
    if suffix == "arrow":
        with_claim(written(path, images(), "zstd"), 3 * len(IMAGE), 1 << 42)
    else:
        path.parent.mkdir()
        parquet.write_table(images(1, bytes(10**6)), path, compression="zstd", use_dictionary=False)

    def read(_):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("extract.sources.pages.MOST_UNPACKED", 10**5)
            with pytest.raises(UserError, match=rf"^hf:\S+: \S+/x.{suffix}: .* claims? \S+ .B unpacked.*") as refused:
                opened(f"hf:{path.parent}")
        return str(refused.value)

    (said,) = run_each(1, read)
    assert "--ignore" not in said, "which leaves nothing of the Hub's out"
    assert not list((tmp_path / "cache").rglob("*.arrow")), "and nothing was copied"


def test_a_pipe_that_an_hf_name_leads_to_is_never_opened(tmp_path):
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "x.parquet")
    with pytest.raises(UserError, match="hf:"):
        opened(f"hf:{tmp_path}/d")
