import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.nn import SelfAttention
from fairseq_lowbit.quantization import ElasticQuantizer, non_negative, signed

DIM, HEADS = 16, 2
LENGTHS = [7, 4, 1]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(dropout: float = 0.0) -> SelfAttention:
    torch.manual_seed(0)
    module = SelfAttention(DIM, HEADS, dropout)
    for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
        nn.init.normal_(projection.weight, std=0.5)
        nn.init.normal_(projection.bias, std=0.5)
    return module.eval()


def quantize_probabilities(
    module: SelfAttention, bits: int, scale: float, shift: float, reference: int | None = 10
) -> None:
    module.probabilities_quantizer = ElasticQuantizer(non_negative(bits), 20, shift_shape=())
    module.probabilities_quantizer.set_scale(torch.tensor(scale), torch.tensor(shift))
    module.reference_frames = reference


def padded_batch() -> tuple[Tensor, Tensor]:
    """[3, 7, DIM] with noise at padding, and the padding mask."""
    mask = torch.arange(7) >= torch.tensor(LENGTHS)[:, None]
    return random(3, 7, DIM), mask


def naive(module: SelfAttention, x: Tensor) -> Tensor:
    """Loop over heads and queries of one utterance [frames, DIM], float."""
    q, k, v = (p(x) for p in (module.q_proj, module.k_proj, module.v_proj))
    outputs = []
    for query in range(len(x)):
        heads = []
        for h in range(HEADS):
            own = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
            scores = torch.stack([q[query, own] @ key[own] for key in k])
            weights = torch.softmax(scores / (DIM // HEADS) ** 0.5, 0)
            heads.append(sum(w * value[own] for w, value in zip(weights, v, strict=True)))
        outputs.append(torch.cat(heads))
    return module.out_proj(torch.stack(outputs))


def test_float_attention_agrees_with_a_loop() -> None:
    module, x = attention(), random(1, 7, DIM)
    torch.testing.assert_close(module(x).values[0], naive(module, x[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need", ["probabilities", "scores"])
def test_explicit_path_equals_the_fused_one(need: str) -> None:
    module = attention()
    x, mask = padded_batch()
    for padding in (None, mask):
        fused, explicit = module(x, padding), module(x, padding, need)
        assert fused.map is None
        valid = torch.ones(3, 7, dtype=torch.bool) if padding is None else ~padding
        torch.testing.assert_close(
            fused.values[valid], explicit.values[valid], rtol=1e-5, atol=1e-5
        )


def test_maps_are_what_they_are_called() -> None:
    module = attention()
    x, mask = padded_batch()
    scores = module(x, mask, "scores").map
    probabilities = module(x, mask, "probabilities").map
    assert scores.shape == probabilities.shape == (3, HEADS, 7, 7)
    assert (scores.masked_select(mask[:, None, None].expand_as(scores)) == 0).all()
    hidden = scores.masked_fill(mask[:, None, None], float("-inf"))
    torch.testing.assert_close(probabilities, torch.softmax(hidden, -1))


def test_map_is_taken_before_the_probability_quantizer() -> None:
    module, x = attention(), random(1, 7, DIM)
    before = module(x, None, "probabilities").map
    quantize_probabilities(module, 2, 0.2, 0.0)
    after = module(x, None, "probabilities")
    assert torch.equal(after.map, before)
    assert not torch.allclose(after.values, module.out_proj(module.v_proj(x)))


def test_queries_are_quantized_before_the_scaling() -> None:
    module, x = attention(), random(1, 7, DIM)
    module.query_quantizer = ElasticQuantizer(signed(2), DIM, shift_shape=(DIM,))
    module.query_quantizer.set_scale(torch.tensor(0.7))
    seen: list[Tensor] = []
    module.query_quantizer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    module(x)
    assert torch.equal(seen[0], module.q_proj(x))


@pytest.mark.parametrize("quantized", [False, True])
def test_alone_and_in_a_padded_batch_agree(quantized: bool) -> None:
    module = attention()
    if quantized:
        # The negative shift lifts a probability of zero over the first threshold.
        quantize_probabilities(module, 2, 0.1, -0.2)
    x, mask = padded_batch()
    batch = module(x, mask).values
    for row, length in enumerate(LENGTHS):
        alone = module(x[row : row + 1, :length]).values[0]
        torch.testing.assert_close(batch[row, :length], alone, rtol=1e-5, atol=1e-5)


def test_padded_keys_decode_to_zero_although_their_code_would_not() -> None:
    module = attention()
    quantize_probabilities(module, 2, 0.1, -0.2)
    x, mask = padded_batch()
    decoded: list[Tensor] = []
    module.probabilities_quantizer.register_forward_hook(lambda *io: decoded.append(io[2]))
    changed = x.masked_fill(mask[..., None], 1e4)
    outputs = [module(batch, mask).values[~mask] for batch in (x, changed)]
    assert (decoded[0].masked_select(mask[:, None, None].expand(3, HEADS, 7, 7)) > 0).all()
    assert torch.equal(*outputs)


def test_codes_of_probabilities_are_the_same_alone_and_padded() -> None:
    module = attention()
    quantize_probabilities(module, 3, 0.05, -0.01)
    x, mask = padded_batch()
    seen: list[tuple] = []
    module.probabilities_quantizer.register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    module(x, mask)
    probabilities, ratio = seen[0]
    for row, length in enumerate(LENGTHS):
        own = probabilities[row : row + 1, :, :length, :length]
        seen.clear()
        module(x[row : row + 1, :length])
        alone_ratio = seen[0][1]
        in_batch = module.probabilities_quantizer.codes(probabilities, ratio).integers
        alone = module.probabilities_quantizer.codes(own, alone_ratio).integers
        assert torch.equal(in_batch[row : row + 1, :, :length, :length], alone)


def test_ratio_is_reference_over_valid_frames() -> None:
    module = attention()
    quantize_probabilities(module, 2, 0.1, 0.0, reference=500)
    seen: list[Tensor] = []
    module.probabilities_quantizer.register_forward_hook(lambda _, i, __: seen.append(i[1]))
    x, mask = padded_batch()
    module(x, mask)
    module(x)
    assert seen[0].flatten().tolist() == pytest.approx([500 / n for n in LENGTHS])
    assert seen[1].flatten().tolist() == pytest.approx([500 / 7])


def decoded_row_sum(module: SelfAttention, frames: int) -> float:
    decoded: list[Tensor] = []
    hook = module.probabilities_quantizer.register_forward_hook(lambda *io: decoded.append(io[2]))
    with torch.no_grad():
        module(random(1, frames, DIM))
    hook.remove()
    return decoded[0].sum(-1).mean().item()


@pytest.mark.parametrize("bits", [1, 2])
def test_length_scaling_keeps_row_sums_where_a_fixed_scale_lets_them_shrink(bits: int) -> None:
    module = SelfAttention(DIM, 1).eval()
    torch.manual_seed(0)
    for projection in (module.q_proj, module.k_proj):
        nn.init.normal_(projection.weight, std=0.25)
    quantize_probabilities(module, bits, 0.012, 0.0, reference=250)
    short, long = decoded_row_sum(module, 250), decoded_row_sum(module, 1500)
    module.reference_frames = None
    short_fixed, long_fixed = decoded_row_sum(module, 250), decoded_row_sum(module, 1500)
    assert short == pytest.approx(short_fixed, rel=1e-4)
    assert 0.8 < long / short < 1.25
    assert long_fixed < 0.5 * short_fixed


def test_shared_input_quantizer_is_applied_once_to_all_three() -> None:
    module, x = attention(), random(1, 7, DIM)
    module.input_quantizer = ElasticQuantizer(signed(2), DIM, shift_shape=())
    module.input_quantizer.set_scale(torch.tensor(0.9))
    expected = attention()
    values = expected(module.input_quantizer(x)).values
    assert torch.equal(module(x).values, values)


def test_dropout_acts_in_training_only() -> None:
    module, x = attention(dropout=0.5), random(1, 7, DIM)
    assert torch.equal(module(x).values, module(x).values)
    module.train()
    for need in (None, "probabilities"):
        assert not torch.equal(module(x, None, need).values, module(x, None, need).values)


def test_gradients_reach_inputs_through_every_quantizer() -> None:
    module, x = attention(), random(2, 7, DIM).requires_grad_()
    quantize_probabilities(module, 2, 0.1, -0.01)
    for operand in ("query", "key", "value"):
        quantizer = ElasticQuantizer(signed(4), DIM, shift_shape=(DIM,))
        quantizer.set_scale(torch.tensor(0.4))
        setattr(module, f"{operand}_quantizer", quantizer)
    module(x).values.square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_heads_must_divide_the_features() -> None:
    with pytest.raises(ValueError, match="16 features.*3 attention heads"):
        SelfAttention(16, 3)


def test_a_bias_is_added_to_the_scores() -> None:
    attention = SelfAttention(8, 2).eval()
    x, bias = torch.randn(2, 5, 8), torch.randn(2, 2, 5, 5)
    padding = torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])
    fused = attention(x, padding, bias=bias).values
    explicit, probabilities = attention(x, padding, "probabilities", bias)
    torch.testing.assert_close(fused, explicit)
    plain = attention(x, padding, "scores").map
    scores = (plain + bias).masked_fill(padding[:, None, None], float("-inf"))
    torch.testing.assert_close(probabilities, scores.softmax(-1))
