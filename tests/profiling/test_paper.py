"""The paper's table: what its reasons claim, computed."""

import pytest

from fairseq_lowbit.configurations import meta_model, model_config
from fairseq_lowbit.profiling import profile
from fairseq_lowbit.profiling.cost import CONVERSION_RATE
from fairseq_lowbit.profiling.paper import REASONS, TABLE

CELL = {(row.name, key): cell for row in TABLE for key, cell in row.cells.items()}
FRAMES, WIDTH, LAYERS = 500, 768, 12
SQUARE = 2 * LAYERS * FRAMES * WIDTH**2  # of one 768 x 768 product in each layer
FEED_FORWARD, LINEARS, ATTENTION = 8 * SQUARE, 12 * SQUARE, 2 * SQUARE


def in_the_papers_way(model: str) -> float:
    """GFLOPs of a float model."""
    counted = profile(meta_model(model_config("float", [f"model={model}"])), model)

    def part(prefix: str) -> float:
        return sum(cost.operations for cost in counted.costs if cost.module.startswith(prefix))

    projections = part("encoder.pos_conv") + part("post_extract_proj")
    return (part("feature_extractor") + projections * FRAMES / 499 + LINEARS + ATTENTION) / 1e9


def test_float_operations() -> None:
    fast = in_the_papers_way("fastconv_base")
    assert fast == pytest.approx(CELL["HuBERT-FastConv", "gflops"], abs=0.005)
    runtime = in_the_papers_way("hubert_base") / fast
    assert runtime == pytest.approx(CELL["HuBERT Base", "runtime"], abs=0.005)


def test_quantized_operations() -> None:
    gibi = 2**30 / 1e9
    one_bit = FEED_FORWARD / 2**30
    assert CELL["BiT-L W1A1", "gquantops"] / gibi == pytest.approx(one_bit, abs=0.005)
    for name in ("SqWQ W8", "SqWQ W4", "SqWQ W2", "SqWQ W1"):
        assert CELL[name, "gquantops"] / gibi == pytest.approx(8 * one_bit, abs=0.005)
    assert f"= {one_bit:.2f} for each bit" in REASONS[1]
    assert f"its {8 * one_bit:.2f} are {CELL['SqWQ W8', 'gquantops']:.2f} of ours" in REASONS[0]


def test_a_runtime_follows_from_the_operations() -> None:
    flops, bits = CELL["BiT-L W1A1", "gflops"], CELL["BiT-L W1A1", "gquantops"]
    runtime = (flops + bits / CONVERSION_RATE) / CELL["HuBERT-FastConv", "gflops"]
    assert runtime == pytest.approx(CELL["BiT-L W1A1", "runtime"], abs=0.005)
