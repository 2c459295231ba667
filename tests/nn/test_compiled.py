"""A quantized layer is one graph for torch.compile, and agrees with eager execution."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.models import Hubert
from fairseq_lowbit.models.encoder import EncoderLayer
from fairseq_lowbit.nn import Linear, calibrate, eagerly, every_quantizer_called
from fairseq_lowbit.precision import Precision, Rule
from fairseq_lowbit.quantization import UniformQuantizer
from tests.shapes import TINY

FRAMES = 7
PADDING = torch.arange(FRAMES) >= torch.tensor([[FRAMES], [4]])
PRECISIONS = {
    "bitla_w1a1": Precision("bitla_w1a1"),
    "bitla_w4a4": Precision("bitla_w4a4"),
    "sqwq_w2": Precision("sqwq_w2"),
    "minmax_w4a4": Precision("minmax_w4a4"),
    "stretched per group": Precision(
        "bitl_w2a2", [Rule("*.layers.*", method="stretched", granularity="per_group", group_size=8)]
    ),
}


def layer(precision: Precision) -> EncoderLayer:
    torch.manual_seed(0)
    model = Hubert(TINY, precision=precision)
    calibrate(model, [torch.randn(2, 900)], model.final_output)
    return model.layers[0].train()


def run(call: Callable, module: nn.Module) -> list[Tensor]:
    """Output, attention map, and every gradient."""
    x = torch.randn(2, FRAMES, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    module.zero_grad()
    torch.manual_seed(2)
    outputs = call(x, PADDING, "probabilities")
    (outputs.x.square().sum() + outputs.attention.square().sum()).backward()
    gradients = (x.grad, *(parameter.grad for parameter in module.parameters()))
    return [*(output.detach() for output in outputs), *gradients]


def without_dropout(module: nn.Module) -> nn.Module:
    """Whose random numbers a compiler draws in another order."""
    for inner in module.modules():
        if isinstance(inner, nn.Dropout):
            inner.p = 0.0
        if hasattr(inner, "dropout") and isinstance(inner.dropout, float):
            inner.dropout = 0.0
    return module


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize(
    "name, backend",
    [
        ("bitla_w1a1", "aot_eager"),
        *(pytest.param(name, "inductor", marks=pytest.mark.full) for name in PRECISIONS),
    ],
)
def test_a_compiled_layer_agrees_with_eager(name: str, backend: str) -> None:
    module = without_dropout(layer(PRECISIONS[name]))
    expected = run(module, module)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for own, other in zip(run(compiled, module), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_layers_share_what_is_compiled() -> None:
    """A base model has twelve of them, and compiling takes seconds."""
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = Hubert(TINY, precision=Precision("bitla_w2a2"))
    calibrate(model, [torch.randn(2, 900)], model.final_output)
    # As behind a front-end that is trained: a graph for an input without gradient would be another.
    x = torch.randn(2, FRAMES, 16, requires_grad=True)
    for module in model.layers:
        module.compile(fullgraph=True, backend=count)
        x = module(x, PADDING).x
    assert len(model.layers) > 1
    assert len(graphs) == 1


def test_hooks_of_inner_modules_are_called_inside_of_eagerly() -> None:
    module = nn.Sequential(Linear(6, 4))
    quantizer = module[0].weight_quantizer = UniformQuantizer("absmax", 4)
    module.compile(backend="eager")
    x = torch.randn(2, 6)
    module(x)
    called: list[nn.Module] = []
    quantizer.register_forward_hook(lambda own, *_: called.append(own))
    with eagerly():
        module(x)
    assert called == [quantizer]
    with every_quantizer_called(module):
        module(x)


@pytest.mark.full
def test_a_compiled_layer_can_be_copied_and_saved() -> None:
    module = layer(PRECISIONS["bitla_w1a1"])
    keys = set(module.state_dict())
    module.compile(backend="eager")
    x = torch.randn(2, FRAMES, 16)
    expected = module.eval()(x).x
    assert set(module.state_dict()) == keys
    torch.testing.assert_close(copy.deepcopy(module)(x).x, expected)
