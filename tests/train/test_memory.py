"""Will it fit: said before the first step, and refused with a setting that fits."""

import pytest

from pipeline.dit import DiTConfig
from pipeline.dit.memory import StepSettings, activation_bytes, forward_bytes, step_memory
from pipeline.runtime.errors import UserError
from tests.train.runs import lines, train
from train import memory

XL = DiTConfig.from_preset("DiT-XL/2")
GIB = 2**30


def total(**settings):
    return sum(step_memory(XL, StepSettings(**settings)).values())


def test_the_papers_network_takes_what_was_traced_of_it():
    """10.06 GiB that stay, 1.26 of casts and 0.41 an image (0.047 with checkpointing): 116 GiB for the batch of 256."""
    terms = step_memory(XL, StepSettings(images=256))
    fixed = sum(terms[name] for name in ("weights", "averages", "AdamW"))
    assert fixed / GIB == pytest.approx(10.06, abs=0.01) and terms["casts"] / GIB == pytest.approx(1.26, abs=0.01)
    assert total(images=256) / GIB == pytest.approx(116, rel=0.02)
    assert (total(images=257) - total(images=256)) / GIB == pytest.approx(0.41, rel=0.02)
    more, fewer = (total(images=images, checkpointing=True) for images in (257, 256))
    assert (more - fewer) / GIB == pytest.approx(0.047, rel=0.1)


@pytest.mark.parametrize(("precision", "added"), [("no", (79.3 * 0.101, 16.1)), ("bf16", (52.2 * 0.268, 20.1))])
def test_normalized_queries_and_keys_count_once_by_the_norm_that_does_it(precision, added):
    def kept(**fields):
        config = DiTConfig.from_preset("DiT-B/2", input_size=32, **fields)
        return activation_bytes(config, precision=precision, checkpointing=False) / config.tokens / config.hidden_size

    release, layer = kept(), kept(qk_norm=True)
    assert layer - release == pytest.approx(12 * added[0], rel=1e-3)
    assert kept(norm="rms") == release
    assert kept(qk_norm=True, norm="rms") - release == pytest.approx(12 * added[1], rel=1e-3)


def test_each_setting_that_is_advised_needs_less_and_ddp_needs_its_gradients_too():
    assert total(images=32, processes=2) - total(images=32) == pytest.approx(4 * 675e6, rel=0.01)
    assert total(images=32, processes=8, shards=8) < total(images=32, processes=8) < total(images=64, processes=8)
    assert total(images=128, accumulation=2) < total(images=256)
    assert total(images=32, averages=2) - total(images=32) == pytest.approx(4 * 675e6, rel=0.01)


def test_previews_count_with_their_vae_and_as_much_as_they_exceed_a_step():
    """Beside a large batch only the VAE does; beside one image its passes, and for large pictures their decoding."""
    assert total(images=256, previews=16) - total(images=256) == 4 * 83_653_863
    small = [step_memory(XL, StepSettings(images=1, processes=8, previews=number)) for number in (16, 256)]
    passes = small[1]["activations"] - small[0]["activations"]
    assert passes / GIB == pytest.approx(240 * 0.023, rel=0.05)
    large = DiTConfig.from_preset("DiT-S/8", input_size=128)
    drawn = step_memory(large, StepSettings(images=1, processes=8, previews=1))
    assert (drawn["activations"] + drawn["casts"]) / GIB == pytest.approx(3.0, abs=0.1)


def test_a_card_that_is_too_small_is_refused_with_the_settings_that_fit():
    asked = StepSettings(images=256)
    with pytest.raises(UserError) as refused:
        memory.refuse_too_small_a_card(XL, asked, 80 * 10**9, allowed=False)
    assert "needs about 125" in str(refused.value) and "has 80.0 GB; --grad-accumulation 2 would fit" in str(
        refused.value
    )
    with pytest.raises(UserError, match=r"--grad-accumulation 64 --gradient-checkpointing would fit|--gradient-check"):
        memory.refuse_too_small_a_card(XL, asked, 16 * 10**9, allowed=False)
    with pytest.raises(UserError, match="take a smaller --model"):
        memory.refuse_too_small_a_card(XL, asked, 8 * 10**9, allowed=False)
    memory.refuse_too_small_a_card(XL, asked, 141 * 10**9, allowed=False)
    memory.refuse_too_small_a_card(XL, asked, None, allowed=False)


def test_who_insists_is_warned_and_goes_on(caplog):
    memory.refuse_too_small_a_card(XL, StepSettings(images=256), 80 * 10**9, allowed=True)
    assert "needs about 125" in caplog.text


def test_the_check_stands_before_the_first_step_of_a_run(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_bytes", lambda _device: 10**9)
    assert train(store, tmp_path / "run", "--batch-size", "8", steps=2) == 2
    assert "--anyway" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert train(store, tmp_path / "run", "--anyway", steps=1) == 0
    assert len(lines(tmp_path / "run")) == 1


def test_a_dry_run_says_what_a_gpu_holds_and_writes_nothing(store, tmp_path, capsys):
    flags = ["--dry-run", "--model", "DiT-XL/2", "--batch-size", "256"]
    assert train(store, tmp_path / "run", *flags, steps=2, depth=None) == 0
    said = capsys.readouterr().err
    for part in ("673.7 M", "bf16", "AdamW 5.4 GB", "\ninstead ", "nothing was written"):
        assert part in said
    assert "VAE of previews" not in said
    assert train(store, tmp_path / "run", "--dry-run", "--sample-every", "5", steps=2) == 0
    assert "VAE of previews 334.6 MB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sampling_counts_the_latents_it_moves():
    """Networks of the same tokens and width, of latents four times as large."""
    small, large = (DiTConfig.from_preset(f"DiT-S/{size}", input_size=16 * size) for size in (2, 4))
    held = [forward_bytes(config, 8, precision="bf16") for config in (small, large)]
    assert held[1] - held[0] >= 8 * 4 * 4 * (64 * 64 - 32 * 32)
