"""Every writer of the project as a command at tiny size, and what stands beside it: one row each.

A path below `o/` is what the shim watches; `in/` holds what the commands read (`inputs.py` makes it).
A new writer is a new row: `Writer(name, command, other=…)`, with `before` where it replaces or continues something.
"""

from dataclasses import dataclass, replace

TINY_VAE = ["--vae", "in/vae"]
EXTRACT = ["extract", "--out", "o/store", *TINY_VAE, "--image-size", "32", "--samples-per-shard", "2"]
EXTRACT += ["--batch-size", "2", "--workers", "1", "--device", "cpu", "--data"]
ENCODER = ["--features", "in/encoder", "--features-dim"]
TRAIN = ["train", "--latents", "in/store", "--out", "o/run", "--model", "DiT-Ti/2", "--batch-size", "4"]
TRAIN += ["--log-every", "1", "--no-tensorboard", "--device", "cpu", "--save-every", "2", "--sample-every"]
SAMPLE = ["sample", "--checkpoint", "in/checkpoint", *TINY_VAE, "--steps", "2", "--num-samples", "4"]
SAMPLE += ["--batch-size", "2", "--guidance", "1", "--device", "cpu", "--out"]
EVALUATE = ["evaluate", "--samples", "in/pictures.npz", "--inception", "in/inception.safetensors", "--device", "cpu"]
EVALUATE += ["--metrics", "is", "--batch-size", "2"]
TUNE = ["tune", "--checkpoint", "in/checkpoint", *TINY_VAE, "--reference", "in/pictures.npz", "--features", "pixels"]
TUNE += [
    "--num-samples",
    "4",
    "--batch-size",
    "2",
    "--steps",
    "2",
    "--guidance",
    "1",
    "--device",
    "cpu",
    "--out",
    "o/t",
]
CONVERT = ["convert", "--from"]
PLOTS = ["plot", "in/run", "in/run-2", "--save-reference"]


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A command that writes, and what disturbs it."""

    name: str
    command: list[str]
    other: list[str]
    """Another command for the same output, with other settings."""
    before: list[list[str]] | tuple = ()
    """Commands that make what stands there when the command starts."""
    overwrites: bool = False
    """Whether what stood before is replaced: then `other` is what made it."""
    kind: str = "files"
    """How the output is looked at half-way: files (each whole under its name), folder, store, run."""
    outputs: tuple[str, ...] = ()
    """Names below `o/`."""
    forces: bool = True
    """Whether the command has --overwrite."""
    spoil: str = ""
    """Pattern of the file below `o/` that is cut to half its size after `before`."""
    expects: int = 0
    """The exit status of the command when nothing disturbs it."""
    processes: int = 1
    """Of how many processes the command is, as under torchrun: then only what gives a name is visited."""


def writer(name, command, other, **about):
    return Writer(name=name, command=command, other=other, **about)


def overwriting(row):
    """The row's command with --overwrite, on top of what its other command has made."""
    command = [*row.command, "--overwrite"]
    return replace(row, name=f"{row.name} --overwrite", command=command, before=[row.other], overwrites=True)


def in_two(row):
    """The row's command in two processes."""
    return replace(row, name=f"{row.name} (two processes)", processes=2)


STORE = {"kind": "store", "outputs": ("store",)}
RUN = {"kind": "run", "outputs": ("run",)}


def sampling(name, out, *flags, outputs=None, **about):
    command = [*SAMPLE, f"o/{out}", *flags]
    beside = outputs or (out.rstrip("/"), f"{out.rstrip('/')}.json")
    return writer(f"dit-sample {name}", command, [*command, "--seed", "1"], outputs=beside, **about)


def converting(name, target, format_, source="in/checkpoint", other="in/checkpoint-2", **about):
    flags = ["--to", f"o/{target}", "--format", format_, *(TINY_VAE if format_ == "diffusers" else [])]
    command, changed = ([*CONVERT, given, *flags] for given in (source, other))
    return writer(f"dit-convert {name}", command, changed, outputs=(target,), **about)


def evaluating(name, *flags, outputs, change):
    command = [*EVALUATE, *flags]
    return writer(f"dit-evaluate {name}", command, [*command, *change], outputs=outputs)


SAFETENSORS = writer(
    "dit-extract safetensors", [*EXTRACT, "in/images"], [*EXTRACT, "in/images", "--seed", "1"], **STORE
)
WEBDATASET = writer(
    "dit-extract webdataset",
    [*EXTRACT, "in/images", "--format", "webdataset"],
    [*EXTRACT, "in/images", "--format", "webdataset", "--seed", "1"],
    **STORE,
)
FEATURES = writer(
    "dit-extract --add-features",
    ["extract", "--add-features", "o/store", *EXTRACT[-7:-1], "--data", "in/images", *ENCODER, "3"],
    [*EXTRACT, "in/images", *ENCODER, "4"],
    before=[SAFETENSORS.command],
    kind="store",
    outputs=("store/features",),
)
START = writer("dit-train", [*TRAIN, "0", "--steps", "4"], [*TRAIN, "0", "--steps", "4", "--seed", "1"], **RUN)
SHARDS = ["--sharding", "fsdp", "--sharded-checkpoints"]
TOGETHER = replace(
    START, name="dit-train --sharded-checkpoints", command=[*START.command, *SHARDS], other=[*START.other, *SHARDS]
)
NPZ, GRID, FOLDER = sampling(".npz", "s.npz"), sampling(".png", "s.png"), sampling("FOLDER/", "s/", kind="folder")
LATENTS = sampling(".safetensors", "s.safetensors")
STRIP = sampling("--trajectory", "s.png", "--trajectory", "2", outputs=("s.png", "s.png.json", "s.trajectory.png"))
RESULT = evaluating("--out", "--out", "o/result.json", outputs=("result.json",), change=["--samples", "in/others.npz"])
REFERENCE = evaluating(
    "--make-reference",
    "--make-reference",
    "o/reference.npz",
    outputs=("reference.npz", "reference.npz.json"),
    change=["--samples", "in/others.npz"],
)
DIT, DIFFUSERS = (converting(name, "new", name, kind="folder") for name in ("dit", "diffusers"))
CARD = ["--model-card", "--license", "mit"]
CARDED = replace(DIT, name="dit-convert dit --model-card", command=[*DIT.command, *CARD], other=[*DIT.other, *CARD])
PICKLED, LONE = (converting(f"facebook .{end}", f"new.{end}", "facebook") for end in ("pt", "safetensors"))
IMPORT = converting("store", "store", "store", source="in/features", other="in/features-2", kind="store")

WRITERS = [
    SAFETENSORS,
    WEBDATASET,
    writer(
        "dit-extract flat (a bad image)",
        [*EXTRACT, "in/flat", "--allow-skips", "0.5", "--no-flip"],
        [*EXTRACT, "in/flat", "--allow-skips", "0.5"],
        **STORE,
    ),
    writer(
        "dit-extract (too many bad images)",
        [*EXTRACT, "in/flat", "--no-flip"],
        [*EXTRACT, "in/flat"],
        expects=2,
        **STORE,
    ),
    writer(
        "dit-extract (a shard lost)",
        SAFETENSORS.command,
        SAFETENSORS.other,
        before=[SAFETENSORS.command],
        spoil="store/train-00001.safetensors",
        **STORE,
    ),
    overwriting(SAFETENSORS),
    writer(
        "dit-extract remote tars",
        [*EXTRACT, "{server}/part-{0..1}.tar", "--source-cache", "o/cache"],
        [*EXTRACT, "{server}/part-{0..1}.tar", "--source-cache", "o/cache", "--seed", "1"],
        **STORE,
    ),
    writer(
        "dit-extract --preview",
        [*EXTRACT[:1], *EXTRACT[3:], "in/images", "--preview", "o/p.png", "--preview-images", "2"],
        [*EXTRACT[:1], *EXTRACT[3:], "in/images", "--preview", "o/p.png", "--preview-images", "3"],
        outputs=("p.png",),
        forces=False,
    ),
    FEATURES,
    overwriting(FEATURES),
    START,
    writer(
        "dit-train (resumed)",
        START.command,
        START.other,
        before=[[*TRAIN, "0", "--steps", "2"]],
        **RUN,
    ),
    writer(
        "dit-train --ema-sigma",
        [*START.command, "--ema-sigma", "0.1", "--ema-snapshot-every", "2"],
        [*START.other, "--ema-sigma", "0.1", "--ema-snapshot-every", "2"],
        **RUN,
    ),
    overwriting(START),
    writer(
        "dit-train (last checkpoint damaged)",
        START.command,
        START.other,
        before=[START.command],
        spoil="run/checkpoints/step-0000004/ema.safetensors",
        **RUN,
    ),
    writer(
        "dit-train --keep-last",
        [*START.command, "--keep-last", "1"],
        [*START.other, "--keep-last", "1"],
        **RUN,
    ),
    writer(
        "dit-train --sample-every",
        [
            *TRAIN,
            "2",
            "--steps",
            "2",
            *TINY_VAE,
            "--preview-steps",
            "2",
            "--preview-classes",
            "2",
            "--preview-rows",
            "1",
        ],
        [*TRAIN, "2", "--steps", "2", *TINY_VAE, "--preview-steps", "2", "--seed", "1"],
        **RUN,
    ),
    writer(
        "dit-train on a remote store",
        ["train", "--latents", "{server}/store", "--cache", "o/cache", *START.command[3:]],
        ["train", "--latents", "{server}/store", "--cache", "o/cache", *START.other[3:]],
        **RUN,
    ),
    writer(
        "train.plot",
        ["plot", "in/run", "--out", "o/curves.png"],
        ["plot", "in/run", "--out", "o/curves.png", "--smoothing", "0"],
        outputs=("curves.png",),
        forces=False,
    ),
    writer(
        "train.plot --save-reference",
        [*PLOTS, "o/reference.json", "--out", "o/curves.png"],
        [*PLOTS, "o/reference.json", "--out", "o/curves.png", "--smoothing", "0"],
        outputs=("reference.json", "curves.png"),
        forces=False,
    ),
    NPZ,
    GRID,
    FOLDER,
    LATENTS,
    STRIP,
    *(overwriting(row) for row in (NPZ, GRID, FOLDER, LATENTS, STRIP)),
    RESULT,
    REFERENCE,
    writer("dit-tune", TUNE, [*TUNE, "--points", "9"], outputs=("t/tune.json", "t/tune.png")),
    overwriting(RESULT),
    overwriting(REFERENCE),
    writer(
        "dit-evaluate --inception URL",
        [*RESULT.command[:4], "{server}/{network}", *RESULT.command[5:]],
        [*RESULT.other[:4], "{server}/{network}", *RESULT.other[5:]],
        outputs=("result.json",),
    ),
    DIT,
    CARDED,
    DIFFUSERS,
    PICKLED,
    LONE,
    IMPORT,
    *(overwriting(row) for row in (DIT, DIFFUSERS, PICKLED, LONE, IMPORT)),
    writer(
        "dit-inspect --grid",
        ["inspect", "in/store", "--grid", "o/grid.png", *TINY_VAE, "--per-class", "1"],
        ["inspect", "in/store", "--grid", "o/grid.png", *TINY_VAE, "--per-class", "2"],
        outputs=("grid.png",),
        forces=False,
    ),
    *(in_two(row) for row in (SAFETENSORS, START, TOGETHER, NPZ)),
]

SITES = {
    "pipeline/checkpoint/diffusers_write.py:write_diffusers": "dit-convert diffusers",
    "pipeline/checkpoint/diffusers_write.py:_write_vae": "dit-convert diffusers",
    "pipeline/checkpoint/folder.py:write_model_files": "dit-train",
    "pipeline/checkpoint/weight_files.py:save_pickled_tensors": "dit-convert facebook .pt",
    "pipeline/convert/card.py:write_card": "dit-convert dit --model-card",
    "pipeline/convert/imports.py:_folder_for": "dit-convert store",
    "pipeline/convert/run.py:_published": "dit-convert dit",
    "pipeline/convert/run.py:_write_release": "dit-convert facebook .safetensors",
    "pipeline/features/pca.py:write_projection": "dit-extract --add-features",
    "pipeline/features/writer.py:write_shard": "dit-extract --add-features",
    "pipeline/features/writer.py:finish_features": "dit-extract --add-features",
    "pipeline/image_grid.py:save_png": "dit-extract --preview",
    "pipeline/inspect/store.py:draw_store": "dit-inspect --grid",
    "pipeline/latents/manifest.py:write_manifest": "dit-extract safetensors",
    "pipeline/runtime/remote_files.py:_fetch": "dit-train on a remote store",
    "pipeline/latents/writer.py:write_shard": "dit-extract webdataset",
    "pipeline/latents/writer.py:publish_pieces": "dit-extract safetensors",
    "pipeline/latents/writer.py:finish_store": "dit-extract flat (a bad image)",
    "extract/fill.py:write_latents": "dit-extract safetensors",
    "extract/preview.py:draw_preview": "dit-extract --preview",
    "extract/sources/listing.py:_save": "dit-extract safetensors",
    "pipeline/runtime/remote_copies.py:_fetch": "dit-extract remote tars",
    "extract/store_folder.py:begin": "dit-extract safetensors",
    "extract/store_folder.py:begin_anew": "dit-extract safetensors --overwrite",
    "extract/store_folder.py:unmoved": "dit-extract safetensors --overwrite",
    "pipeline/latents/store_files.py:replace_store": "dit-extract safetensors --overwrite",
    "extract/store_folder.py:reopen": "dit-extract (a shard lost)",
    "extract/store_folder.py:write_skipped": "dit-extract (too many bad images)",
    "pipeline/checkpoint/snapshots.py:write_average": "dit-train --ema-sigma",
    "train/checkpointing.py:write_snapshot": "dit-train",
    "train/checkpointing.py:_write_counters": "dit-train",
    "pipeline/checkpoint/tensor_files.py:write_index": "dit-train --sharded-checkpoints (two processes)",
    "pipeline/checkpoint/folder.py:write_shards": "dit-train --sharded-checkpoints (two processes)",
    "train/kept_checkpoints.py:discard": "dit-train --keep-last",
    "train/kept_checkpoints.py:_set_aside": "dit-train (last checkpoint damaged)",
    "train/run_folder.py:_put_back": "dit-train --overwrite",
    "train/run_folder.py:_set_aside": "dit-train --overwrite",
    "train/run_folder.py:drop_replaced": "dit-train --overwrite",
    "train/checkpointing.py:_write": "dit-train",
    "train/plot/__main__.py:_run": "train.plot",
    "train/plot/__main__.py:_save_reference": "train.plot --save-reference",
    "train/run_folder.py:begin_run": "dit-train",
    "train/run_folder.py:drop_after": "dit-train (resumed)",
    "train/run_folder.py:append": "dit-train",
    "sample/evaluate/evaluation.py:_write_reference": "dit-evaluate --make-reference",
    "sample/evaluate/evaluation.py:_score": "dit-evaluate --out",
    "sample/evaluate/inception_weights.py:_fetch": "dit-evaluate --inception URL",
    "sample/evaluate/reference.py:write_statistics": "dit-evaluate --make-reference",
    "sample/tune/judge.py:_publish": "dit-tune",
    "sample/tune/run.py:_publish": "dit-tune",
    "sample/outputs.py:write_npz": "dit-sample .npz",
    "sample/outputs.py:_store_array": "dit-sample .npz",
    "sample/outputs.py:write_latents": "dit-sample .safetensors",
    "sample/outputs.py:_write_png": "dit-sample FOLDER/",
    "sample/run.py:_finish": "dit-sample .png",
    "sample/sidecar.py:write": "dit-sample .npz",
    "sample/work_folder.py:begin": "dit-sample .npz",
    "sample/work_folder.py:write_part": "dit-sample .npz",
}
"""Which row comes by each function that publishes a file: {"file.py:function": name of the row}."""

ELSEWHERE = {
    "pipeline/checkpoint/mirror.py:_fetch_checkpoint": "tests/train/test_mirror.py",
    "pipeline/checkpoint/remote.py:localized": "tests/train/test_mirror.py",
    "pipeline/checkpoint/remote.py:_fetch_averages": "tests/train/test_mirror.py",
    "extract/sources/tar_files.py:without_images": "tests/extract/test_streamed_tars.py",
    "sample/evaluate/remote.py:bring_here": "tests/sample/evaluate/test_remote.py",
    "sample/evaluate/inputs.py:folder_of_copies": "tests/sample/evaluate/test_remote.py",
}
"""What no row comes by, as it needs a server that takes files; and which tests disturb it instead."""
