"""Inside of the block every weight is encoded once, and nothing else changes by it."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fairseq_lowbit.nn import Conv1d, Linear, PositionalConv1d
from fairseq_lowbit.quantization import (
    ElasticQuantizer,
    Quantizer,
    SquashedQuantizer,
    UniformQuantizer,
    mid_rise,
    signed,
    weights_encoded_once,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def elastic(bits: int = 2, **kwargs: int) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(signed(bits), 6, **kwargs)
    quantizer.set_scale(torch.tensor(0.3))
    return quantizer


def stretched(bits: int) -> ElasticQuantizer:
    quantizer = ElasticQuantizer(mid_rise(bits), 6)
    quantizer.set_scale(torch.tensor(0.8))
    return quantizer


def squashed(bits: int) -> SquashedQuantizer:
    quantizer = SquashedQuantizer(bits, channels=4, group_size=6, target_std=0.84)
    quantizer.mark_calibrated(True)
    return quantizer


def linear(quantizer: Quantizer | None = None) -> Linear:
    torch.manual_seed(0)
    module = Linear(6, 4)
    module.weight_quantizer = elastic() if quantizer is None else quantizer
    return module


METHODS = {
    "sign": lambda: elastic(1),
    "signed, 8 bits": lambda: elastic(8),
    "per group": lambda: elastic(scales=8, group_size=3),
    "stretched, 8 bits": lambda: stretched(8),
    "squashed, 1 bit": lambda: squashed(1),
    "squashed, 8 bits": lambda: squashed(8),
    "absmax": lambda: UniformQuantizer("absmax", 8, group_size=6),
    "minmax": lambda: UniformQuantizer("minmax", 8),
}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Quantizer]:
    """Whose weight was encoded, each time."""
    found: list[Quantizer] = []
    for kind in (Quantizer, SquashedQuantizer):

        def counted(self, *args, original=kind.codes, **kwargs):
            found.append(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "codes", counted)
    return found


def update(module: nn.Module, batches: int = 2) -> Iterator[Tensor]:
    """Outputs of two micro-batches, then every gradient."""
    for seed in range(batches):
        output = module(random(5, 6, seed=seed))
        output.square().sum().backward()
        yield output.detach()
    yield from (parameter.grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_outputs_and_gradients_stay_the_same(
    name: str, dtype: torch.dtype, encoded: list[Quantizer]
) -> None:
    def run() -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return list(update(linear(METHODS[name]())))

    expected = run()
    assert not encoded
    with weights_encoded_once():
        found = run()
    assert len(encoded) == 1
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    "build, shape",
    [
        (lambda: Conv1d(6, 4, 3), (2, 6, 9)),
        (lambda: PositionalConv1d(6, 4, 3), (2, 6, 9)),
    ],
    ids=["convolution", "positional"],
)
def test_convolutions_have_it_too(build, shape, encoded: list[Quantizer]) -> None:
    module = build()
    module.weight_quantizer = elastic()
    expected = module(random(*shape))
    with weights_encoded_once():
        assert all(torch.equal(module(random(*shape)), expected) for _ in range(2))
    assert len(encoded) == 1


def test_a_tied_weight_is_encoded_for_all_its_users(encoded: list[Quantizer]) -> None:
    first, second = linear(), linear()
    second.weight, second.weight_quantizer = first.weight, first.weight_quantizer
    with weights_encoded_once():
        assert torch.equal(first(random(3, 6)), second(random(3, 6)))
    assert len(encoded) == 1


def step(module: Linear) -> None:
    module(random(3, 6)).square().sum().backward()
    torch.optim.AdamW(module.parameters(), lr=0.5).step()


def load(module: Linear) -> None:
    module.load_state_dict({key: value + 1 for key, value in module.state_dict().items()})


def edit(module: Linear) -> None:
    with torch.no_grad():
        module.weight[0, 0] += 3


def assign_data(module: Linear) -> None:
    module.weight.data = module.weight.data + 1


def replace(module: Linear) -> None:
    module.weight = nn.Parameter(module.weight.detach() + 1)


def rescale(module: Linear) -> None:
    module.weight_quantizer.set_scale(torch.tensor(1.7))


def recast(module: Linear) -> None:
    edit(module.double())


@pytest.mark.parametrize("change", [step, load, edit, assign_data, replace, rescale, recast])
def test_a_changed_weight_is_encoded_again(change: Callable[[Linear], None]) -> None:
    module, x = linear(), random(3, 6)
    with weights_encoded_once():
        before = module(x)
        change(module)
        after = module(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, module(x))


def fused_step(module: Linear) -> None:
    module(random(3, 6)).square().sum().backward()
    torch.optim.AdamW(module.parameters(), lr=0.5, fused=True).step()


def edit_data(module: Linear) -> None:
    module.weight.data.add_(1)


@pytest.mark.parametrize("change", [fused_step, edit_data])
def test_a_block_per_update_sees_what_torch_does_not_count(
    change: Callable[[Linear], None],
) -> None:
    module, x = linear(), random(3, 6)
    with weights_encoded_once():
        before = module(x)
        change(module)
    with weights_encoded_once():
        after = module(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, module(x))


def test_training_and_evaluation_share_the_codes(encoded: list[Quantizer]) -> None:
    module, x = linear(), random(3, 6)
    with weights_encoded_once():
        trained = module.train()(x)
        with torch.no_grad():
            assert torch.equal(module.eval()(x), trained)
    assert len(encoded) == 1


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointed_layers_share_them_too(is_reentrant: bool, encoded: list[Quantizer]) -> None:
    def run(module: Linear) -> list[Tensor]:
        x = random(3, 6).requires_grad_()
        checkpoint(module, x, use_reentrant=is_reentrant).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in module.parameters())]

    expected = run(linear())
    with weights_encoded_once():
        found = run(linear())
    assert len(encoded) == 1
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_copies_and_pickles_carry_no_codes(encoded: list[Quantizer]) -> None:
    module, x = linear(), random(3, 6)
    size = len(pickle.dumps(module))
    with weights_encoded_once():
        module(x)
        twin = copy.deepcopy(module)
        assert len(pickle.dumps(module)) == size
        edit(twin)
        assert not torch.equal(twin(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(twin))(x), twin(x))
    assert len(encoded) == 2


def test_an_error_ends_the_block(encoded: list[Quantizer]) -> None:
    module = linear()
    with pytest.raises(ZeroDivisionError), weights_encoded_once():
        raise ZeroDivisionError
    module(random(3, 6))
    assert not encoded
