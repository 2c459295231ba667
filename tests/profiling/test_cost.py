"""Counted costs against torch's own counter, stored files and figures worked out by hand."""

import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Architecture, Hubert, WithoutWeights
from fairseq_lowbit.models.architecture import FASTCONV
from fairseq_lowbit.nn.work import recorded_steps
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.profiling import Profile, profile
from tests.shapes import TINY

SECONDS = 0.5
HUBERT_FRONT_END = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"


def counted(precision: str, *rules: Rule, seconds: float = 10.0, **shape) -> Profile:
    with WithoutWeights():
        model = Hubert(Architecture(**shape), precision=Precision(precision, list(rules)))
    return profile(model, precision, seconds)


def costs(profile: Profile) -> dict[str, object]:
    return {cost.module: cost for cost in profile.costs}


@pytest.mark.parametrize("shape", [TINY, Architecture(encoder_layers=1)], ids=["tiny", "base"])
def test_float_operations_are_those_that_torch_counts(shape: Architecture) -> None:
    torch.manual_seed(0)
    model = Hubert(shape).eval()
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        x = model.begin(model.extract(torch.randn(1, int(SECONDS * 16_000))))
        for layer in model.layers:
            x = layer(x, None, "probabilities").x  # so that attention is products torch counts
    own = profile(model, "float", SECONDS)
    # A "same" convolution with an even kernel computes one frame that is cut off.
    position = costs(own)["encoder.pos_conv.0"].operations
    extra = position // x.shape[1] if shape.conv_pos % 2 == 0 else 0
    assert counter.get_total_flops() == own.flops + extra


@pytest.mark.parametrize("samples", [400, 8000, 8001])
@pytest.mark.parametrize("front_end", [TINY.conv_feature_layers, FASTCONV, HUBERT_FRONT_END])
def test_stated_calls_are_those_that_run(front_end: str, samples: int) -> None:
    model = Hubert(replace(TINY, conv_feature_layers=front_end)).eval()
    run = recorded_steps(model, lambda: model.hidden_states(torch.randn(1, samples)))
    assert model.operator_steps(samples) == run


def test_storage_is_the_size_of_the_stored_tensors() -> None:
    model = Hubert(TINY)
    stored = io.BytesIO()
    half = {name: value.half() for name, value in model.state_dict().items()}
    torch.save(half, stored)
    tensors = sum(value.numel() * value.element_size() for value in half.values())
    assert profile(model, "float", SECONDS).storage_bytes == tensors
    # The rest of the file is names.
    assert tensors < len(stored.getvalue()) < tensors + 1000 * len(half)


def test_rows_add_up_to_the_plan() -> None:
    for name in ("float", "sqwq_w2", "bitl_w1a1", "bitla_w2a2", "minmax_w4a8"):
        with WithoutWeights():
            model = Hubert(TINY, classes=7, precision=Precision(name))
        own = profile(model, name, SECONDS)
        assert own.storage_bytes == pytest.approx(model.plan.bytes)
        assert own.parameters == model.plan.parameters


@pytest.mark.parametrize(
    "precision, gflops, gquantops",
    [
        # 105.6 of which the encoder's linears are 84.76 and attention is 9.18.
        ("float", 105.64, 0.0),
        ("bitl_w1a1", 20.87, 84.76),
        ("bitl_w8a8", 20.87, 8 * 84.76),
        ("sqwq_w2", 20.87, 8 * 84.76),
        ("bitla_w1a1", 11.69, 93.94),
        ("bitla_w1a2", 11.69, 2 * 93.94),
        ("bitl_w1a16", 105.64, 0.0),
        ("bitl_w16a1", 105.64, 0.0),
    ],
)
def test_operations_at_base_size(precision: str, gflops: float, gquantops: float) -> None:
    own = counted(precision)
    assert own.flops / 1e9 == pytest.approx(gflops, abs=0.01)
    assert own.quantops / 1e9 == pytest.approx(gquantops, rel=1e-3)


def test_an_operation_counts_its_wider_operand() -> None:
    rule = Rule("*.self_attn.key", activation_bits=4)
    own = costs(counted("bitla_w1a2", rule, encoder_layers=1))
    assert own["encoder.layers.0.self_attn.scores"].bits == 4
    assert own["encoder.layers.0.self_attn.context"].bits == 2
    assert own["encoder.layers.0.fc1"].bits == 2
    half = Rule("*.self_attn.key", method="none")
    assert costs(counted("bitla_w1a2", half, encoder_layers=1))[
        "encoder.layers.0.self_attn.scores"
    ].flops


def test_linears_grow_with_the_length_and_attention_with_its_square() -> None:
    short, long = (costs(counted("float", seconds=s, encoder_layers=1)) for s in (10.0, 20.0))
    frames = 999 / 499
    for name, factor in (("fc1", frames), ("self_attn.scores", frames**2)):
        name = f"encoder.layers.0.{name}"
        assert long[name].operations == pytest.approx(factor * short[name].operations)


class LargestOperator(TorchDispatchMode):
    """Remembers the most bytes that one operator read and wrote; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            touched = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
            activations = {id(x): x for x in touched if not isinstance(x, nn.Parameter)}
            self.bytes = max(self.bytes, sum(x.nbytes for x in activations.values()))
        return result


@pytest.mark.parametrize(
    "shape, seconds",
    [
        (TINY, SECONDS),  # the norm behind the first convolution
        (replace(TINY, encoder_attention_heads=16), 4.0),  # softmax
        (replace(TINY, encoder_ffn_embed_dim=2400), 2.0),  # GELU between the two linears
    ],
    ids=["norm", "softmax", "gelu"],
)
def test_peak_activations_are_the_largest_that_runs(shape: Architecture, seconds: float) -> None:
    model = Hubert(shape).eval()
    with torch.inference_mode(), LargestOperator() as largest:
        x = model.begin(model.extract(torch.randn(1, int(seconds * 16_000))))
        for layer in model.layers:
            x = layer(x, None, "probabilities").x  # attention in single steps
    assert profile(model, "float", seconds).peak_activation_bytes == largest.bytes


def test_peak_activations_at_base_size() -> None:
    # Softmax of 12 heads' maps of 499 x 499, in and out: 23.9 MB.
    assert counted("float", encoder_layers=1).peak_activation_bytes == 23_904_096
    # The norm behind HuBERT Base's first convolution, 512 x 31,999 in and out.
    own = counted("float", encoder_layers=1, conv_feature_layers=HUBERT_FRONT_END)
    assert own.peak_activation_bytes == 131_067_904


def test_runtime_follows_the_conversion_rate() -> None:
    reference, own = counted("float"), counted("bitla_w1a1")
    assert reference.runtime(reference) == 1.0
    expected = (own.flops + own.quantops / 20) / reference.flops
    assert own.runtime(reference, 20) == expected
    assert own.runtime(reference, 1e12) == pytest.approx(own.flops / reference.flops)
    for rate in (0, -1, float("nan"), float("inf"), 1e-320):
        with pytest.raises(LowbitError, match="conversion rate K is"):
            own.runtime(reference, rate)


def test_too_short_audio_is_refused() -> None:
    with pytest.raises(LowbitError, match=r"0\.001 s of audio give no frame"):
        counted("float", seconds=0.001)
