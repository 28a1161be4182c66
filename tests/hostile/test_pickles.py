"""Files of torch.save, of today and from before torch 1.6, that claim more than they hold: refused before memory is taken."""

import argparse
import io
import pickle
import struct
import zipfile

import pytest
import torch

from pipeline.checkpoint.weight_files import load_tensors, read_weight_file
from pipeline.runtime.errors import UserError
from tests.hostile.limits import run_each

pytestmark = pytest.mark.timeout(60)
MOST = 3 * 10**8
"""Bytes that a refusal may take."""


def tensors():
    weight = torch.arange(12.0).reshape(3, 4)
    return {
        "w": weight,
        "row": weight[1],
        "every_other": weight[:, ::2],
        "one": torch.tensor(2.0),
        "none": torch.ones(0),
    }


def saved(path, content, *, is_old):
    torch.save(content, path, _use_new_zipfile_serialization=not is_old)
    return path


def refusal(path):
    """What the file is refused with, in a child that may take no more than MOST."""

    def load(_):
        try:
            load_tensors(path)
        except UserError as error:
            return str(error)
        return "it was read"

    (said,) = run_each(1, load, most=MOST)
    assert said.isprintable()
    return said


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_file_of_either_form_goes_on_loading_with_all_that_stands_beside_its_weights(tmp_path, is_old):
    network = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    beside = {
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.99)),
        "opt": optimizer.state_dict(),
        "some": [torch.float16, torch.Size([3]), torch.device("cpu"), {1, 2}, bytearray(b"abc"), b"abc", 1j, None],
        "sparse": [torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)],
        "types": [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.int64, torch.bool, torch.complex64)],
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    path = saved(tmp_path / "x.pt", beside | {"ema": tensors(), "step": 7}, is_old=is_old)
    read = read_weight_file(path)
    assert read.step == 7 and read.arguments["lr"] == 1e-4
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in tensors().items())


@pytest.mark.parametrize(
    ("count", "why"),
    [
        (10**13, r"its tensors claim 40000000000000 bytes, but it has \d+"),
        (8 * 10**8, r"its tensors claim 3200000000 bytes, but it has \d+"),
        (1 << 62, r"its tensors claim \d+ bytes"),
        (11, "a tensor in it claims 48 bytes, but 44 are there"),
        (0, "a tensor in it claims 48 bytes, but 0 are there"),
        (-5, "a storage in it has no size, or less than nothing"),
    ],
)
def test_a_storage_of_the_old_form_that_claims_another_size_is_refused(tmp_path, count, why):
    path = saved(tmp_path / "x.pt", {"w": torch.ones(3, 4), "b": torch.ones(8)}, is_old=True)
    data, twelve = path.read_bytes(), b"K\x0cN"  # twelve numbers, no view
    assert data.count(twelve) == 1
    path.write_bytes(data.replace(twelve, b"\x8a\x08" + struct.pack("<q", count) + b"N"))
    with pytest.raises(UserError, match=f"x.pt is damaged: {why}"):
        load_tensors(path)
    assert "is damaged" in refusal(path)


class Call:
    """Is unpickled by a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (lambda _: Call(bytearray, 10**9), "it makes a bytearray of numbers"),
        (lambda _: Call(torch.FloatTensor, 10**9), "it makes a FloatTensor of numbers"),
        (lambda _: Call(torch.Tensor, torch.Size([10**5, 10**4])), "it makes a Tensor of numbers"),
        (lambda _: Call(torch.UntypedStorage, 10**9), "it makes a UntypedStorage of numbers"),
        (
            lambda storage: Call(torch._utils._rebuild_tensor, storage, 0, (10**9,), (1,)),
            "a tensor in it claims 4000000000 bytes, but 32 are there",
        ),
        (
            lambda storage: Call(torch._utils._rebuild_tensor, storage, 10**9, (1,), (1,)),
            "a tensor in it claims 4000000004 bytes, but 32 are there",
        ),
        (
            lambda storage: Call(
                torch._tensor._rebuild_from_type_v2,
                torch._utils._rebuild_tensor,
                torch.Tensor,
                (storage, 0, (2, 2), (10**9, 1)),
                {},
            ),
            "a tensor in it claims 4000000008 bytes, but 32 are there",
        ),
        (
            lambda storage: Call(
                torch._utils._rebuild_qtensor, storage, 0, (10**9,), (0,), (torch.per_tensor_affine, 1.0, 0), False, {}
            ),
            "a tensor in it claims 4000000000 bytes, but 32 are there",
        ),
        (lambda _: Call(torch._utils._rebuild_tensor, {}, 0, (1,), (1,)), "a tensor in it has no storage"),
        (
            lambda storage: Call(torch._utils._rebuild_tensor, storage, 0, (-1,), (1,)),
            "a tensor in it has no storage, or no sizes",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_call_that_takes_memory_for_numbers_is_refused_wherever_it_stands(tmp_path, odd, why, is_old):
    content = {"ema": tensors(), "opt": [odd(torch.ones(8).storage())]}
    assert why in refusal(saved(tmp_path / "x.pt", content, is_old=is_old))


def zipped(path, change, kind=zipfile.ZIP_STORED):
    """A file of today with its members changed."""
    stream = io.BytesIO()
    torch.save({"w": torch.ones(3)}, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(path, "w", kind) as new:
        for name in old.namelist():
            for renamed, data in change(name, old.read(name)):
                new.writestr(renamed, data)
    return path


def test_members_that_are_compressed_or_stand_there_twice_are_refused_not_misread(tmp_path):
    assert torch.equal(load_tensors(zipped(tmp_path / "a.pt", lambda *member: [member]))["w"], torch.ones(3))
    pt = zipped(tmp_path / "b.pt", lambda *member: [member], zipfile.ZIP_DEFLATED)
    assert "b.pt is damaged: it is compressed inside, as torch.save never does" in refusal(pt)
    bomb = zipped(
        tmp_path / "c.pt",
        lambda name, data: [(name, data + bytes(10**9 * name.endswith("data.pkl")))],
        zipfile.ZIP_DEFLATED,
    )
    assert bomb.stat().st_size < 10**7 and "it is compressed inside" in refusal(bomb)
    two = zipped(tmp_path / "d.pt", lambda name, data: [(name, data), (name.upper(), data)])
    assert "it has no data.pkl, or several members of one name" in refusal(two)


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7 + b"\x0f"])
def test_a_pickle_that_claims_a_long_text_or_many_places_is_refused(tmp_path, opcode):
    path = saved(tmp_path / "x.pt", {"w": torch.ones(3)}, is_old=True)
    data = path.read_bytes()
    at = data.index(pickle.PROTO + b"\x02}q")  # of the content
    path.write_bytes(data[: at + 2] + b"N" + opcode + b"0" + data[at + 2 :])
    said = refusal(path)
    assert "is damaged" in said or said == "it was read"
