import pytest
import torch

from pipeline.diffusion.denoiser import at_least_float32, check_batch, mean_over_sample, split_output


def test_half_precision_is_promoted_and_float64_kept():
    x = torch.ones(1, 1, 1, 1)
    assert at_least_float32(x.half()).dtype == torch.float32
    assert at_least_float32(x.double()).dtype == torch.float64


def test_the_output_is_the_prediction_then_the_variance_channels():
    output = torch.arange(4.0).view(1, 4, 1, 1)
    prediction, fraction = split_output(output, torch.zeros(1, 2, 1, 1), learns_variance=True)
    assert prediction.flatten().tolist() == [0, 1]
    assert fraction.flatten().tolist() == [2, 3]
    assert split_output(output, torch.zeros(1, 4, 1, 1), learns_variance=False) == (output, None)


def test_an_output_on_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"the network gave \[1, 4, 2, 2\], but .* needs \[1, 4, 2, 3\]"):
        split_output(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 3), learns_variance=False)


@pytest.mark.parametrize(("t", "noise"), [((1,), (3, 2, 2, 2)), ((3,), (1, 2, 2, 2)), ((3, 1), (3, 2, 2, 2))])
def test_what_would_broadcast_in_silence_is_refused(t, noise):
    with pytest.raises(ValueError, match=r"x_start has shape \[3, 2, 2, 2\], so noise must have it too and t be \[3\]"):
        check_batch(torch.zeros(3, 2, 2, 2), torch.zeros(t), torch.zeros(noise))


def test_means_are_per_sample():
    assert mean_over_sample(torch.arange(8.0).view(2, 1, 2, 2)).tolist() == [1.5, 5.5]
