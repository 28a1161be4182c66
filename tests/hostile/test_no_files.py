"""Pipes, devices, sockets and folders where a file is meant: named, never opened, wherever the file's name is read.

A pipe that is opened waits for ever, /dev/zero never ends: the time limit tells both.
"""

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.weight_files import holds_tensors
from pipeline.convert.layouts import LAYOUTS
from pipeline.features.encoder import find_encoder
from pipeline.latents.shards import ShardFile
from pipeline.runtime.config_files import read_config
from pipeline.runtime.errors import UserError
from pipeline.vae import load_vae
from pipeline.vae_folder import DEMO_FOLDER, WEIGHTS
from sample.edits import read_mask
from sample.evaluate.folder import FolderImages, list_images
from tests.encoders import write_encoder
from tests.pipeline.convert.foreign import make
from train.run_folder import settings_in

pytestmark = pytest.mark.timeout(20)


def put_pipe(path):
    os.mkfifo(path)


def put_link_to_pipe(path):
    pipe = path.with_name("a-pipe")
    os.mkfifo(pipe)
    path.symlink_to(pipe)


def put_link_to_device(path):
    path.symlink_to("/dev/zero")


def put_socket(path):
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def put_folder(path):
    path.mkdir()


def put_link_to_folder(path):
    path.symlink_to(path.parent)


PUT = {
    "pipe": (put_pipe, "a named pipe"),
    "link to a pipe": (put_link_to_pipe, "a named pipe"),
    "link to a device": (put_link_to_device, "a device"),
    "socket": (put_socket, "a socket"),
    "folder": (put_folder, "a folder"),
    "link to a folder": (put_link_to_folder, "a folder"),
}


def fast_dit(place):
    for name, array in (("features", np.zeros((1, 4, 2, 2), np.float32)), ("labels", np.zeros(1, np.int64))):
        (place / f"x_{name}").mkdir(parents=True)
        for number in range(2):
            np.save(place / f"x_{name}" / f"{number}.npy", array)
    return place


IMPORTED = [
    ("edm2", "edm2_zip", "img64-sd.zip"),
    ("edm2", "edm2_folder", "img64-sd/dataset.json"),
    ("edm2", "edm2_folder", "img64-sd/00000/img-mean-std-00000000.npy"),
    ("edm2", "edm2_folder", "img64-sd/00000/img-mean-std-00000013.npy"),
    ("repa", "repa", "data/vae-sd/dataset.json"),
    ("repa", "repa", "data/vae-sd/00000/img-mean-std-00000003.npy"),
    ("lightningdit", "lightningdit", "latents_rank01_shard000.safetensors"),
    ("lightningdit", "lightningdit", "latents_stats.pt"),
    ("mar", "mar", "n01440764_0.JPEG.npz"),
    ("mar", "mar", "n01484850_1.JPEG.npz"),
    ("fast-dit", None, "x_features/0.npy"),
    ("fast-dit", None, "x_features/1.npy"),
    ("fast-dit", None, "x_labels/1.npy"),
]


def replaced(place, name, put):
    """Where a file of that name was, something else now."""
    (victim,) = [path for path in place.rglob("*") if path.as_posix().endswith(name)]
    victim.unlink()
    put(victim)


@pytest.mark.parametrize("kind", PUT)
@pytest.mark.parametrize(("layout", "maker", "name"), IMPORTED)
def test_what_is_no_file_among_latents_of_other_projects_is_named_and_never_opened(layout, maker, name, kind, tmp_path):
    path = fast_dit(tmp_path / "d") if maker is None else make(maker, tmp_path / "d").path
    put, what = PUT[kind]
    replaced(tmp_path / "d", name, put)
    base, ending = name.rpartition("/")[2], Path(name).suffix
    if what == "a folder" and ending in (".zip", ".npy") and layout in ("edm2", "repa"):  # those may be folders
        what = ".*, where a file is expected|.* has no dataset.json|.* do not fit together"
        base = ""
    with pytest.raises(UserError, match=f"{base} is {what}, where a file is expected" if base else what):
        source = LAYOUTS[layout].listed(path)
        source.rows(np.arange(len(source.names)))


@pytest.mark.parametrize("kind", PUT)
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_what_is_no_file_in_a_vaes_folder_is_named_and_never_opened(name, kind, tmp_path):
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "vae")
    put, what = PUT[kind]
    replaced(folder, name, put)
    with pytest.raises(UserError, match=f"{name} is {what}, where a file is expected"):
        load_vae(str(folder))


READ = {
    "a shard": lambda path: ShardFile(path, size=0),
    "an image": lambda path: FolderImages(path.parent, image_size=None, workers=1),
    "a mask": lambda path: read_mask(path, (4, 4)),
    "a run's config.yaml": lambda path: settings_in(path.parent),
    "a user's config.yaml": read_config,
}


@pytest.mark.parametrize("kind", PUT)
@pytest.mark.parametrize("what", READ)
def test_what_is_no_file_where_one_is_named_or_found_is_named_and_never_opened(what, kind, tmp_path):
    put, found = PUT[kind]
    put(path := tmp_path / ("config.yaml" if "config" in what else "a.png"))
    why = "holds no images" if what == "an image" and "folder" in kind else f"is {found}, where a file is expected"
    with pytest.raises(UserError, match=why):
        READ[what](path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", PUT)
def test_what_is_no_file_holds_no_weights_that_a_conversion_may_replace(suffix, kind, tmp_path):
    PUT[kind][0](path := tmp_path / f"x{suffix}")
    assert not holds_tensors(path)


def test_links_that_lead_back_are_not_followed_among_images(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").touch()
        for other in ("a", "b", "c"):
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    (tmp_path / "top").symlink_to(tmp_path)
    orders = [(x, *rest) for x in "abc" for y in "abc" for z in "abc" for rest in ((), (y,), (y, z))]
    each_once = {order for order in orders if len({*order}) == len(order)}
    assert list_images(tmp_path) == sorted(
        "/".join([order[0], *(f"to-{name}" for name in order[1:]), f"{order[-1]}.png"]) for order in each_once
    )


@pytest.fixture(scope="module")
def sound_encoder(tmp_path_factory):
    folder = write_encoder(tmp_path_factory.mktemp("encoder"))
    (folder / "judge.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    return folder


@pytest.mark.parametrize("kind", PUT)
@pytest.mark.parametrize(
    "name",
    ["/config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json", "judge.json"],
)
def test_what_is_no_file_in_an_encoders_or_a_judges_folder_is_named_and_never_opened(
    name, kind, tmp_path, sound_encoder
):
    folder = shutil.copytree(sound_encoder, tmp_path / "encoder")
    put, what = PUT[kind]
    replaced(folder, name, put)
    with pytest.raises(UserError, match=f"{name.strip('/')} is {what}, where a file is expected"):
        find_encoder(str(folder))
