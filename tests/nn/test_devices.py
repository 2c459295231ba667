"""Quantized operators on another device than the CPU: the same codes, outputs and scales."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from fairseq_lowbit.models import Hubert
from fairseq_lowbit.monitoring.health import measure_health
from fairseq_lowbit.nn import calibrate, quantizers
from fairseq_lowbit.nn.attention import SelfAttention
from fairseq_lowbit.nn.operators import Operator
from fairseq_lowbit.precision import Precision
from fairseq_lowbit.quantization import Criterion
from fairseq_lowbit.quantization.calibration import MSE
from tests.shapes import TINY

PRECISIONS = ("bitla_w1a1", "bitla_w4a4", "sqwq_w2", "absmax_w4a8")
Calls = dict[str, tuple[tuple, Tensor]]


def waveform() -> Tensor:
    return 0.1 * torch.randn(2, 1600, generator=torch.Generator().manual_seed(1))


def build(precision: str) -> Hubert:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Hubert(replace(TINY, encoder_layers=1), precision=Precision(precision)).eval()
    return model.requires_grad_(False)


@cache
def calibrated(precision: str, criterion: Criterion = MSE) -> Hubert:
    model = build(precision)
    calibrate(model, [waveform()], model.final_output, criterion)
    return model


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[Calls]:
    """The inputs and the output of each one's last call."""
    calls: Calls = {}

    def record(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            calls[name] = (inputs, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def moved(inputs: tuple, device: str) -> tuple:
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_codes_are_equal_and_outputs_close(precision: str, dtype: torch.dtype, device: str) -> None:
    """Each operator on the inputs that it has on the CPU: a sum of other order may carry the next
    one's inputs over a threshold."""
    model = deepcopy(calibrated(precision, Criterion("absmax"))).to(dtype)
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Operator | SelfAttention)
    }
    own = dict(quantizers(model))
    with recorded({**modules, **own}) as calls:
        model.final_output(waveform().to(dtype))
    there = deepcopy(model).to(device)
    for name, quantizer in own.items():
        inputs, decoded = calls[name]
        codes = there.get_submodule(name).codes(*moved(inputs, device))
        assert torch.equal(codes.integers.cpu(), quantizer.codes(*inputs).integers), name
        result = there.get_submodule(name)(*moved(inputs, device))
        assert result.device.type == device
        torch.testing.assert_close(result.cpu().type_as(decoded), decoded, rtol=1e-4, atol=1e-4)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name in modules:
        inputs, output = calls[name]
        result = there.get_submodule(name)(*moved(inputs, device))
        result = result[0] if isinstance(result, tuple) else result
        assert result.device.type == device
        # Attention has quantizers inside, see above.
        if not isinstance(modules[name], SelfAttention):
            torch.testing.assert_close(result.cpu(), output, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "precision", ["sqwq_w2", pytest.param("bitla_w1a1", marks=pytest.mark.full)]
)
def test_calibration_and_health(precision: str, device: str) -> None:
    here, there = calibrated(precision), build(precision).to(device)
    calibrate(there, [waveform().to(device)], there.final_output)
    for (name, own), (_, value) in zip(here.named_parameters(), there.named_parameters()):
        assert value.device.type == device
        torch.testing.assert_close(value.cpu(), own, rtol=1e-3, atol=1e-4, msg=name)
    health = measure_health(there, waveform().to(device))
    for own, other in zip(measure_health(here, waveform()).quantizers, health.quantizers):
        assert own.name == other.name
        assert own.sqnr_db == pytest.approx(other.sqnr_db, abs=0.1)


def test_a_float_model_agrees_to_rounding(device: str) -> None:
    model = build("float")
    lengths = torch.tensor([1600, 1000])
    outputs, padding = model.hidden_states(waveform(), lengths)
    others, mask = deepcopy(model).to(device).hidden_states(*moved((waveform(), lengths), device))
    assert torch.equal(mask.cpu(), padding)
    for own, other in zip(outputs, others):
        torch.testing.assert_close(other.cpu()[~padding], own[~padding], rtol=1e-4, atol=1e-4)
