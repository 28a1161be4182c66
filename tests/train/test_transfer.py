"""Fine-tuning: one network's weights fitted into another, and a report that tells what became of each tensor."""

import pytest
import torch

from pipeline.dit import DiT, DiTConfig
from pipeline.dit.config import BLOCKS
from pipeline.runtime.errors import UserError
from train.init_from import fit_weights

TABLE = "y_embedder.embedding_table.weight"


def config(**changes):
    return DiTConfig(**{"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3, **changes})


def network(seed, **changes):
    """A network whose every weight differs from zero."""
    model = DiT(config(**changes), seed=None)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    return model.eval()


def clone(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fit(source, target, **options):
    report = fit_weights(clone(source), target, source_config=source.config, **options)
    told = [*report.copied, *report.adapted, *report.new]
    assert {name for name in told if name not in {"pos_embed", "norm", "rotary"}} == set(target.state_dict()), (
        "every tensor is told of"
    )
    assert len(told) == len(set(told)), "and once"
    return report


def names(*classes, ids=()):
    return list(classes), list(ids)


def test_an_equal_network_is_copied_whole():
    source, target = network(1), network(2)
    report = fit(source, target)
    assert not report.adapted
    assert not report.new
    assert all(torch.equal(tensor, clone(source)[name]) for name, tensor in target.state_dict().items())


def test_classes_known_by_folder_name_or_readable_name_keep_their_rows_and_so_does_the_null_class():
    source, target = network(1), network(2, num_classes=4)
    report = fit(
        source,
        target,
        source_names=names("tench, Tinca tinca", "great white shark", "hen", ids=["n1", "n2", "n3"]),
        target_names=names("HEN", "tench", "robot", "a shark", ids=["", "", "", "n2"]),
    )
    old, new = source.state_dict()[TABLE], target.state_dict()[TABLE]
    assert torch.equal(new[[0, 1, 3, 4]], old[[2, 0, 1, 3]])
    torch.testing.assert_close(new[2], old[:3].mean(dim=0))
    assert report.adapted[TABLE] == "3 of 4 classes kept, 1 at the mean of the source's classes; the null row kept"


def test_an_ambiguous_name_keeps_no_row():
    source, target = network(1), network(2)
    fit(source, target, source_names=names("crane", "crane", "hen"), target_names=names("crane", "hen", "ox"))
    old, new = source.state_dict()[TABLE], target.state_dict()[TABLE]
    torch.testing.assert_close(new[0], old[:3].mean(dim=0))
    assert torch.equal(new[1], old[2])


def test_labels_that_stand_in_for_names_are_no_names():
    """What is read of a bare state dict: its classes are called 0, 1, 2."""
    source, target = network(1), network(2)
    report = fit(source, target, source_names=names("0", "1", "2"), target_names=names("a", "b", "c"))
    assert TABLE in report.copied


def test_as_many_classes_of_other_names_are_not_taken_for_the_same_classes():
    source, target = network(1), network(2)
    report = fit(source, target, source_names=names("a", "b", "c"), target_names=names("x", "y", "z"))
    assert report.adapted[TABLE].startswith("0 of 3 classes kept, 3 at the mean")


@pytest.mark.parametrize("labels", ["mean", "new"])
def test_rows_can_start_at_the_mean_or_afresh(labels):
    source, target = network(1), network(2, num_classes=5)
    fresh = clone(target)[TABLE]
    report = fit(source, target, labels=labels)
    old, new = source.state_dict()[TABLE], target.state_dict()[TABLE]
    assert torch.equal(new[5], old[3]), "the null row is kept"
    expected = fresh[:5] if labels == "new" else old[:3].mean(dim=0).expand(5, -1)
    torch.testing.assert_close(new[:5], expected)
    assert "0 of 5 classes kept" in report.adapted[TABLE]


def test_a_mapping_of_labels_may_be_given():
    source, target = network(1), network(2, num_classes=2)
    fit(source, target, class_mapping={0: 2, 1: 1})
    assert torch.equal(target.state_dict()[TABLE], source.state_dict()[TABLE][[2, 1, 3]])


def test_an_unconditional_network_gives_its_one_row_to_the_null_class_and_to_every_class():
    source, target = network(1, num_classes=0), network(2)
    fit(source, target)
    assert torch.equal(target.state_dict()[TABLE], source.state_dict()[TABLE].expand(4, -1))


def test_the_null_row_may_be_absent_on_either_side():
    with_null, without = network(1), network(2, class_dropout_prob=0.0)
    classes = names("a", "b", "c")
    fit(with_null, without, source_names=classes, target_names=classes)
    assert torch.equal(without.state_dict()[TABLE], with_null.state_dict()[TABLE][:3])
    source, target = network(3, class_dropout_prob=0.0), network(4)
    report = fit(source, target, source_names=classes, target_names=classes)
    assert torch.equal(target.state_dict()[TABLE][:3], source.state_dict()[TABLE])
    assert report.adapted[TABLE] == "3 of 3 classes kept; no null row"


@pytest.mark.parametrize("known", [True, False])
def test_the_mean_of_a_source_without_a_null_row_is_over_all_its_classes(known):
    source, target = network(3, class_dropout_prob=0.0), network(4)
    names_of = names("a", "b", "c") if known else ((), ())
    fit(source, target, source_names=names_of, target_names=names("x", "y", "z"))
    table, found = source.state_dict()[TABLE], target.state_dict()[TABLE]
    assert len(table) == 3
    torch.testing.assert_close(found[3], table.mean(0))
    torch.testing.assert_close(found[:3], table.mean(0).expand(3, -1) if known else table)


@pytest.mark.parametrize("mapping", [{0: 9}, {7: 0}])
def test_a_mapping_to_or_from_no_label_is_refused(mapping):
    with pytest.raises(UserError, match="labels go to 2 here and to 2 in the source"):
        fit(network(1), network(2), class_mapping=mapping)


def test_another_grid_has_its_own_position_table():
    source, target = network(1), network(2, input_size=(8, 6))
    table = target.pos_embed.clone()
    report = fit(source, target)
    assert report.adapted == {"pos_embed": "computed for 4×3 tokens instead of 2×2"}
    assert torch.equal(target.pos_embed, table)


@pytest.mark.parametrize("more", [True, False])
def test_channels_that_both_latents_have_keep_their_weights(more):
    small, large = network(1), network(2, in_channels=6)
    source, target = (small, large) if more else (large, small)
    fresh = clone(target)
    report = fit(source, target)
    torch.testing.assert_close(target.x_embedder.proj.weight[:, :4], source.x_embedder.proj.weight[:, :4])
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        ours = target.state_dict()[name].view(4, 2, target.config.in_channels, -1)
        theirs = source.state_dict()[name].view(4, 2, source.config.in_channels, -1)
        assert torch.equal(ours[:, :, :4], theirs[:, :, :4])
        if more:
            assert torch.equal(ours[:, :, 4:], fresh[name].view(4, 2, 6, -1)[:, :, 4:])
    kept = "4 of 4 channels kept, 2 new" if more else "4 of 6 channels kept"
    assert report.adapted["x_embedder.proj.weight"] == report.adapted["final_layer.linear.weight"] == kept


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_variance_channels_may_come_or_go(learn_sigma):
    source, target = network(1, learn_sigma=not learn_sigma), network(2, learn_sigma=learn_sigma)
    fit(source, target)
    x, t, y = torch.ones(1, 4, 4, 4), torch.zeros(1), torch.tensor([1])
    with torch.no_grad():
        torch.testing.assert_close(target(x, t, y)[:, :4], source(x, t, y)[:, :4])


def test_as_many_output_channels_of_another_meaning_are_not_copied_blindly():
    source = network(1, in_channels=4, learn_sigma=True)
    target = network(2, in_channels=8, learn_sigma=False)
    report = fit(source, target)
    assert report.adapted["final_layer.linear.bias"] == "4 of 4 channels kept, 4 new; variance channels left out"
    ours, theirs = target.final_layer.linear.bias.view(4, 1, 8), source.final_layer.linear.bias.view(4, 2, 4)
    assert torch.equal(ours[:, 0, :4], theirs[:, 0])


def test_blocks_and_layers_without_a_counterpart_stay_fresh_and_surplus_ones_are_named():
    source, target = network(1, depth=3), network(2, depth=2, qk_norm=True, patch_size=1)
    report = fit(source, target)
    assert "blocks.0.attn.q_norm.weight" in report.new
    assert report.new["x_embedder.proj.weight"] == "patches of 1×1 instead of 2×2"
    assert len(report.left_out) == 10
    assert all(name.startswith("blocks.2.") for name in report.left_out)


def test_from_the_releases_blocks_to_modern_ones_attention_is_kept_and_values_are_not_mixed_yet():
    source, target = network(1, depth=2), network(2, depth=2, **BLOCKS["modern"])
    report = fit(source, target)
    assert torch.equal(target.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert report.adapted["blocks.1.attn.value_lambda"] == "0, as the source mixes no values"
    assert target.blocks[1].attn.value_lambda.item() == 0
    assert report.new["blocks.0.mlp.fc2.weight"] == "the MLP is swiglu here, gelu in the source"
    assert (report.adapted["norm"], report.adapted["rotary"]) == ("rms instead of layer", "True instead of False")


def test_a_value_residual_added_to_a_trained_network_changes_nothing_at_first():
    source, target = network(1, depth=2), network(2, depth=2, value_residual=True)
    fit(source, target)
    x, t, y = torch.ones(1, 4, 4, 4), torch.zeros(1), torch.tensor([1])
    with torch.no_grad():
        assert torch.equal(target(x, t, y), source(x, t, y))


def test_another_width_or_other_heads_are_refused():
    with pytest.raises(UserError, match="a network of width 32, but this one has width 16"):
        fit(network(1, hidden_size=32), network(2))
    with pytest.raises(UserError, match="has 4 attention heads, but this network has 2"):
        fit(network(1, num_heads=4), network(2))


def test_the_report_reads_well():
    source, target = network(1), network(2, num_classes=4, in_channels=5)
    report = fit(source, target, source_names=names("a", "b", "c"), target_names=names("c", "d", "e", "a"))
    assert str(report).splitlines() == [
        f"{len(source.state_dict()) - 4} tensors copied as they are",
        "4 adapted:",
        "  x_embedder.proj.weight             4 of 4 channels kept, 1 new",
        f"  {TABLE}  2 of 4 classes kept, 2 at the mean of the source's classes; the null row kept",
        "  final_layer.linear.weight          4 of 4 channels kept, 1 new",
        "  final_layer.linear.bias            4 of 4 channels kept, 1 new",
    ]
