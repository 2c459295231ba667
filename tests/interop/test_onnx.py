import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.cli.main import main
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop import onnx as onnx_format
from fairseq_lowbit.interop import write_model
from fairseq_lowbit.interop.exporting import FORMATS
from fairseq_lowbit.interop.onnx_view import LearnedInput, StoredWeight, has_quantize_linear
from fairseq_lowbit.models import Architecture, Hubert, LoadedModel, WithoutWeights
from fairseq_lowbit.nn import calibrate, forget_calibration
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    LevelSet,
    Quantizer,
    SquashedQuantizer,
    UniformQuantizer,
    mid_rise,
    non_negative,
    signed,
)
from tests.shapes import TINY

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FAST = replace(TINY, encoder_layers=1)
HUBERT = replace(FAST, conv_feature_layers="[(8,10,5)] + [(8,3,2)]*4 + [(8,2,2)]*2")
LARGE = replace(HUBERT, extractor_mode="layer_norm", conv_bias=True, layer_norm_first=True)
WAVLM = replace(FAST, encoder_layers=2, relative_position_embedding=True, gru_rel_pos=True)
RELATIVE = [
    Rule("*.grep_linear", weight_bits=8, activation_bits=8),
    Rule("*.relative_attention_bias", weight_bits=8, activation_bits=16),
]
FRONT_END, FRONT_END_MINMAX = (
    [
        Rule(match, method, weight_bits=8, activation_bits=8, granularity="per_channel")
        for match in ("feature_extractor.*", "post_extract_proj", "encoder.pos_conv.*")
    ]
    for method in ("elastic", "minmax")
)
PER_FRAME = [Rule("encoder.layers.*_proj", activation_granularity="per_frame")]
PER_GROUP = [Rule("encoder.layers.*.fc?", granularity="per_group", group_size=8)]


def build(shape: Architecture, precision: str, rules: Sequence[Rule] = ()) -> Hubert:
    torch.manual_seed(0)
    model = Hubert(shape, 3, Precision(precision, rules=list(rules)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # without one, sums of codes lie exactly between two codes
                parameter.normal_(std=0.1)
    calibrate(model, [0.1 * torch.randn(2, 4000)], model.final_output)
    return model.eval()


def loaded(model: Hubert, normalize: bool = False) -> LoadedModel:
    return LoadedModel(model, "student.pt", 0, True, normalize)


def run(model: "onnx.ModelProto | Path", *inputs: Tensor) -> list[Tensor]:
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def check_same_states(path: Path, model: Hubert) -> None:
    samples = torch.Generator().manual_seed(1)
    # Neither the batch nor the lengths are those that the file was made with.
    for batch, length in ((1, 3001), (3, 1280)):
        waveform = 0.1 * torch.randn(batch, length, generator=samples)
        expected, _ = model.representations(waveform)
        found = run(path, waveform)
        assert len(found) == model.shape.encoder_layers + 1
        limits = onnx_format.tolerances(model, waveform, expected)
        for ours, theirs, limit in zip(expected, found, limits, strict=True):
            assert theirs.shape == ours.shape
            assert onnx_format.relative_difference(theirs, ours) < limit


@pytest.mark.parametrize(
    "shape, precision, rules",
    [
        (FAST, "float", ()),
        pytest.param(WAVLM, "bitla_w8a8", RELATIVE, marks=pytest.mark.full),
        pytest.param(HUBERT, "float", (), marks=pytest.mark.full),
        pytest.param(LARGE, "float", (), marks=pytest.mark.full),
        pytest.param(LARGE, "bitla_w8a8", FRONT_END, marks=pytest.mark.full),
        pytest.param(HUBERT, "bitl_w8a8", FRONT_END_MINMAX, marks=pytest.mark.full),
        pytest.param(FAST, "bitl_w8a8", PER_GROUP, marks=pytest.mark.full),
        pytest.param(FAST, "bitla_w4a4", (), marks=pytest.mark.full),
        pytest.param(FAST, "bitla_w1a1", (), marks=pytest.mark.full),
        pytest.param(FAST, "bitl_w4a4", PER_FRAME, marks=pytest.mark.full),
        pytest.param(FAST, "sqwq_w8", (), marks=pytest.mark.full),
        pytest.param(FAST, "absmax_w8a8", (), marks=pytest.mark.full),
        pytest.param(FAST, "minmax_w4a8", (), marks=pytest.mark.full),
    ],
)
def test_checkpoint_to_onnx_and_the_same_hidden_states(
    tmp_path: Path, shape: Architecture, precision: str, rules: Sequence[Rule]
) -> None:
    model = build(shape, precision, rules)
    write_model(tmp_path / "model.pt", model, loaded(model), tmp_path)
    command = ["export", str(tmp_path / "model.pt"), "--to", "onnx", str(tmp_path / "model.onnx")]
    assert main(command) == 0
    check_same_states(tmp_path / "model.onnx", model)


def test_quantized_file_says_what_its_caller_has_to_know(tmp_path: Path) -> None:
    """And gives the hidden states of its model."""
    rules = [
        Rule("post_extract_proj", weight_bits=8, activation_bits=8),
        Rule("encoder.layers.*.fc1", method="squashed"),
    ]
    model = build(FAST, "bitla_w8a8", rules)
    path = tmp_path / "new" / "model.onnx"
    onnx_format.export(loaded(model, normalize=True), path)
    check_same_states(path, model)
    proto = onnx.load(path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert (metadata["sample_rate"], metadata["normalize"]) == ("16000", "true")
    assert metadata["samples_per_frame"] == str(5 * 2 * 2)
    assert metadata["precision"] == "bitla_w8a8"
    assert json.loads(metadata["precision_rules"])[1] == {
        "match": "encoder.layers.*.fc1",
        "method": "squashed",
    }
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [18]
    shapes = {
        entry.name: [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        for entry in (*proto.graph.input, *proto.graph.output)
    }
    assert shapes == {
        "waveform": ["batch", "samples"],
        "hidden_state_0": ["batch", "frames", 16],
        "hidden_state_1": ["batch", "frames", 16],
    }
    # Exactly as many samples as it says are needed for a frame are enough.
    fewest = int(metadata["fewest_samples"])
    assert run(path, torch.randn(1, fewest))[0].shape == (1, 1, 16)
    _check_stored(proto, model)


def _check_stored(proto: "onnx.ModelProto", model: Hubert) -> None:
    """Quantized weights are there once, as bytes, and what no hidden state needs is not there."""
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    bytes_ = sum(a.size for a in arrays.values() if a.dtype == np.int8 and a.ndim > 1)
    quantized = [
        module.weight_shape.numel()
        for module in model.modules()
        if isinstance(module, Operator) and module.weight_quantizer is not None
    ]
    assert bytes_ == sum(quantized)
    assert sum(a.nbytes for a in arrays.values()) < onnx_format.stored_bytes(model)
    assert not any("label_embs" in name or "final_proj" in name for name in arrays)


WEIGHTS: list[tuple[str, Quantizer]] = [
    *((f"elastic, {bits} bits", ElasticQuantizer(signed(bits), 1)) for bits in (1, 2, 8)),
    ("ternary", ElasticQuantizer(LevelSet("ternary", 2, -1, 1), 1)),
    ("elastic, per channel", ElasticQuantizer(signed(4), 1, scales=6, group_size=8)),
    ("elastic, per group", ElasticQuantizer(signed(4), 1, scales=24, group_size=2)),
    *((f"stretched, {bits} bits", ElasticQuantizer(mid_rise(bits), 1)) for bits in (1, 3, 7, 8)),
    *((f"squashed, {bits} bits", SquashedQuantizer(bits, 6, 8, 0.5)) for bits in (1, 4, 7, 8)),
    *((kind, UniformQuantizer(kind, 8, group_size=8)) for kind in ("absmax", "minmax")),
    ("minmax, per tensor", UniformQuantizer("minmax", 3)),
]


class Weights(nn.Module):
    def __init__(self, stored: Sequence[StoredWeight]) -> None:
        super().__init__()
        self.stored = nn.ModuleList(stored)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x + weight(x) for weight in self.stored]


class Inputs(nn.Module):
    def __init__(self, inputs: Sequence[LearnedInput | UniformQuantizer]) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(inputs)

    def forward(self, x: Tensor, ratio: Tensor) -> list[Tensor]:
        return [view(x, r) for r in (None, ratio) for view in self.inputs]


def set_scales(quantizer: Quantizer, generator: torch.Generator) -> None:
    if isinstance(quantizer, SquashedQuantizer):
        quantizer.log_gain.data.normal_(generator=generator)
        quantizer.mark_calibrated(True)
    elif isinstance(quantizer, ElasticQuantizer):
        shape = quantizer.log_scale.shape
        quantizer.set_scale(0.02 + 0.1 * torch.rand(shape, generator=generator))
        if quantizer.relative_shift is not None:
            quantizer.relative_shift.data.normal_(generator=generator)


def exported(module: nn.Module, *inputs: Tensor) -> "onnx.ModelProto":
    with torch.no_grad():
        return torch.onnx.export(module, inputs, dynamo=True, opset_version=18).model_proto


@pytest.mark.filterwarnings("ignore")
def test_weights_of_every_method_and_width_are_stored_as_bytes_and_decoded_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 2, generator=generator)
    for _, quantizer in WEIGHTS:
        set_scales(quantizer, generator)
    stored = [StoredWeight(quantizer.codes(weight)) for _, quantizer in WEIGHTS]
    found = run(exported(Weights(stored).eval(), torch.zeros_like(weight)), torch.zeros(6, 4, 2))
    for (name, quantizer), view, decoded in zip(WEIGHTS, stored, found, strict=True):
        assert view.integers.dtype in (torch.int8, torch.uint8), name
        expected = quantizer(weight).detach()
        if view.rest is None:
            assert torch.equal(decoded, expected), name
        else:  # the half step that is added behind rounds once more
            torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-6)


LEARNED = [
    ElasticQuantizer(levels(bits), 1, shift_shape=shift)
    for levels in (signed, non_negative)
    for bits in (1, 3, 8)
    for shift in (None, (3,))
] + [ElasticQuantizer(non_negative(bits, -87 / 512), 1, shift_shape=()) for bits in (1, 3, 8)]
OF_A_FRAME = [
    UniformQuantizer(kind, bits, frame_dim=-1) for kind in ("absmax", "minmax") for bits in (1, 8)
]


@pytest.mark.filterwarnings("ignore")
def test_inputs_have_torchs_codes_at_ties_at_the_ends_and_beyond() -> None:
    generator = torch.Generator().manual_seed(0)
    for quantizer in LEARNED:
        set_scales(quantizer, generator)
        quantizer.set_scale(torch.tensor(0.125))
    # Multiples of half a step, which are exact and half of them ties, and anything.
    ties = torch.arange(-300, 300).float() / 16
    x = torch.cat([ties, 5 * torch.randn(600, generator=generator)]).reshape(-1, 3)
    ratio = torch.full((1, 1), 0.75)
    # As in the view of a model, a range of every frame is traced as it is.
    inputs = Inputs([*map(LearnedInput, LEARNED), *OF_A_FRAME]).eval()
    found = run(exported(inputs, x, ratio), x, ratio)
    expected = [q(x, r) for r in (None, ratio) for q in (*LEARNED, *OF_A_FRAME)]
    for decoded, values in zip(found, expected, strict=True):
        assert torch.equal(decoded, values)


@pytest.mark.filterwarnings("ignore")
def test_a_scale_per_frame_is_computed_in_the_graph() -> None:
    quantizers = [
        ElasticQuantizer(signed(bits), 1, shift_shape=(), is_per_frame=True) for bits in (1, 4)
    ]
    for quantizer in quantizers:
        quantizer.set_scale(torch.tensor(0.25), torch.tensor(0.1))
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    ratio = torch.ones(1)
    inputs = Inputs([*map(LearnedInput, quantizers)]).eval()
    found = run(exported(inputs, x, ratio), x, ratio)
    for decoded, quantizer in zip(found, quantizers, strict=False):
        torch.testing.assert_close(decoded, quantizer(x).detach())


def test_quantize_linear_has_no_form_for_one_bit_and_for_half_steps() -> None:
    has_form = {
        levels.name + str(levels.bits): has_quantize_linear(ElasticQuantizer(levels, 1))
        for levels in (signed(1), signed(2), signed(8), non_negative(1), non_negative(8))
    }
    assert has_form == {
        "sign1": False,
        "signed2": True,
        "signed8": True,
        "non_negative1": False,
        "non_negative8": True,
    }
    assert not has_quantize_linear(ElasticQuantizer(mid_rise(4), 1))
    assert not has_quantize_linear(ElasticQuantizer(signed(8), 1, is_per_frame=True))
    assert not has_quantize_linear(UniformQuantizer("absmax", 8, frame_dim=-1))


def test_a_file_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_view(model: Hubert) -> Hubert:
        view = deepcopy(model)
        view.encoder.layers[0].fc2.bias.data[0] += 0.001
        return view

    monkeypatch.setattr(onnx_format, "onnx_view", wrong_view)
    path = tmp_path / "model.onnx"
    path.write_text("an earlier file")
    with pytest.raises(
        LowbitError, match=r"model\.onnx was not written: hidden_state_1 .* 1.0e-04"
    ):
        onnx_format.export(loaded(build(FAST, "float")), path)
    assert path.read_text() == "an earlier file"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    model = build(FAST, "bitl_w8a8")
    forget_calibration(model)
    with pytest.raises(LowbitError, match=r"student\.pt .* not calibrated"):
        onnx_format.export(loaded(model), path)
    assert FORMATS["onnx"].missing_package() == ""
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(LowbitError, match=r"onnxscript: pip install 'fairseq-lowbit\[onnx\]'"):
        FORMATS["onnx"].export(loaded(build(FAST, "float")), path)
    assert not path.exists()


def test_obstacle_is_the_size_of_the_file_in_its_precision() -> None:
    """Of HuBERT X-Large, whose weights need not exist for it."""
    shape = Architecture(
        encoder_layers=48,
        encoder_embed_dim=1280,
        encoder_ffn_embed_dim=5120,
        encoder_attention_heads=16,
        layer_norm_first=True,
    )
    with WithoutWeights():
        large, small = (Hubert(shape, precision=Precision(name)) for name in ("float", "bitl_w8a8"))
    assert "at most 2 GiB and its weights take 3.6" in onnx_format.obstacle(large)
    assert onnx_format.obstacle(small) == ""
