"""The paper's table: what its reasons claim, computed."""

import re

import pytest

from fairseq_lowbit.configurations import meta_model, model_config
from fairseq_lowbit.profiling import Profile, profile
from fairseq_lowbit.profiling.paper import CELLS, GIBI, TABLE, Cell

CELL = {(row.name, key): cell for row in TABLE for key, cell in row.cells.items()}
FRAMES, WIDTH, LAYERS, K = 500, 768, 12, 66.5
SQUARE = 2 * LAYERS * FRAMES * WIDTH**2  # of one 768 x 768 product in each layer
FEED_FORWARD, OTHERS, LINEARS = 8 * SQUARE, 4 * SQUARE, 12 * SQUARE
ATTENTION = 2 * SQUARE


def count(model: str) -> Profile:
    return profile(meta_model(model_config("float", [f"model={model}"])), model)


def quantized(precision: str) -> Profile:
    return profile(meta_model(model_config(precision, [])), precision)


def part(counted: Profile, prefix: str) -> float:
    """1e9 operations of the modules whose names begin so."""
    return sum(cost.operations for cost in counted.costs if cost.module.startswith(prefix)) / 1e9


@pytest.fixture(scope="module")
def fast() -> Profile:
    return count("fastconv_base")


@pytest.fixture(scope="module")
def base() -> Profile:
    return count("hubert_base")


def in_the_papers_way(counted: Profile, layers: int = LAYERS) -> float:
    """GFLOPs of a float model."""
    dense = (
        part(counted, "feature_extractor"),
        part(counted, "encoder.pos_conv") * FRAMES / 499,
        part(counted, "post_extract_proj") * FRAMES / 499,
    )
    return sum(dense) + (LINEARS + ATTENTION) / 1e9 * layers / LAYERS


def numbers(note: str) -> set[str]:
    return set(re.findall(r"\d+\.\d\d\b", note))


def text(*values: float) -> set[str]:
    return {f"{value:.2f}" for value in values}


def test_float_operations(fast: Profile, base: Profile) -> None:
    cell = CELL["HuBERT-FastConv", "gflops"]
    total = in_the_papers_way(fast)
    assert f"{total:.2f}" == str(cell) == "110.79"
    own = [part(fast, name) for name in ("feature_extractor", "encoder.pos_conv", "post_extract")]
    attention = sum(c.operations for c in fast.costs if c.module.endswith(("scores", "context")))
    counted = [*own, part(fast, "encoder.layers") - attention / 1e9, attention / 1e9]
    assert sum(counted) == pytest.approx(fast.flops / 1e9)
    theirs = [own[0], own[1] * 500 / 499, own[2] * 500 / 499, LINEARS / 1e9, ATTENTION / 1e9]
    assert numbers(cell.note) == text(*counted, *theirs, total, fast.flops / 1e9)

    note = CELL["HuBERT Base", "gflops"].note
    large = in_the_papers_way(base)
    ratios = large / total, base.flops / fast.flops
    assert f"{ratios[0]:.2f}" == str(CELL["HuBERT Base", "runtime"])
    assert round(ratios[0] * total) == CELL["HuBERT Base", "gflops"].value
    claimed = (part(base, "feature_extractor"), large, total, *ratios)
    assert numbers(note) == text(*claimed, base.flops / 1e9, fast.flops / 1e9)


def test_distilhubert(fast: Profile, base: Profile) -> None:
    counted, cell = count("distilhubert"), CELL["DistilHuBERT", "runtime"]
    theirs, total = in_the_papers_way(base, layers=2), in_the_papers_way(fast)
    claimed = (theirs, theirs / total, total, counted.flops / 1e9, counted.flops / fast.flops)
    assert numbers(cell.note) == text(*claimed, fast.flops / 1e9, cell.value, cell.value * total)
    assert "not explained" in cell.note


def eight_bits(fast: Profile) -> tuple[float, float]:
    """1e9 operations of encoder linears and of attention products, as BiT-LA counts them."""
    attention = sum(c.operations for c in fast.costs if c.module.endswith(("scores", "context")))
    return part(fast, "encoder.layers") - attention / 1e9, attention / 1e9


def test_quantized_operations(fast: Profile) -> None:
    one_bit = FEED_FORWARD / 2**30
    assert f"{one_bit:.2f}" == str(CELL["BiT-L W1A1", "gquantops"])
    for name in ("SqWQ W8", "SqWQ W4", "SqWQ W2", "SqWQ W1", "BiT-L W8A8"):
        assert f"{8 * one_bit:.2f}" == str(CELL[name, "gquantops"])
    cell = CELL["BiT-LA W8A8", "gquantops"]
    assert f"{4.5 * 8 * one_bit:.2f}" == str(cell)
    counted = eight_bits(fast)
    claimed = (8 * one_bit, (LINEARS + ATTENTION) / FEED_FORWARD, *counted)
    assert numbers(cell.note) == text(*claimed)
    assert "4.5 times the 421.88" in cell.note
    assert numbers(CELL["SqWQ W8", "gquantops"].note) == text(one_bit, 8 * one_bit, counted[0])


def test_bit_l_at_one_bit(fast: Profile) -> None:
    flops, operations, runtime = (
        CELL["BiT-L W1A1", key] for key in ("gflops", "gquantops", "runtime")
    )
    total = in_the_papers_way(fast)
    claimed = (total - flops.value, LINEARS / 1e9, FEED_FORWARD / 1e9, OTHERS / 1e9)
    front = [part(fast, name) for name in ("feature_extractor", "encoder.pos_conv", "post_extract")]
    counted = quantized("bitl_w1a1")
    assert counted.flops / 1e9 == pytest.approx(sum(front) + eight_bits(fast)[1])
    ours = (*front, eight_bits(fast)[1], counted.flops / 1e9)
    assert numbers(flops.note) == text(*claimed, total, *ours)
    follows = (flops.value + operations.value / K) / total
    assert f"{follows:.2f}" == str(runtime)
    said = (flops.value, operations.value, total, runtime.value)
    assert numbers(runtime.note) == text(*said)


def test_bit_la_at_one_and_two_bits(fast: Profile) -> None:
    flops, one, two = (
        CELL["BiT-LA W1A1", "gflops"],
        CELL["BiT-LA W1A1", "runtime"],
        CELL["BiT-LA W2A2", "runtime"],
    )
    left = in_the_papers_way(fast) - (LINEARS + ATTENTION) / 1e9
    front = (
        part(fast, "feature_extractor"),
        *(part(fast, name) * FRAMES / 499 for name in ("encoder.pos_conv", "post_extract")),
    )
    counted = {bits: quantized(f"bitla_w{bits}a{bits}") for bits in (1, 2)}
    own = counted[1].flops / 1e9
    assert numbers(flops.note) == text(*front, left, flops.value - left, own)

    def quantops(runtime: float) -> float:
        return (runtime * 110.79 - flops.value) * K

    ranges = [(quantops(cell.value - 0.005), quantops(cell.value + 0.005)) for cell in (two, one)]
    for low, high in ranges:
        assert f"{low:.0f} to {high:.0f}" in two.note
    (lowest_of_two, _), (_, highest_of_one) = ranges
    assert lowest_of_two > 2 * highest_of_one
    said = (flops.value, two.value, one.value)
    assert numbers(two.note) == text(*said, *(c.quantops / 1e9 for c in counted.values()))
    assert f"counted, {counted[1].runtime(fast, K):.3f} at K = {K}" in one.note
    assert f"{counted[1].runtime(fast, K):.2f}" == str(one)


def test_cells() -> None:
    assert {key for _, key in CELL} == set(CELLS)
    between = Cell(189.1, upper=189.4, digits=1)
    assert str(between) == "189.1 to 189.4"
    assert [between.difference(x) for x in (189.0, 189.2, 189.5)] == pytest.approx([-0.1, 0, 0.1])
    assert Cell(7.0).difference(7.5) == 0.5


def test_cells_of_another_unit_are_compared_in_ours() -> None:
    cell = CELL["SqWQ W8", "gquantops"]
    assert cell.describe() == "421.88 Gibit = 452.99"
    assert cell.difference(678.12) == pytest.approx(225.13, abs=0.01)
    assert cell.describe_difference(678.12) == "+225.13 (+49.7%)"
    assert {c.unit for (_, key), c in CELL.items() if key == "gquantops"} == {GIBI}
    assert {c.unit for (_, key), c in CELL.items() if key != "gquantops"} == {1.0}


@pytest.mark.parametrize(
    "cell, ours, shown",
    [
        (Cell(0.12), 0.1241, "0.00"),  # rounds to the cell: nothing is known of the rest
        (Cell(0.15), 0.1373, "-0.01 (-8%)"),  # half of its last digit is 3%
        (Cell(110.79), 105.0, "-5.79 (-5.2%)"),
        (Cell(153, digits=0), 148.1, "-4.90 (-3%)"),
        (Cell(189.1, upper=189.4, digits=1), 189.3, "0.00"),
    ],
)
def test_no_difference_is_finer_than_the_cell(cell: Cell, ours: float, shown: str) -> None:
    assert cell.describe_difference(ours) == shown
