"""Between two updates no criterion waits for the device.

The model stands on the meta device of torch, which has no values to wait for, and the host may do
what it wants with tensors of its own.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_lowbit.models import LoadedModel, start_from
from fairseq_lowbit.nn import calibrate
from fairseq_lowbit.plugin import register
from fairseq_lowbit.precision import Precision, Rule
from tests.shapes import TINY

register()
from fairseq_lowbit.plugin.criterions import (  # noqa: E402
    LowbitHubertCriterion,
    LowbitHubertCriterionConfig,
    LowbitKdConfig,
    LowbitKdCriterion,
)
from fairseq_lowbit.plugin.models import HubertFastConvModel  # noqa: E402

SIZES = {"full": [900, 900], "padded": [900, 700]}
CLASSES = 5
aten = torch.ops.aten


class Waited(AssertionError):
    """A value of the device was read on the host."""


class NoWaiting(TorchDispatchMode):
    """Raises :class:`Waited` where a tensor of the meta device is read on the host: as a number or
    a truth value, by a result whose size depends on it, or by a copy."""

    READ = {
        aten._local_scalar_dense,
        aten.equal,
        aten.is_nonzero,
        aten.masked_select,
        aten.nonzero,
        aten.unique_dim,
        aten._unique2,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation, given = func.overloadpacket, _on_device((args, kwargs))
        by_mask = operation in (aten.index, aten.index_put, aten.index_put_) and any(
            index.dtype in (torch.bool, torch.uint8) for index in _on_device(args[1])
        )
        if given and (operation in self.READ or by_mask):
            raise Waited(str(func))
        to_host = torch.device(kwargs.get("device") or "meta").type == "cpu"
        copies = operation is aten.copy_ and args[0].device.type == "cpu"
        if given and (to_host or copies):
            raise Waited(str(func))
        return func(*args, **kwargs)


def _on_device(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.device.type == "meta"]


X = torch.empty(3, device="meta")


@pytest.mark.parametrize(
    "read",
    [
        lambda: X.sum().item(),
        lambda: bool((X > 0).all()),
        lambda: X[X > 0],
        lambda: X.masked_fill_(X > 0, 0).index_put_((X > 0,), torch.tensor(1.0)),
        lambda: X.nonzero(),
        lambda: X.masked_select(X > 0),
        lambda: torch.zeros(3).copy_(X),
        lambda: X.to("cpu"),
    ],
)
def test_every_way_to_wait_is_found(read) -> None:
    with pytest.raises(Waited), NoWaiting():
        read()


def build(name: str, rules: list[Rule], teacher: HubertFastConvModel) -> HubertFastConvModel:
    student = HubertFastConvModel(TINY, CLASSES, Precision(name, rules))
    start_from(student, _loaded(teacher))
    calibrate(student, [torch.randn(2, 900)], student.final_output)
    return student.train().to("meta")


def _loaded(model: HubertFastConvModel) -> LoadedModel:
    return LoadedModel(model, str(Path("teacher.pt")), 0, True, False)


def batch(sizes: list[int]) -> dict[str, Any]:
    is_padded = min(sizes) < max(sizes)
    return {
        "waveform": torch.empty(len(sizes), max(sizes), device="meta"),
        "lengths": torch.empty(len(sizes), dtype=torch.long, device="meta") if is_padded else None,
        "sizes": sizes,
        "targets": [torch.empty(len(sizes), 30, dtype=torch.long, device="meta")],
    }


FRONT_END = Rule("feature_extractor.*", weight_bits=8, activation_bits=8)
PRECISIONS = {
    "bitla_w1a1": ("bitla_w1a1", []),
    "sqwq_w1": ("sqwq_w1", []),
    "minmax_w4a4, front-end too": ("minmax_w4a4", [FRONT_END]),
    "float": ("float", []),
}


@pytest.fixture
def task(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    torch.manual_seed(0)
    teacher = HubertFastConvModel(TINY, CLASSES).eval().requires_grad_(False)
    model = build(*PRECISIONS[request.param], teacher)
    return SimpleNamespace(
        model=model,
        teacher=_loaded(teacher.to("meta")),
        shares_front_end=False,
        label_classes=CLASSES,
        label_ratio=1.0,
    )


CRITERIA = {
    "probabilities": (LowbitKdCriterion, LowbitKdConfig(front_end_weight=1.0)),
    "scores": (LowbitKdCriterion, LowbitKdConfig(attention="scores", mask=True)),
    "no maps": (LowbitKdCriterion, LowbitKdConfig(attention_weight=0.0)),
    "hubert": (LowbitHubertCriterion, LowbitHubertCriterionConfig()),
    "hubert, every frame": (
        LowbitHubertCriterion,
        LowbitHubertCriterionConfig(unmasked_weight=0.5),
    ),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("task", PRECISIONS, indirect=True)
@pytest.mark.parametrize("sizes", SIZES)
def test_forward_loss_and_backward_never_wait(task, sizes: str, criterion: str) -> None:
    build_criterion, config = CRITERIA[criterion]
    module = build_criterion(task, config)
    with NoWaiting():
        loss, _, _ = module(task.model, batch(SIZES[sizes]))
        loss.backward()
    trained = [p for p in task.model.encoder.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
