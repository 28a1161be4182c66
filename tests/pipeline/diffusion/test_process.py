import pytest

from pipeline.diffusion import GaussianDiffusion, RectifiedFlow, make_process
from pipeline.runtime.errors import UserError


def test_the_objective_names_the_process_and_defaults_are_the_papers():
    assert make_process({"objective": "ddpm"}) == GaussianDiffusion()
    assert make_process({"objective": "flow"}) == RectifiedFlow()
    assert GaussianDiffusion().to_json() == {
        "objective": "ddpm",
        "schedule": "linear",
        "steps": 1000,
        "prediction": "epsilon",
        "variance": "learned-range",
        "loss": "mse",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the objective is None, but only ddpm, flow, sit, repa exist"),
        ({"objective": "score"}, "the objective is 'score', but only ddpm, flow, sit, repa exist"),
        (
            {"objective": "flow", "steps": 10, "law": 1},
            r"steps is no setting of it \(they are timestep_law, prediction, time_mean, time_std, time_shift\); law is no setting",
        ),
        ({"objective": "ddpm", "schedule": "sigmoid"}, "schedule is 'sigmoid' but must be one of linear, cosine"),
        ({"objective": "ddpm", "kept": [0, 1000]}, "kept must rise within 0 … 999"),
        ({"objective": "ddpm", "kept": [5, 5]}, "kept must rise within 0 … 999"),
        ({"objective": "ddpm", "kept": []}, "kept must rise within 0 … 999"),
        ({"objective": "ddpm", "steps": 0}, "steps is 0 but must be at least 1"),
        (
            {"objective": "flow", "timestep_law": "beta"},
            "timestep_law is 'beta' but must be one of logit-normal, uniform",
        ),
        (
            {"objective": "flow", "time_shift": 0.0, "time_std": -1, "time_mean": float("nan")},
            "time_mean is nan but must be a finite number; time_std is -1.0 .* above 0; time_shift is 0.0 .* above 0",
        ),
        ({"objective": "flow", "time_shift": "auto"}, "time_shift is 'auto' but must be a number"),
        ({"objective": "flow", "timestep_law": "uniform", "time_mean": 1.0}, "time_mean 1 .* are of the logit-normal"),
        ({"objective": "sit", "prediction": "x0"}, "the networks of sit give v or noise or score, not x0"),
        ({"objective": "flow", "prediction": "noise"}, "the networks of flow give v or x0, not noise"),
        ({"objective": "repa", "prediction": "score"}, "the networks of repa give v, not score"),
        ({"objective": "repa", "path": "vp"}, "the networks of repa have no path vp, only linear or cosine"),
        ({"objective": "repa", "loss_weight": "velocity"}, "loss_weight is no setting of it"),
        ({"objective": "ddpm", "prediction": "x"}, "prediction is 'x' but must be one of epsilon, x0, v"),
    ],
)
def test_what_there_is_not_is_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        make_process(settings)
