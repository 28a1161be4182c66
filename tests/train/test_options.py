import pytest
import yaml

from pipeline.dit.config import BLOCKS
from pipeline.runtime.cli import parse_options
from pipeline.runtime.errors import UserError
from train.__main__ import PRESETS
from train.options import (
    AverageOptions,
    DataOptions,
    HardwareOptions,
    ObjectiveOptions,
    OptimizerOptions,
    TrainOptions,
    plain_values,
)
from train.run_folder import may_change


def parse(*arguments):
    return parse_options(
        TrainOptions,
        ["--latents", "store", "--out", "run", *arguments],
        prog="dit-train",
        description="",
        presets=PRESETS,
    )


def test_the_papers_recipe_is_the_default():
    options = plain_values(parse())
    assert {
        name: options[name] for name in ("model", "lr", "lr-schedule", "lr-warmup-steps", "weight-decay", "batch-size")
    } == {
        "model": "DiT-XL/2",
        "lr": 1e-4,
        "lr-schedule": "constant",
        "lr-warmup-steps": 0,
        "weight-decay": 0.0,
        "batch-size": 256,
    }
    assert {
        name: options[name]
        for name in ("ema-decay", "class-dropout", "flip", "objective", "prediction", "variance", "loss")
    } == {
        "ema-decay": 0.9999,
        "class-dropout": 0.1,
        "flip": True,
        "objective": "ddpm",
        "prediction": "epsilon",
        "variance": "learned-range",
        "loss": "mse",
    }
    differing = {
        name
        for name, value in yaml.safe_load((PRESETS / "paper-256.yaml").read_text()).items()
        if options[name] != value
    }
    assert differing == {"recipe"}


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_is_read_by_its_name_and_says_which_it_is(name):
    options = parse("--config", name)
    assert options.recipe == name
    assert plain_values(options) | yaml.safe_load((PRESETS / f"{name}.yaml").read_text()) == plain_values(options)


def test_the_command_line_overrides_a_preset():
    assert parse("--config", "small-data", "--batch-size", "32").optimizer.batch_size == 32


def test_resolved_options_read_back_are_the_same(tmp_path):
    options = parse(
        "--extra-ema",
        "a=0.9",
        "b=0.99",
        "--betas",
        "0.8",
        "0.95",
        "--no-flip",
        "--keep-every",
        "5",
        "--time-limit",
        "1.5",
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(plain_values(options)))
    assert parse_options(TrainOptions, ["--config", str(path)], prog="dit-train", description="") == options


def test_every_flag_that_may_change_exists():
    assert set(plain_values(parse())) >= may_change(TrainOptions, with_checkpoint=True)


def test_align_stands_for_one_alignment_and_the_other_can_be_given_beside_it():
    def align(*arguments):
        model = parse(*arguments).model
        return model.align_latent, model.align_features

    assert (
        align()
        == align("--align", "none")
        == align("--align-latent", "--align", "none", "--no-align-latent")
        == (False, False)
    )
    assert align("--align", "latent") == align("--align-latent") == (True, False)
    assert align("--align", "features") == align("--align-features") == (False, True)
    assert align("--align", "features", "--align-latent") == (True, True)


def test_blocks_stands_for_its_switches_and_one_given_beside_it_wins_in_any_order(tmp_path):
    def blocks(*arguments):
        return {name: getattr(parse(*arguments).model, name) for name in BLOCKS["release"]}

    assert blocks() == blocks("--blocks", "release") == BLOCKS["release"]
    assert blocks("--blocks", "modern") == blocks("--blocks=modern") == BLOCKS["modern"]
    one_less = BLOCKS["modern"] | {"mlp": "gelu", "qk_norm": False}
    assert blocks("--mlp", "gelu", "--blocks", "modern", "--no-qk-norm") == one_less
    written = tmp_path / "own.yaml"
    written.write_text("blocks: modern\nmlp: gelu\nqk-norm: false\n")
    assert blocks("--config", str(written)) == one_less
    assert blocks("--config", str(written), "--mlp", "swiglu") == one_less | {"mlp": "swiglu"}
    assert blocks("--config", str(written), "--blocks", "release") == BLOCKS["release"]
    off = ["--mlp", "gelu", "--norm", "layer", "--no-qk-norm", "--no-rotary", "--no-value-residual"]
    with pytest.raises(UserError, match="--blocks modern with each of its switches turned off is --blocks release"):
        parse("--blocks", "modern", *off)


def test_what_a_run_learns_may_not_change_and_where_it_starts_only_after_the_first_checkpoint():
    later, sooner = (may_change(TrainOptions, with_checkpoint=known) for known in (True, False))
    assert later - sooner == {"init-from", "init-weights", "verify-weights", "allow-other-vae"} and sooner < later
    assert {"steps", "save-every", "latents", "sharding", "keep-every", "vae"} <= sooner
    learned = {"seed", "flip", "order", "batch-size", "lr", "betas", "model", "objective", "mixed-precision"}
    assert not later & (
        learned | {"validation-share", "decay-steps", "decay-start", "ema-decay", "extra-ema", "class-dropout"}
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerOptions(batch_size=0), "--batch-size 0 must be at least 1"),
        (lambda: OptimizerOptions(betas=(0.9, 1.0)), "--betas 1.0 must be at least 0 and below 1"),
        (lambda: OptimizerOptions(clip_norm=0.0), "--clip-norm 0.0 must be above 0"),
        (lambda: OptimizerOptions(lr=float("nan")), "--lr nan must be at least 0"),
        (lambda: HardwareOptions(grad_accumulation=0), "--grad-accumulation 0 must be at least 1"),
        (lambda: OptimizerOptions(lr=float("inf")), "--lr inf must be at least 0"),
        (lambda: OptimizerOptions(weight_decay=float("inf")), "--weight-decay inf must be at least 0"),
        (
            lambda: DataOptions(latents="x", validation_share=0.9),
            "--validation-share 0.9 must be at least 0 and at most 0.5",
        ),
        (lambda: ObjectiveOptions(time_shift="auto"), "--time-shift is for --objective flow, not ddpm"),
        (
            lambda: ObjectiveOptions(objective="sit", prediction="x0"),
            "--prediction x0 is for --objective flow, not sit",
        ),
        (
            lambda: ObjectiveOptions(objective="flow", prediction="noise"),
            "--prediction noise is for --objective sit, not flow",
        ),
        (
            lambda: ObjectiveOptions(objective="repa", flow_path="vp"),
            "--flow-path vp is for --objective sit, not repa",
        ),
        (
            lambda: ObjectiveOptions(objective="sit", loss_weight="velocity"),
            "--loss-weight velocity is for --prediction noise or score",
        ),
        (lambda: AverageOptions(ema_decay=1.0), "--ema-decay 1.0 must be at least 0 and below 1"),
        (lambda: AverageOptions(extra_ema=("slow",)), "--extra-ema slow must be NAME=DECAY"),
        (lambda: AverageOptions(extra_ema=("a=0.9", "a=0.8")), "the name 'a' is taken"),
        (lambda: AverageOptions(extra_ema=("../a=0.9",)), "no plain file name"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_averages_are_named_by_their_files():
    assert AverageOptions(extra_ema=("slow=0.99995",)).decays == {"ema": 0.9999, "ema-slow": 0.99995}


def test_a_validation_store_makes_the_share_of_a_preset_superfluous():
    assert DataOptions(latents="x", validation="y", validation_share=0.1).validation_share == 0


EDGES = {
    "steps": 1, "batch-size": 1, "lr": 0.0, "lr-end": 0.0, "lr-warmup-steps": 0, "decay-steps": 1, "weight-decay": 0.0,
    "adam-eps": 0.0, "clip-norm": 1e-30, "max-skipped-in-a-row": 1, "max-rollbacks": 0, "validate-every": 1,
    "validation-samples": 1, "prefetch": 1, "class-dropout": 1.0, "ema-decay": 0.0, "grad-accumulation": 1,
    "save-every": 1, "keep-every": 1, "keep-last": 0, "log-every": 1, "time-limit": 0.0, "sample-every": 0,
    "preview-guidance": 0.0, "preview-classes": 1, "preview-rows": 1, "preview-steps": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_the_outermost_good_value_of_every_bounded_option_is_taken(name):
    assert plain_values(parse(f"--{name}={EDGES[name]}"))[name] == EDGES[name]


def test_shares_and_decays_are_taken_from_edge_to_edge():
    assert [parse(f"--validation-share={share}").data.validation_share for share in (0, 0.5)] == [0, 0.5]
    assert parse("--class-dropout=0").model.class_dropout == 0
    assert parse("--betas", "0", "0").optimizer.betas == (0, 0)
