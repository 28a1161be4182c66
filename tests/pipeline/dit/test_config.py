import pytest

from pipeline.dit import PRESETS, ConfigError, DiTConfig
from pipeline.runtime.errors import UserError


def test_the_presets_are_the_papers_twelve_and_the_tiny_one():
    assert set(PRESETS) == {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)} | {
        "DiT-Ti/2"
    }
    sizes = {name: tuple(values.values()) for name, values in PRESETS.items()}
    assert sizes["DiT-S/8"] == (384, 12, 6, 8)
    assert sizes["DiT-B/4"] == (768, 12, 12, 4)
    assert sizes["DiT-L/2"] == (1024, 24, 16, 2)
    assert sizes["DiT-XL/2"] == (1152, 28, 16, 2)
    assert sizes["DiT-Ti/2"] == (128, 6, 4, 2)


def test_the_defaults_are_the_releases_xl_2():
    assert DiTConfig() == DiTConfig.from_preset("DiT-XL/2", input_size=32, num_classes=1000)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no model 'DiT-XXL/2'; choose --model from DiT-S/2, .*DiT-Ti/2"):
        DiTConfig.from_preset("DiT-XXL/2")


@pytest.mark.parametrize("input_size", [16, (8, 12)])
def test_json_gives_the_same_configuration_back(input_size):
    config = DiTConfig.from_preset("DiT-Ti/2", input_size=input_size, conditioning="adaln", num_classes=3)
    values = config.to_json()
    assert values["input_size"] in (16, [8, 12])
    assert DiTConfig.from_json(values) == config


def test_json_with_unknown_keys_is_refused_and_each_is_named():
    with pytest.raises(UserError, match=r"no setting colour, size; it has input_size, patch_size"):
        DiTConfig.from_json({"depth": 2, "size": 3, "colour": 1})


def test_every_mistake_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        DiTConfig(input_size=(9, 8), hidden_size=130, num_heads=4, depth=0, conditioning="film")
    message = str(caught.value)
    for part in (
        "9×8 cells does not divide into patches of 2×2",
        "hidden_size 130 does not divide among num_heads 4",
        "hidden_size 130 is no multiple of 4",
        "depth is 0 but must be at least 1",
        "conditioning is 'film' but must be one of adaln-zero, adaln, cross-attention, in-context",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"num_classes": -1}, "num_classes"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob"),
    ],
)
def test_a_number_out_of_range_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        DiTConfig(**fields)


@pytest.mark.parametrize(
    ("num_classes", "dropout", "rows", "has_null"),
    [(10, 0.1, 11, True), (10, 0.0, 10, False), (0, 0.1, 1, True), (0, 0.0, 1, True)],
)
def test_the_label_table_has_a_null_row_unless_labels_are_never_dropped(num_classes, dropout, rows, has_null):
    config = DiTConfig(num_classes=num_classes, class_dropout_prob=dropout)
    assert (config.label_rows, config.has_null_class, config.null_class) == (rows, has_null, num_classes)
