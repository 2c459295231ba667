"""fairseq's own speech encoders, quantized in place."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

fairseq = pytest.importorskip("fairseq")
from fairseq.models.hubert.hubert import HubertConfig, HubertModel  # noqa: E402
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model  # noqa: E402
from fairseq.modules import MultiheadAttention  # noqa: E402
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig  # noqa: E402

import fairseq_lowbit  # noqa: E402
from fairseq_lowbit.errors import LowbitError  # noqa: E402
from fairseq_lowbit.nn import quantizers, sites  # noqa: E402
from fairseq_lowbit.nn.operators import Operator  # noqa: E402
from fairseq_lowbit.precision import InputKind, Role, Rule  # noqa: E402

SHAPE = {
    "conv_feature_layers": "[(8,10,5)]+[(8,3,2)]*2",
    "encoder_layers": 2,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
    "conv_pos": 6,
    "conv_pos_groups": 4,
    "final_dim": 8,
}
EVERYTHING = [
    Rule("*", weight_bits=8, activation_bits=8),
    Rule("*.self_attn.query", activation_bits=8),
    Rule("*.self_attn.key", activation_bits=8),
    Rule("*.self_attn.value", activation_bits=8),
    Rule("*.self_attn.probabilities", activation_bits=8),
    Rule("project_q", method="none"),
    Rule("final_proj", method="none"),
]
VALID = 400

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def hubert(**shape: object) -> HubertModel:
    task = HubertPretrainingConfig(sample_rate=16000)
    return HubertModel(HubertConfig(**SHAPE, **shape, label_rate=50), task, [None])


def wav2vec2(**shape: object) -> Wav2Vec2Model:
    return Wav2Vec2Model(Wav2Vec2Config(**SHAPE, **shape))


MODELS = pytest.mark.parametrize("make", [hubert, wav2vec2])


def build(make, **shape: object) -> nn.Module:
    torch.manual_seed(0)
    model = make(**shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def waveform() -> Tensor:
    return torch.randn(2, 700, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, is_padded: bool = False) -> Tensor:
    mask = None
    if is_padded:
        mask = torch.arange(700).expand(2, 700) >= torch.tensor([[700], [VALID]])
    result = model(waveform(), padding_mask=mask, mask=False, features_only=True)
    padding = result["padding_mask"]
    return result["x"] if padding is None else result["x"].masked_fill(padding[..., None], 0)


@MODELS
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_keys_and_outputs_of_the_float_model_stay(make, norm_first: bool) -> None:
    model = build(make, layer_norm_first=norm_first)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    expected = run(model), run(model, is_padded=True)
    fairseq_lowbit.quantize(model, "float")
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for ours, theirs in zip((run(model), run(model, is_padded=True)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@MODELS
def test_roles_and_inputs_are_those_of_hubert(make) -> None:
    model = fairseq_lowbit.quantize(build(make), "bitla_w4a4")
    found = {site.name: site for site in sites(model)}
    roles = {name: site.role for name, site in found.items() if ".layers." not in name}
    roles.pop("project_q", None)
    convolutions = [f"feature_extractor.conv_layers.{i}.0" for i in range(3)]
    assert roles == {
        **dict.fromkeys(convolutions, Role.FRONT_END),
        "post_extract_proj": Role.PROJECTION,
        "encoder.pos_conv.0": Role.POSITIONAL_CONVOLUTION,
        "final_proj": Role.HEAD,
    }
    kinds = {name for name, site in found.items() if site.input_kind == InputKind.GELU}
    assert kinds == {*convolutions[1:], "encoder.layers.0.fc2", "encoder.layers.1.fc2"}
    reached = {entry.module for entry in model.plan.entries if entry.is_quantized}
    assert reached == {name for name in found if ".layers." in name} - set(convolutions)
    assert len(reached) == 2 * 10


@MODELS
@torch.no_grad()
def test_every_planned_quantizer_is_called_and_eight_bits_are_close(make) -> None:
    model = build(make, extractor_mode="layer_norm")
    expected = run(model, is_padded=True)
    rules = [rule for rule in EVERYTHING if rule.match != "project_q" or make is wav2vec2]
    fairseq_lowbit.quantize(model, "float", rules)
    fairseq_lowbit.calibrate(model, [None], lambda _: run(model))
    planned = sum((e.weight_bits < 16) + (e.activation_bits < 16) for e in model.plan.entries)
    calls: Counter[str] = Counter()
    for name, quantizer in quantizers(model):
        quantizer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    found = run(model, is_padded=True)
    assert len(calls) == len(list(quantizers(model))) == planned - 2 * 2
    assert (found - expected).square().mean() < 2e-3 * expected.square().mean()
    assert torch.equal(run(copy.deepcopy(model)), run(model))


def attention(**options: object) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"self_attn": MultiheadAttention(16, 2, **options), "out": nn.Linear(16, 16)}
    )


@pytest.mark.parametrize("need", ["nothing", "mean", "heads"])
def test_attention_keeps_fairseqs_signature(need: str) -> None:
    model = build(hubert)
    module = model.encoder.layers[0].self_attn
    x = torch.randn(5, 2, 16)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    options = {"need_weights": need != "nothing", "need_head_weights": need == "heads"}
    # Without this, fairseq's fused path ignores need_head_weights.
    module.skip_embed_dim_check = True
    values, weights = module(x, x, x, padding, **options)
    fairseq_lowbit.quantize(model, "float")
    assert isinstance(module, MultiheadAttention)
    ours, our_weights = module(x, x, x, padding, **options)
    torch.testing.assert_close(ours, values, rtol=0, atol=1e-5)
    if need == "nothing":
        assert our_weights is weights is None
    else:
        torch.testing.assert_close(our_weights, weights, rtol=0, atol=1e-5)
    for refused in ({"attn_mask": torch.zeros(5, 5)}, {"incremental_state": {}}):
        with pytest.raises(LowbitError, match="takes neither attn_mask nor"):
            module(x, x, x, **refused)


def test_attention_of_unknown_models_is_left_alone() -> None:
    model = attention(self_attention=True)
    fairseq_lowbit.quantize(model, "bitl_w4a4")
    assert [entry.module for entry in model.plan.entries] == ["out"]
    with pytest.raises(LowbitError, match="uses its weight without calling it"):
        fairseq_lowbit.quantize(attention(), "float", [Rule("self_attn.q_proj", "elastic", 4, 4)])


def test_an_attention_without_a_quantized_form_is_refused() -> None:
    model = build(hubert)
    model.encoder.layers[1].self_attn.add_zero_attn = True
    with pytest.raises(LowbitError, match=r"layers.1.self_attn.*add_zero_attn"):
        fairseq_lowbit.quantize(model, "bitl_w4a4")
    assert not any(isinstance(module, Operator) for module in model.modules())
