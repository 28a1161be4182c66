import math

import torch

from pipeline.dit.embeddings import position_table, timestep_features


def test_timestep_features_are_the_references(golden, relative_error):
    # exp rounds by the CPU (AVX2, AVX-512): half a unit of a frequency's last place is 3e-5 of a radian at t = 999
    assert relative_error(timestep_features(golden["forward.t"]), golden["forward.t_freq"]) < 1e-5


def test_timestep_features_stay_float32_whatever_comes_in():
    whole = timestep_features(torch.tensor([0, 999]))
    assert whole.dtype == torch.float32
    assert torch.equal(whole, timestep_features(torch.tensor([0.0, 999.0], dtype=torch.float64)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whole, timestep_features(torch.tensor([0, 999])))


def test_the_position_table_is_the_references(golden):
    assert torch.equal(position_table(4, 4, 64), golden["state.pos_embed"])


def test_on_a_non_square_grid_the_first_half_tells_the_column_and_the_second_the_row():
    table = position_table(2, 3, 8).view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    expected = torch.tensor([math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)])
    torch.testing.assert_close(table[0, 2, :4], expected)


def test_the_position_table_is_made_where_float64_exists_and_moved(monkeypatch):
    """Apple's GPUs have no float64; the default device may be one."""
    made, arange = [], torch.arange

    def noted(*args, **options):
        made.append(arange(*args, **options))
        return made[-1]

    monkeypatch.setattr(torch, "arange", noted)
    with torch.device("meta"):
        table = position_table(2, 3, 8)
    assert {values.device.type for values in made} == {"cpu"}
    assert (table.device.type, table.dtype, list(table.shape)) == ("meta", torch.float32, [1, 6, 8])
