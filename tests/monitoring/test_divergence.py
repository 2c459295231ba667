"""The first number that is not finite is found, wherever it first appears."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.models import Hubert
from fairseq_lowbit.monitoring.divergence import first_non_finite
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.precision import Precision
from tests.shapes import TINY

WAVEFORM = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Hubert:
    torch.manual_seed(0)
    model = Hubert(TINY, precision=Precision("bitla_w2a2"))
    calibrate(model, [WAVEFORM], model.hidden_states)
    return model


def loss_of(model: Hubert, change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable:
    return lambda: change(model.hidden_states(WAVEFORM)[0][-1]).square().mean()


def spoil(model: nn.Module, name: str, value: float) -> None:
    """The output of one module becomes ``value`` at one place."""

    def hook(module: nn.Module, inputs: tuple, output: object) -> object:
        first = output[0] if isinstance(output, tuple) else output
        changed = first.clone()
        changed.view(-1)[3] = value
        return type(output)(changed, *output[1:]) if isinstance(output, tuple) else changed

    model.get_submodule(name).register_forward_hook(hook)


def test_nothing_is_found_where_all_is_finite(model: Hubert) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert first_non_finite({"": model}, loss_of(model)) is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layers.0.fc1",
        "encoder.layers.1.self_attn",
        "encoder.layers.1.self_attn.query_quantizer",
        "feature_extractor.conv_layers.2.0",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_module(name: str, value: float, model: Hubert) -> None:
    spoil(model, name, value)
    found = first_non_finite({"": model}, loss_of(model))
    assert (found.kind, found.name) == ("the output of module", name)
    assert not any(m._forward_hooks for n, m in model.named_modules() if n != name)


def test_an_overflow_says_how_large_the_inputs_were(model: Hubert) -> None:
    with torch.no_grad():
        model.post_extract_proj.weight.fill_(3e38)
    found = first_non_finite({"": model}, loss_of(model))
    assert found.name == "post_extract_proj"
    assert 1 < found.peak < 100
    assert "post_extract_proj, whose inputs reach " in str(found)


def test_a_parameter_comes_before_what_it_does(model: Hubert) -> None:
    with torch.no_grad():
        model.encoder.layers[1].fc2.weight[0, 0] = float("nan")
    found = first_non_finite({"": model}, loss_of(model))
    assert str(found) == "parameter encoder.layers.1.fc2.weight"


def test_the_teacher(model: Hubert) -> None:
    teacher = Hubert(TINY)
    spoil(teacher, "encoder.layers.0", float("nan"))
    both = lambda: loss_of(model)() + loss_of(teacher)()  # noqa: E731
    found = first_non_finite({"": model, "teacher": teacher}, both)
    assert found.name == "teacher.encoder.layers.0"


def test_the_loss_itself(model: Hubert) -> None:
    found = first_non_finite({"": model}, loss_of(model, lambda x: x * 1e30))
    assert str(found).startswith("the loss itself")


def test_a_gradient_while_the_loss_is_finite(model: Hubert) -> None:
    def gradient_hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("inf"))

    model.encoder.layers[1].fc1.register_forward_hook(gradient_hook)
    found = first_non_finite({"": model}, loss_of(model))
    # The first in the order of the backward that receives it is what fc1 reads.
    assert found.kind == "the gradient at the output of module"
    assert found.name == "encoder.layers.1.fc1"


def test_the_gradient_of_a_parameter_alone(model: Hubert) -> None:
    scale = model.encoder.layers[0].fc1.weight_quantizer.log_scale
    scale.register_hook(lambda gradient: gradient / 0)
    found = first_non_finite({"": model}, loss_of(model))
    assert found.kind == "the gradient of parameter"
    assert found.name == "encoder.layers.0.fc1.weight_quantizer.log_scale"
