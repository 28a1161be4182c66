"""Files that claim more than they hold, or that are no files: one sentence each, at once, and no memory taken."""

import io
import json
import os
import struct
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from extract.sources.huggingface import TableSource
from extract.sources.listing import UnreadableInputError
from extract.sources.tar_files import tar_members
from pipeline.checkpoint.folder import write_model_files
from pipeline.checkpoint.forms import load_checkpoint
from pipeline.checkpoint.release import default_info
from pipeline.checkpoint.tensor_files import find_changed, join_names
from pipeline.checkpoint.weight_files import load_tensors
from pipeline.convert.__main__ import main as convert
from pipeline.convert.imports import import_latents
from pipeline.dit import DiT, DiTConfig
from pipeline.dit.macs import count_parameters
from pipeline.inspect.__main__ import main as inspect
from pipeline.runtime.arrays import load_member, load_npy
from pipeline.runtime.errors import UserError
from pipeline.vae_folder import check_sizes
from sample.__main__ import main as sample
from sample.evaluate.__main__ import main as evaluate
from sample.evaluate.npz import NpzImages, read_array
from sample.labels import KnownClasses, choose_labels
from sample.options import ImageOptions
from sample.tune.__main__ import main as tune
from tests.pipeline.convert.foreign import make
from train.__main__ import main as train

pytestmark = pytest.mark.timeout(20)
KNOWN = KnownClasses(count=3, names=("ant", "bee", "cat"), ids=("a", "b", "c"))
FORTY_TERABYTES = 40 * 10**12


def npy_claiming(shape, data=b"\0" * 16):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


def npz(path, member, *, size=None, name="arr_0"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", member)
    if size is not None:  # the size in the directory at the end
        data = bytearray(path.read_bytes())
        struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, size)
        path.write_bytes(data)
    return path


def test_arrays_that_claim_more_than_they_hold_are_refused(tmp_path):
    (tmp_path / "x.npy").write_bytes(npy_claiming((FORTY_TERABYTES,)))
    with pytest.raises(ValueError, match="claims 160000000000000 bytes of data, but it holds 16"):
        load_npy(tmp_path / "x.npy")
    (tmp_path / "good.npy").write_bytes(npy_claiming((4,)))
    assert load_npy(tmp_path / "good.npy").tolist() == [0] * 4

    with pytest.raises(UserError, match=r"mu: its header claims \d+ bytes of data, but it holds 16"):
        read_array(npz(tmp_path / "mu.npz", npy_claiming((FORTY_TERABYTES,)), name="mu"), "mu")
    with pytest.raises(UserError, match="arr_0 claims 4000000000 bytes, but at most"):
        read_array(npz(tmp_path / "size.npz", npy_claiming((10**9 - 40,)), size=4 * 10**9), "arr_0")
    with pytest.raises(UserError, match="its header claims"):
        NpzImages(npz(tmp_path / "images.npz", npy_claiming((10**9, 8, 8, 3)).replace(b"<f4", b"|u1")))
    assert load_member(npz(tmp_path / "good.npz", npy_claiming((2, 2))), "arr_0").shape == (2, 2)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.zeros(1).expand(10**13), r"claims 40000000000000 bytes, but 4 are there"),
        (lambda: torch.empty(10**13, device="meta"), "meta"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse|damaged"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_plain_arrays_are_refused(tmp_path, make, why):
    torch.save({"w": make()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=why):
        load_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("length", [10**18, (1 << 63) + 5, 50_000_000])
def test_a_safetensors_header_that_claims_too_much_is_refused(tmp_path, length):
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    for look in (load_tensors, find_changed):
        with pytest.raises(UserError, match="damaged"):
            look(tmp_path / "x.safetensors")


def tar_with(path, *, size, kind=tarfile.REGTYPE, pax=None):
    info = tarfile.TarInfo("a.png")
    info.size, info.type = size, kind
    if pax:
        info.pax_headers = pax
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) + bytes(20 * 512))
    return path


@pytest.mark.parametrize("size", [40 * 10**9, -512, -(10**6)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_member_that_claims_more_than_its_tar_or_leads_back_is_refused(tmp_path, size, kind):
    with pytest.raises(UserError, match="x.tar (is damaged or cut off|cannot be read as an uncompressed tar)"):
        list(tar_members(tar_with(tmp_path / "x.tar", size=size, kind=kind)))


@pytest.mark.parametrize("size", [str(40 * 10**9), "-1024"])
def test_a_pax_record_that_claims_another_size_is_refused(tmp_path, size):
    with pytest.raises(UserError, match="x.tar"):
        list(tar_members(tar_with(tmp_path / "x.tar", size=10, pax={"size": size})))


def test_headers_of_headers_are_refused(tmp_path):
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.XHDTYPE, 0
    (tmp_path / "x.tar").write_bytes(header.tobuf() * 5000 + bytes(20 * 512))
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar"):
        list(tar_members(tmp_path / "x.tar"))


@pytest.mark.parametrize("suffix", ["txt", "npy", "npz"])
@pytest.mark.parametrize("leads_to", ["pipe", "/dev/zero"])
def test_labels_in_what_is_no_file_are_refused(tmp_path, suffix, leads_to):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / f"x.{suffix}").symlink_to(leads_to)
    with pytest.raises(UserError, match=r"is a (named pipe|device), where a file is expected"):
        choose_labels(ImageOptions(labels=str(tmp_path / f"x.{suffix}")), KNOWN, seed=0)


@pytest.mark.parametrize("leads_to", ["pipe", "/dev/zero"])
def test_a_path_in_a_table_that_leads_to_what_is_no_file_is_a_bad_input(tmp_path, leads_to):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.png").symlink_to(leads_to)
    for folders, value in (((), tmp_path / "x.png"), ((tmp_path,), "x.png")):
        table = SimpleNamespace(table=[{"image": str(value)}], image_column="image", folders=folders)
        with pytest.raises(UnreadableInputError, match=r"is a (named pipe|device), where a file is expected"):
            TableSource.read(table, None, 0)


NETWORK = DiTConfig(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=4, num_classes=3)
COMMANDS = {
    "sample": (sample, "--checkpoint {c} --out {new}.png --vae demo"),
    "evaluate": (
        evaluate,
        "--samples {c} --reference {c} --features pixels --num-samples 4 --vae demo --out {new}.json",
    ),
    "tune": (tune, "--checkpoint {c} --reference {real} --features pixels --num-samples 4 --vae demo --out {new}"),
    "inspect": (inspect, "{c} --verify"),
    "convert": (convert, "--from {c} --to {new} --format dit"),
    "train": (train, "--latents {store} --out {new} --model DiT-Ti/2 --batch-size 2 --device cpu --sample-every 0"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_network_larger_than_memory_is_refused_with_both_numbers_before_anything_is_made(
    tmp_path, monkeypatch, capfd, command
):
    weights = DiT(NETWORK).state_dict()
    (tmp_path / "c").mkdir()
    write_model_files(tmp_path / "c", info=default_info(NETWORK), model=None, averages={"ema": weights}, sums=True)
    (tmp_path / "real").mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "real" / f"{number}.png")
    if command == "train":
        import_latents(make("edm2_zip", tmp_path).path, tmp_path / "store")
    main, words = COMMANDS[command]
    monkeypatch.setattr("pipeline.dit.model.machine_bytes", lambda: 10**4)
    words = words.format(c=tmp_path / "c", new=tmp_path / "new", store=tmp_path / "store", real=tmp_path / "real")
    monkeypatch.setattr("sys.argv", ["the command", *words.split()])
    assert main() == 2
    said = capfd.readouterr().err
    assert "a network of at least " in said and " GB, but this machine has 0.0 GB of memory" in said
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("new")}
    assert not left or command == "tune", "which claims its folder first"


@pytest.mark.parametrize(
    "size",
    [
        {"hidden_size": 1 << 30},
        {"depth": 10**9, "num_heads": 1},
        {"num_classes": 1 << 50},
        {"input_size": 1 << 20},
        {"patch_size": 1 << 20, "input_size": 1 << 20},
        {"in_channels": 1 << 40},
    ],
)
def test_networks_that_no_machine_holds_are_neither_built_nor_counted(size):
    for make_it in (DiT, count_parameters):
        if make_it is count_parameters and "depth" in size:
            continue  # two blocks tell
        with pytest.raises(
            UserError, match=r"a network of at least .* takes [\d,.]+ GB, but this machine has [\d,.]+ GB"
        ):
            make_it(DiTConfig(**size))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"layers_per_block": 10**9}, "layers_per_block 1000000000 in its config.json, but its weights are 1 tensors"),
        ({"block_out_channels": [32, 10**12]}, "block_out_channels 1000000000000"),
        ({"vision": {"num_hidden_layers": 2}}, "num_hidden_layers 2 "),
        ({"width": -(10**400)}, "width a number of thousands of digits|width -1000"),
    ],
)
def test_a_vae_or_an_encoder_that_describes_more_than_its_weights_hold_is_refused(tmp_path, config, why):
    save_file({"w": torch.ones(8)}, tmp_path / "x.safetensors")
    check_sizes(
        {"layers_per_block": 1, "width": 32, "eps": 1e-6, "names": ["a"]}, [tmp_path / "x.safetensors"], "the VAE"
    )
    with pytest.raises(UserError, match=why):
        check_sizes(config, [tmp_path / "x.safetensors"], "the VAE")


@pytest.mark.parametrize("number", ["9" * 9, "9" * 5000])
def test_numbers_of_blocks_in_names_of_tensors_make_no_network(number, tmp_path):
    """More of them than anyone has, or more digits than Python reads: such a tensor belongs to no block."""
    for block in ("blocks", "decoder_blocks"):
        odd = f"{block}.{number}.attn.qkv.weight"
        save_file({**DiT(NETWORK).state_dict(), odd: torch.ones(1)}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=f"1 surplus: {block}.999"):
            load_checkpoint(tmp_path / "x.safetensors", num_heads=4)


def test_names_with_numbers_of_any_length_and_script_are_put_in_order():
    names = ["b10", "b9", "b" + "9" * 5000, "²", "1²3", "٣", "b"]
    assert join_names(names).split(", ") == ["1²3", "٣", "b", "b9", "b10", "b" + "9" * 5000, "²"]


@pytest.mark.timeout(20)
def test_a_diffusers_folder_of_a_billion_blocks_is_refused(tmp_path):
    settings = {"_class_name": "DiTTransformer2DModel", "num_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({"w": torch.ones(8)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="should hold a DiT of 1,000,000,000 blocks, but has 1 tensors"):
        load_checkpoint(tmp_path)
