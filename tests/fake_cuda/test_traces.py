"""Training on a GPU, seen without one: nothing waits, nothing is uploaded in a step, memory stays in bounds."""

import pytest

from tests.fake_cuda.runs import GIB, MARKS, findings, trace

pytestmark = MARKS


@pytest.fixture(scope="module")
def traced(guard):
    return findings("traces.py", guard)


def test_a_training_step_reads_nothing_and_uploads_nothing_that_waits(traced):
    assert len(traced["steps"]) == 15
    for name, step in (traced["steps"] | traced["fits"]).items():
        assert (step["reads"], step["uploads"]) == ({}, {}), name
        assert step["kernels"] > 400 and step["averaging"] == 1, (
            name
        )  # one fused kernel a list of 4,096 weights or less


def test_nor_does_one_with_features_of_an_encoder_two_averages_and_factors_per_channel(traced):
    assert (traced["more"]["reads"], traced["more"]["uploads"]) == ({}, {})
    assert traced["more"]["averaging"] == 2


def test_all_numbers_of_a_logged_step_are_read_at_once(traced):
    assert traced["logged"]["asked"] == ["cuda"]


def test_a_logged_step_reads_and_uploads_nothing_either_before_its_numbers_are_asked_for(traced):
    assert (traced["logged"]["reads"], traced["logged"]["uploads"]) == ({}, {})
    assert traced["logged"]["kernels"] - traced["steps"]["as it is"]["kernels"] < 30


def test_a_training_step_launches_a_stated_number_of_kernels(traced):
    """S/2 with 12 blocks, bf16, clipped; a step more or less is a change to look at."""
    assert traced["steps"]["as it is"]["kernels"] <= 1600
    assert traced["steps"]["not clipped"]["kernels"] < traced["steps"]["as it is"]["kernels"]
    assert traced["steps"]["float32"]["kernels"] < traced["steps"]["as it is"]["kernels"]


def test_muon_launches_what_its_shapes_need_not_what_its_matrices_do_and_keeps_half_of_their_state(traced):
    """Three shapes in S/2 (four layers, of which two are square): some 60 kernels a shape, and 8 in place of 16 bytes."""
    adamw, muon = traced["steps"]["as it is"], traced["steps"]["muon"]
    assert 0 < muon["kernels"] - adamw["kernels"] < 300
    in_matrices = 12 * 12 * 384**2
    assert adamw["fixed"] - muon["fixed"] == pytest.approx(4 * in_matrices, rel=0.01)


def test_what_a_step_holds_is_weights_averages_moments_and_activations(traced):
    """16 bytes a weight stand there; checkpointing keeps a fraction of the activations of a batch of eight."""
    whole, kept = traced["steps"]["as it is"], traced["steps"]["checkpointing"]
    assert whole["fixed"] == pytest.approx(16 * 33e6, rel=0.02)
    assert whole["peak"] - whole["fixed"] < 0.9 * GIB
    assert kept["peak"] - kept["fixed"] < 0.6 * (whole["peak"] - whole["fixed"])


def test_the_formula_of_a_steps_memory_is_what_is_traced_to_5_percent(traced):
    compared = traced["steps"] | traced["fits"]
    assert len(compared) == 32
    off = {name: step["formula"] / step["peak"] for name, step in compared.items()}
    assert {name: ratio for name, ratio in off.items() if not 0.95 < ratio < 1.05} == {}


@pytest.mark.parametrize(("spoiled", "sign"), [("item", "DataDependent"), ("cpu", "device")])
def test_a_value_read_and_a_tensor_left_on_the_cpu_are_found(guard, spoiled, sign):
    done = trace("traces.py", guard, spoiled)
    assert done.returncode != 0
    assert sign in done.stderr


def test_storage_kept_from_step_to_step_is_found(guard, traced):
    step, whole = findings("traces.py", guard, "double"), traced["steps"]["as it is"]
    assert step["peak"] - step["fixed"] > 0.9 * GIB > whole["peak"] - whole["fixed"]
