"""Every figure shows the numbers it is drawn from, and can be read."""

import re
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

from fairseq_lowbit.models import Architecture, Hubert, LoadedModel
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.nn.attention import OPERANDS
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.report.drawing import Drawing
from fairseq_lowbit.report.inside.anatomy import Anatomy, dissect
from fairseq_lowbit.report.inside.dissection import anatomy_drawings
from fairseq_lowbit.report.style import as_bytes, styled
from tests.shapes import TINY

WAVEFORM = torch.randn(1, 900, generator=torch.Generator().manual_seed(1))
QUANTIZED = ("sqnr", "clipping", "levels", "weights", "attention")


@cache
def example(name: str) -> tuple[Anatomy, dict[str, Drawing]]:
    """A model of a precision by name, and what is drawn of it."""
    anatomy = anatomy_of(Precision(name))
    return anatomy, {d.name.removeprefix("x_"): d for d in anatomy_drawings("x", anatomy)}


def anatomy_of(precision: Precision, shape: Architecture = TINY, teacher: bool = True) -> Anatomy:
    torch.manual_seed(0)
    model, other = Hubert(shape, precision=precision).eval(), Hubert(shape).eval()
    for linear in (m for m in model.encoder.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.3)
    calibrate(model, [WAVEFORM], model.final_output)
    student, teacher_model = (
        LoadedModel(m, "x.pt", 0, has_final_projection=True, normalize=False)
        for m in (model, other)
    )
    return dissect(student, teacher_model if teacher else None, WAVEFORM)


def drawn(precision: Precision, **kwargs) -> dict[str, Drawing]:
    drawings = anatomy_drawings("My model", anatomy_of(precision, **kwargs))
    return {drawing.name.removeprefix("my_model_"): drawing for drawing in drawings}


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def check_readable(drawing: Drawing) -> None:
    """As promised to the page: its names, and text of a size and in a place to be read."""
    assert re.fullmatch("[a-z0-9_]+", drawing.name)
    assert drawing.title.startswith("My model: ")
    assert drawing.caption.endswith(".")
    figure = drawing.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    with styled():
        figure.draw_without_rendering()
        drawn_box = figure.get_tightbbox(renderer)
    width, height = figure.get_size_inches()
    assert width <= 5
    assert -0.02 < drawn_box.x0 < drawn_box.x1 < width + 0.02
    assert -0.02 < drawn_box.y0 < drawn_box.y1 < height + 0.02
    for text in figure.findobj(Text):
        assert text.get_fontsize() >= 8, text
    titles = [
        t for t in figure.findobj(Text) if t.axes and t.get_text() == t.axes.get_title("left")
    ]
    check_apart([title for title in titles if title.get_text()], renderer)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        if axes.axison:
            labels = axes.get_xticklabels()
            check_apart([t for t in labels if low <= t.get_position()[0] <= high], renderer)


def check_apart(texts: list[Text], renderer: RendererAgg) -> None:
    boxes = [text.get_window_extent(renderer) for text in texts]
    for (one, box), (other, next_box) in combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(next_box), (one, other)


def everywhere(method: str, weight: int, activation: int, **kwargs) -> Precision:
    rules = [Rule("*", method, weight, activation, **kwargs)]
    rules += [Rule(f"*.{name}", method, activation_bits=activation) for name in OPERANDS]
    if activation == 1 and method not in ("elastic", "stretched"):
        rules += [Rule("feature_extractor.*", "none")]
    return Precision("float", rules)


@pytest.mark.parametrize(
    "precision",
    [
        everywhere("elastic", 1, 1),
        everywhere("elastic", 3, 2, granularity="per_channel"),
        everywhere("stretched", 2, 8, granularity="per_group", group_size=2),
        everywhere("squashed", 1, 8),
        everywhere("squashed", 8, 4),
        everywhere("absmax", 4, 1),
        everywhere("minmax", 8, 4, granularity="per_tensor"),
    ],
    ids=lambda precision: f"{precision.rules[0].method}-{precision.rules[0].weight_bits}",
)
def test_every_method_is_drawn(precision: Precision) -> None:
    assert tuple(drawn(precision)) == QUANTIZED


MIXED = [
    Rule("*.1.self_attn.q_proj", "squashed", 4),
    Rule("feature_extractor.*", "minmax", weight_bits=8, activation_bits=8),
    Rule("final_proj", weight_bits=2, activation_bits=4),
]


@pytest.mark.parametrize("layers, rules", [(3, MIXED), (12, [])])
def test_deep_and_mixed_models_are_readable(layers: int, rules: list[Rule]) -> None:
    shape = replace(TINY, encoder_layers=layers)
    drawings = drawn(Precision("bitla_w2a2", rules), shape=shape)
    for drawing in drawings.values():
        check_readable(drawing)
    labels = [t.get_text() for t in drawings["sqnr"].figure.axes[0].get_yticklabels()]
    assert labels == [str(layer) for layer in range(1, layers + 1)]


def test_noise_clipping_and_levels_are_told_of_every_quantizer() -> None:
    anatomy = anatomy_of(everywhere("elastic", 2, 3), teacher=False)
    sqnr, clipping, levels, _ = anatomy_drawings("x", anatomy)
    health = anatomy.quantizers
    assert sorted(texts_of(sqnr.figure)) == sorted(f"{h.sqnr_db:.1f}" for h in health)
    shares = [float(text.strip("%")) for text in texts_of(clipping.figure)]
    assert sorted(shares) == pytest.approx(sorted(100 * h.clipped for h in health), abs=1)
    assert sorted(texts_of(levels.figure)) == sorted(f"{h.entropy:.2f}/{h.bits}" for h in health)
    weights, activations, outside = sqnr.figure.axes
    assert [axes.get_title("left") for axes in (weights, activations, outside)] == [
        "weights",
        "activations",
        "outside the layers",
    ]
    # A cell where it belongs: second layer, fc1.
    by_name = {h.name: h for h in health}
    column = [t.get_text() for t in weights.get_xticklabels()].index("fc1")
    expected = by_name["encoder.layers.1.fc1.weight_quantizer"].sqnr_db
    assert weights.images[0].get_array()[1, column] == pytest.approx(expected)
    rows = [t.get_text() for t in outside.get_yticklabels()]
    assert rows[:3] == ["conv_layers.0", "conv_layers.1", "conv_layers.2"]
    assert {"post_extract_proj", "pos_conv", "final_proj"} < set(rows)
    expected = by_name["final_proj.input_quantizer"].sqnr_db
    assert outside.images[0].get_array()[rows.index("final_proj"), 1] == pytest.approx(expected)


def test_a_place_without_a_quantizer_stays_empty() -> None:
    figure = drawn(Precision("bitl_w2a4", [Rule("*.0.fc1", "none")]))["sqnr"].figure
    column = [t.get_text() for t in figure.axes[0].get_xticklabels()].index("fc1")
    cells = np.ma.masked_invalid(figure.axes[0].images[0].get_array())
    assert cells.mask[:, column].tolist() == [True, False]
    assert cells.mask.sum() == 1


def test_other_weights_are_shown_against_their_levels() -> None:
    figure = example("bitl_w1a1")[1]["weights"].figure
    assert figure.axes[0].lines[0].get_xdata().tolist() == [-1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "weight",
        "teacher's weight",
        "levels",
    ]


def test_teacher_and_student_share_a_scale() -> None:
    anatomy, drawings = example("bitla_w2a2")
    figure = drawings["attention"].figure
    head = anatomy.attention[0]
    teacher, student = figure.axes[:2]
    assert teacher.get_title("left") == f"layer 1, head {head.head + 1}: teacher"
    assert student.get_title("left") == f"student: {head.moved:.0%} moved"
    assert teacher.images[0].norm is student.images[0].norm
    assert np.array_equal(teacher.images[0].get_array(), head.teacher)
    assert np.array_equal(student.images[0].get_array(), head.student)
    seconds = len(head.student) * 20 / 16000
    assert list(student.images[0].get_extent()) == pytest.approx([0, seconds, seconds, 0])


def test_uniform_attention_says_so() -> None:
    anatomy, _ = example("bitla_w1a1")
    heads = [replace(head, student=torch.full((4, 4), 0.25)) for head in anatomy.attention[:2]]
    only_attention = replace(anatomy, quantizers=(), weights=(), attention=tuple(heads))
    (drawing,) = anatomy_drawings("x", only_attention)
    assert texts_of(drawing.figure) == ["uniform", "uniform"]


def test_a_float_model_is_drawn_by_how_its_attention_differs() -> None:
    assert drawn(Precision(), teacher=False) == {}
    (drawing,) = drawn(Precision()).values()
    check_readable(drawing)
    assert drawing.title == "My model: attention of teacher and student"


@pytest.mark.parametrize("name, slug", [("W1A1 (best)", "w1a1_best"), ("--", "other")])
def test_names_of_drawings_start_with_a_slug(name: str, slug: str) -> None:
    assert [d.name for d in anatomy_drawings(name, anatomy_of(Precision()))] == [
        f"{slug}_attention"
    ]


def test_figures_render_to_files() -> None:
    _, drawings = example("bitla_w2a2")
    assert as_bytes(drawings["weights"].figure, "svg").startswith(b"<?xml")
    assert as_bytes(drawings["attention"].figure, "png").startswith(b"\x89PNG")
