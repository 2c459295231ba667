"""Hugging Face's speech models with random weights, quantized in place."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import fairseq_lowbit
from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.interop.huggingface import padding_mask
from fairseq_lowbit.monitoring.health import measure_health
from fairseq_lowbit.nn import quantizers, sites
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.precision import InputKind, Role, Rule
from fairseq_lowbit.profiling.cost import profile

transformers = pytest.importorskip("transformers")

MODELS = ("Hubert", "Wav2Vec2", "WavLM")
# transformers has only eager attention for WavLM.
WITH_ATTENTION = pytest.mark.parametrize(
    "name, attention",
    [(name, "eager") for name in MODELS] + [("Hubert", "sdpa"), ("Wav2Vec2", "sdpa")],
)
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 7,
}
LENGTHS = (700, 460)
OPERANDS = ("query", "key", "value", "probabilities")


def everything(bits: int) -> list[Rule]:
    operands = [Rule(f"*.attention.{operand}", activation_bits=bits) for operand in OPERANDS]
    return [Rule("*", weight_bits=bits, activation_bits=bits), *operands]


pytestmark = pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask.*:UserWarning")


def build(name: str, suffix: str = "Model", **shape: object) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **shape})
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def waveform() -> Tensor:
    return torch.randn(2, LENGTHS[0], generator=torch.Generator().manual_seed(1))


def attention_mask() -> Tensor:
    return (torch.arange(LENGTHS[0]) < torch.tensor(LENGTHS)[:, None]).long()


@torch.no_grad()
def outputs(model: nn.Module, **options: object) -> tuple[Tensor, ...]:
    """Hidden states, with those at padding zeroed, and attention maps where there are any."""
    result = model(
        waveform(), attention_mask=attention_mask(), output_hidden_states=True, **options
    )
    frames = model._get_feat_extract_output_lengths(torch.tensor(LENGTHS))
    states = torch.stack(result.hidden_states)
    valid = torch.arange(states.shape[2]) < frames[:, None]
    return states * valid[..., None], *(result.attentions or ())


@pytest.mark.parametrize("is_stable", [False, True])
@WITH_ATTENTION
def test_keys_and_outputs_of_the_float_model_stay(
    name: str, attention: str, is_stable: bool
) -> None:
    norm = "layer" if is_stable else "group"
    shape = {"do_stable_layer_norm": is_stable, "feat_extract_norm": norm}
    model = build(name, attn_implementation=attention, **shape)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    options = {"output_attentions": True} if attention == "eager" else {}
    expected = outputs(model, **options)
    with torch.no_grad():
        unpadded = model(waveform()).last_hidden_state

    fairseq_lowbit.quantize(model, "float")
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for ours, theirs in zip(outputs(model, **options), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with torch.no_grad():
        ours = model(waveform()).last_hidden_state
    torch.testing.assert_close(ours, unpadded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_roles_and_inputs_are_those_of_hubert(name: str) -> None:
    model = fairseq_lowbit.quantize(build(name, "ForCTC", hidden_act="relu"), "float")
    prefix = name.lower()
    found = {site.name.removeprefix(f"{prefix}."): site for site in sites(model)}
    roles = {name: site.role for name, site in found.items() if ".layers." not in name}
    convolutions = [f"feature_extractor.conv_layers.{i}.conv" for i in range(3)]
    assert roles == {
        **dict.fromkeys(convolutions, Role.FRONT_END),
        "feature_projection.projection": Role.PROJECTION,
        "encoder.pos_conv_embed.conv": Role.POSITIONAL_CONVOLUTION,
        "lm_head": Role.HEAD,
    }
    kinds = {name: site.input_kind for name, site in found.items() if site.input_kind != "any"}
    layers = [f"encoder.layers.{i}" for i in range(2)]
    assert kinds == {
        **dict.fromkeys(convolutions[1:], InputKind.GELU),
        **{f"{layer}.feed_forward.output_dense": InputKind.RELU for layer in layers},
        **{f"{layer}.attention.probabilities": InputKind.PROBABILITIES for layer in layers},
    }
    groups = {site.input_group for site in found.values()} - {""}
    assert groups == {f"{prefix}.{layer}.attention" for layer in layers}


@pytest.mark.parametrize("name", MODELS)
def test_a_name_reaches_the_encoder_and_its_attention_operands(name: str) -> None:
    model = fairseq_lowbit.quantize(build(name, "ForCTC"), "bitla_w4a4")
    layer = f"{name.lower()}.encoder.layers"
    parts = [f"attention.{operand}" for operand in OPERANDS]
    parts += [f"attention.{p}_proj" for p in ("k", "v", "q", "out")]
    parts += ["feed_forward.intermediate_dense", "feed_forward.output_dense"]
    reached = [entry.module for entry in model.plan.entries if entry.is_quantized]
    assert sorted(reached) == sorted(f"{layer}.{i}.{part}" for i in range(2) for part in parts)


@WITH_ATTENTION
def test_every_planned_quantizer_is_called_and_eight_bits_are_close(
    name: str, attention: str
) -> None:
    model = build(name, attn_implementation=attention, feat_extract_norm="layer")
    expected, *_ = outputs(model)
    fairseq_lowbit.quantize(model, "float", everything(8))
    fairseq_lowbit.calibrate(model, [waveform()])

    planned = sum((e.weight_bits < 16) + (e.activation_bits < 16) for e in model.plan.entries)
    calls: Counter[str] = Counter()
    for quantizer_name, quantizer in quantizers(model):
        quantizer.register_forward_hook(lambda *_, name=quantizer_name: calls.update([name]))
    found, *_ = outputs(model)
    # q, k and v projection of both layers share the quantizer of their input.
    assert len(calls) == len(list(quantizers(model))) == planned - 2 * 2
    assert (found - expected).square().mean() < 2e-3 * expected.square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_change_a_quantized_model(name: str) -> None:
    model = build(name, feat_extract_norm="layer", do_stable_layer_norm=True)
    fairseq_lowbit.quantize(model, "float", everything(3))
    fairseq_lowbit.calibrate(model, [waveform()])
    with torch.no_grad():
        for _, quantizer in quantizers(model):
            if getattr(quantizer, "relative_shift", None) is not None:
                # Quantizers that map zero to another value, so that padding could be heard.
                quantizer.relative_shift.sub_(0.8)
        alone = model(waveform()[1:, : LENGTHS[1]]).last_hidden_state[0]
        padded = model(waveform(), attention_mask=attention_mask()).last_hidden_state[1]
    # A difference of rounding may move a few values by one level.
    error = (padded[: len(alone)] - alone).square().mean() / alone.square().mean()
    assert error < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_training_copies_and_checkpoints(name: str) -> None:
    model = build(name, mask_time_prob=0.0, layerdrop=0.0)
    fairseq_lowbit.quantize(model, "bitla_w2a2", [Rule("*.pos_conv_embed.conv", "squashed", 2, 8)])
    fairseq_lowbit.calibrate(model, [{"input_values": waveform()}])
    expected = outputs(model)[0]
    assert torch.equal(outputs(copy.deepcopy(model))[0], expected)
    fresh = build(name, mask_time_prob=0.0)
    fairseq_lowbit.quantize(fresh, model.plan.precision)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh)[0], expected)

    model.train()
    model(waveform(), attention_mask=attention_mask()).last_hidden_state.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
def test_health_and_profile_read_the_result(name: str) -> None:
    model = fairseq_lowbit.quantize(build(name), "bitla_w4a4")
    fairseq_lowbit.calibrate(model, [waveform()])

    def layers(batch: Tensor) -> tuple[Tensor, ...]:
        return model(batch, output_hidden_states=True).hidden_states[1:]

    health = measure_health(model, waveform(), layers)
    assert {q.name for q in health.quantizers} == {name for name, _ in quantizers(model)}
    assert len(health.centered_std) == 2
    assert {q.layer for q in health.quantizers} == {0, 1}

    samples = 16_000
    counted = profile(model, name, 1.0, run=lambda: model(torch.randn(1, samples)))
    frames = int(model._get_feat_extract_output_lengths(samples))
    costs = {cost.module: cost for cost in counted.costs}
    dense = costs["encoder.layers.1.feed_forward.output_dense"]
    assert (dense.operations, dense.bits) == (2 * frames * 24 * 16, 4)
    scores = costs["encoder.layers.1.attention.scores"]
    assert (scores.operations, scores.bits) == (2 * frames**2 * 16, 4)
    assert counted.storage_bytes == model.plan.bytes
    assert counted.quantops > 0


@pytest.mark.parametrize("name", MODELS)
def test_hooks_that_wait_for_the_attention_stay(name: str) -> None:
    model = build(name, attn_implementation="eager")
    before = outputs(model, output_attentions=True)  # transformers installs its hooks here
    fairseq_lowbit.quantize(model, "bitla_w8a8")
    fairseq_lowbit.calibrate(model, [waveform()])
    assert len(outputs(model, output_attentions=True)) == len(before) == 3


def test_a_changed_attention_is_refused_and_the_model_left_alone() -> None:
    model = build("Hubert")
    attention = model.encoder.layers[1].attention
    attention.q_proj = nn.Sequential(attention.q_proj)
    with pytest.raises(LowbitError, match=r"layers.1.attention.*q_proj is a Sequential"):
        fairseq_lowbit.quantize(model, "bitl_w4a4")
    assert not any(isinstance(module, Operator) for module in model.modules())
    assert type(model.encoder.layers[0].attention) is type(attention)


def test_masks_of_every_kind_name_the_padded_keys() -> None:
    valid = torch.tensor([[True, True, True], [True, False, False]])
    whole = valid[:, None, None].expand(2, 1, 3, 3)
    least = torch.finfo(torch.float32).min
    for mask in (valid, valid.long(), whole, torch.where(whole, 0.0, least)):
        assert torch.equal(padding_mask(mask), ~valid)
    assert padding_mask(None) is None
    with pytest.raises(LowbitError, match="attn_implementation='sdpa'"):
        padding_mask(object())


def test_cross_attention_is_refused() -> None:
    model = fairseq_lowbit.quantize(build("Hubert"), "float")
    x = torch.randn(1, 3, 16)
    with pytest.raises(LowbitError, match="key_value_states"):
        model.encoder.layers[0].attention(x, key_value_states=x)
