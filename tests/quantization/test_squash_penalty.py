import pytest
import torch
from torch import Tensor

from fairseq_lowbit.quantization import squash_penalty


def defined(unsquashed: list[Tensor], target_std: float) -> Tensor:
    """The formula of docs/numerics.md, in float64 with torch's own gradients."""
    terms = [
        (p.double().std(correction=0) - target_std).square() + p.double().mean().square()
        for p in unsquashed
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("target_std", [0.3, 0.84])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_the_definitions(dtype: torch.dtype, target_std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [
        (spread * torch.randn(12, 8, generator=generator) + mean).to(dtype).requires_grad_()
        for spread, mean in ((0.84, 0.0), (0.1, 0.3), (2.0, -1.0))
    ]
    results = []
    aimed = [(weight, target_std) for weight in weights]
    for value in (squash_penalty(aimed), defined(weights, target_std)):
        # Twice the loss, so that the gradient from above counts.
        gradients = torch.autograd.grad(2 * value, weights)
        results.append((value.float(), [gradient.float() for gradient in gradients]))
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    )
    torch.testing.assert_close(*results, **tolerance)


def test_a_constant_weight_has_a_finite_gradient() -> None:
    weight = torch.full((3, 4), 0.5, requires_grad=True)
    squash_penalty([(weight, 0.84)]).backward()
    # Only its mean pulls.
    torch.testing.assert_close(weight.grad, torch.full((3, 4), 2 * 0.5 / 12))
