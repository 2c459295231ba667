"""WavLM's gated relative position bias in HuBERT; tests/interop compares it with transformers."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fairseq_lowbit.errors import LowbitError
from fairseq_lowbit.models import Hubert, WithoutWeights
from fairseq_lowbit.nn import calibrate, every_quantizer_called, sites
from fairseq_lowbit.nn.relative_attention import RelativePositions
from fairseq_lowbit.nn.work import recorded_steps
from fairseq_lowbit.precision import Precision, Role, Rule
from fairseq_lowbit.profiling import profile
from tests.shapes import TINY

WAVLM = replace(
    TINY, relative_position_embedding=True, gru_rel_pos=True, num_buckets=16, max_distance=30
)
TABLE = "encoder.layers.0.self_attn.relative_attention_bias"
LENGTHS = torch.tensor([1400, 700])


def waveforms() -> Tensor:
    return torch.randn(2, 1400, generator=torch.Generator().manual_seed(0))


def build(precision: Precision | None = None, **shape: object) -> Hubert:
    torch.manual_seed(0)
    model = Hubert(replace(WAVLM, **shape), precision=precision)
    for name, parameter in model.named_parameters():
        if "_quantizer." not in name:
            nn.init.normal_(parameter, mean=float("norm.weight" in name), std=0.3)
    return model.eval()


@torch.no_grad()
def outputs(model: Hubert) -> Tensor:
    return torch.stack(model.hidden_states(waveforms())[0])


def test_distances_near_have_rows_of_their_own_and_far_ones_share() -> None:
    positions = RelativePositions(buckets=16, max_distance=64, gated=True)
    distances = torch.tensor([0, -1, -3, 1, 3])
    assert positions.rows(distances).tolist() == [0, 1, 3, 9, 11]
    # Past 4 there are 4 rows, each twice as wide as the one before.
    far = torch.tensor([-4, -7, -8, -15, -16, -31, -32, -63, -64, -10_000])
    assert positions.rows(far).tolist() == [4, 4, 5, 5, 6, 6, 7, 7, 7, 7]
    assert torch.equal(positions.rows(-far), positions.rows(far) + 8)


def test_the_bias_goes_by_the_distance_from_query_to_key() -> None:
    attention = build().encoder.layers[1].self_attn
    with torch.no_grad():
        bias = attention.bias_by_distance(9)
        for query, key in ((0, 8), (8, 0), (3, 3), (2, 7)):
            row = attention.positions.rows(torch.tensor(key - query))
            assert torch.equal(bias[:, query, key], attention.table.weight[row])


def test_keys_are_those_of_wavlms_checkpoints_and_the_table_is_stored_once() -> None:
    added = set(build().state_dict()) - set(Hubert(TINY).state_dict())
    gates = ("grep_a", "grep_linear.weight", "grep_linear.bias")
    assert added == {
        f"{TABLE}.weight",
        *(f"encoder.layers.{i}.self_attn.{gate}" for i in range(2) for gate in gates),
    }
    assert sum(parameter.shape == (16, 2) for parameter in build().parameters()) == 1


def test_every_layer_hears_the_table_and_its_own_gate() -> None:
    model = build()
    before = outputs(model)
    table = model.get_submodule(TABLE)
    with torch.no_grad():
        gate = model.encoder.layers[1].self_attn.grep_linear
        gate.bias.add_(1.0)
        gated = outputs(model)
        assert torch.equal(gated[0], before[0])
        assert not torch.allclose(gated[1], before[1], atol=1e-3)
        gate.bias.sub_(1.0)
        # What all distances share moves no probability, in no layer.
        table.weight.fill_(0.7)
        flat = outputs(model)
    assert not torch.allclose(flat, before, atol=1e-3)
    plain = Hubert(TINY).eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    torch.testing.assert_close(flat, outputs(plain), rtol=1e-5, atol=1e-5)


def test_a_copy_has_a_table_of_its_own_in_all_layers() -> None:
    model = build()
    before, twin = outputs(model), copy.deepcopy(model)
    assert torch.equal(outputs(twin), before)
    nn.init.zeros_(model.get_submodule(TABLE).weight)
    assert torch.equal(outputs(twin), before)
    nn.init.zeros_(twin.get_submodule(TABLE).weight)
    assert torch.equal(outputs(twin), outputs(model))


def test_layers_advanced_from_outside_are_the_forward() -> None:
    model = build()
    frames = model.extract(waveforms(), LENGTHS)
    x = model.begin(frames)
    maps = []
    for layer in model.layers:
        x, attention = layer(x, frames.padding_mask, "probabilities")
        maps.append(attention)
    _, expected = model.encode(frames)  # with fused attention
    valid = frames.valid()
    torch.testing.assert_close(x[valid], expected[-1][valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[1].sum(-1), torch.ones(maps[1].shape[:3]))


def test_the_same_alone_and_in_a_padded_batch() -> None:
    model = build()
    with torch.no_grad():
        batch, mask = model.hidden_states(waveforms(), LENGTHS)
        alone, _ = model.hidden_states(waveforms()[1:, : LENGTHS[1]])
    for own, padded in zip(alone, batch, strict=True):
        torch.testing.assert_close(padded[1][~mask[1]], own[0], rtol=1e-4, atol=1e-5)


def test_ungated_bias() -> None:
    model = build(gru_rel_pos=False)
    assert not any("grep" in name for name in model.state_dict())
    assert not torch.allclose(outputs(model), outputs(build()), atol=1e-3)


def test_calls_and_operations_are_those_that_run() -> None:
    model, samples = Hubert(WAVLM).eval(), 1600
    assert model.operator_steps(samples) == recorded_steps(
        model, lambda: model.hidden_states(torch.randn(1, samples))
    )
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        x = model.begin(model.extract(torch.randn(1, samples)))
        for layer in model.layers:
            x = layer(x, None, "probabilities").x  # so that attention is products torch counts
    own = profile(model, "float", samples / 16_000)
    # A "same" convolution with an even kernel computes one frame that is cut off.
    position = next(cost.operations for cost in own.costs if cost.module == "encoder.pos_conv.0")
    assert counter.get_total_flops() == own.flops + position // x.shape[1]


def test_names_leave_gate_and_table_float_and_rules_reach_them() -> None:
    with WithoutWeights():
        roles = {site.name: site.role for site in sites(Hubert(WAVLM))}
        named = Hubert(WAVLM, precision=Precision("bitla_w2a2")).plan
    gates = [f"encoder.layers.{i}.self_attn.grep_linear" for i in range(2)]
    assert [roles[name] for name in (*gates, TABLE)] == [Role.GATE, Role.GATE, Role.EMBEDDING]
    reached = {entry.module for entry in named.entries if entry.is_quantized}
    assert "encoder.layers.1.self_attn.k_proj" in reached
    assert reached.isdisjoint({*gates, TABLE})

    float_model = build()
    rules = [
        Rule("*.grep_linear", weight_bits=8, activation_bits=8),
        Rule("*.relative_attention_bias", weight_bits=8),
    ]
    model = build(Precision("float", rules))
    model.load_state_dict(float_model.state_dict(), strict=False)
    calibrate(model, [waveforms()], model.final_output)
    with every_quantizer_called(model):
        found = outputs(model)
    expected = outputs(float_model)
    assert not torch.equal(found, expected)
    assert (found - expected).square().mean() < 1e-3 * expected.square().mean()


def test_training_reaches_the_table_and_every_gate() -> None:
    model = build(encoder_layerdrop=0.0).train()
    model.hidden_states(waveforms(), LENGTHS)[0][-1].square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if "self_attn." in name}
    assert all(gradient is not None for gradient in trained.values())
    assert trained[f"{TABLE}.weight"].abs().sum() > 0


def test_half_precision() -> None:
    found = build().bfloat16().hidden_states(waveforms().bfloat16())[0][-1]
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"relative_position_embedding": False}, "gru_rel_pos gates the bias"),
        ({"num_buckets": 3}, "num_buckets 3; at least 4"),
        ({"max_distance": 4}, "max_distance 4 has to be more than a quarter"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        Hubert(replace(WAVLM, **change))


def test_a_projection_that_keeps_the_width() -> None:
    same = replace(TINY, conv_feature_layers="[(8,10,5),(16,3,2)]")
    assert Hubert(same).post_extract_proj is None
    model = Hubert(replace(same, project_features=True))
    assert model.post_extract_proj.weight.shape == (16, 16)
