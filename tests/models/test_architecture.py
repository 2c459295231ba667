from dataclasses import replace

import pytest

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Architecture, Hubert, parse_conv_layers
from fairseq_lowbit.models.architecture import FASTCONV


def test_conv_layers_are_read_with_plus_and_times() -> None:
    assert parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 2 + 2 * [(64, 2, 2)]") == [
        (512, 10, 5),
        (512, 3, 2),
        (512, 3, 2),
        (64, 2, 2),
        (64, 2, 2),
    ]


def test_default_front_end_is_the_published_one() -> None:
    layers = [(64, 10, 5), (128, 3, 2), (128, 1, 1), (128, 3, 2), (128, 1, 1)]
    layers += [(256, 3, 2), (256, 1, 1), (256, 3, 2), (256, 1, 1)]
    layers += [(512, 2, 2), (512, 1, 1), (512, 2, 2), (512, 1, 1)]
    assert parse_conv_layers(FASTCONV) == layers


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('false')",
        "[(open('x').read(), 1, 1)]",
        "[c for c in [(1, 1, 1)]]",
        "[(8, 10, 5)] if True else []",
        "(lambda: [(8, 10, 5)])()",
        "[(8, 10, 5)][0:1]",
        "[(2 ** 3, 10, 5)]",
    ],
)
def test_code_is_refused_and_never_run(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.eval", lambda *_: pytest.fail("evaluated"))
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("executed"))
    with pytest.raises(LowbitError, match="conv_feature_layers"):
        parse_conv_layers(text)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "8", "[8]", "[(8, 10)]", "[(8, 10, 5, 1)]", "[(8, 10, 0)]", "[(8, -1, 5)]",
     "[(8, 10, 5.0)]", "[('8', 10, 5)]", "[(8, 10, 5)", "(8, 10, 5)", "[(8, 10, 5)] + 3",
     "[(8, 10, 5)] * [2]", "[([8], [10], [5])]"],
)  # fmt: skip
def test_anything_but_triples_of_positive_integers_is_refused(text: str) -> None:
    with pytest.raises(LowbitError, match="list of \\(channels, kernel, stride\\)") as error:
        parse_conv_layers(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("extractor_mode", "batch_norm", "'batch_norm'; allowed are default, layer_norm"),
        ("padding", "none", "'none'; allowed are valid, fairseq"),
        ("encoder_attention_heads", 5, "768 is not divisible by model.encoder_attention_heads 5"),
        ("conv_pos_groups", 7, "768 is not divisible by model.conv_pos_groups 7"),
        ("conv_feature_layers", "[(8, 10)]", "conv_feature_layers"),
    ],
)
def test_impossible_shapes_are_refused_with_their_key(field: str, value, message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        Hubert(replace(Architecture(), **{field: value}))


def test_mapping_takes_what_it_knows() -> None:
    shape = Architecture.from_mapping({"encoder_layers": 3, "_name": "hubert", "label_rate": 50})
    assert shape == Architecture(encoder_layers=3)
