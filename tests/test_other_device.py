"""The stand-in for an accelerator refuses what an accelerator refuses, and computes what a CPU
computes."""

import pytest
import torch

from tests.other_device import OTHER, MixedDevices, other_device


def test_tensors_of_two_devices_do_not_mix() -> None:
    with other_device():
        there, here = torch.ones(2, device=OTHER), torch.ones(2)
        for mixed in (
            lambda: there + here,
            lambda: torch.where(there > 0, there, here),
            lambda: torch.cat([there, here]),
            lambda: there.add_(here),
            lambda: here.mul_(there),
        ):
            with pytest.raises(MixedDevices, match="on cpu"):
                mixed()
        with pytest.raises(RuntimeError):
            there.numpy()
        assert (there + torch.tensor(2.0)).tolist() == [3, 3]
        assert (there[here > 0] + here.to(OTHER)).cpu().tolist() == [2, 2]
        assert (there.cpu() + here).tolist() == [2, 2]


def test_tensors_are_where_they_were_asked_for() -> None:
    with other_device():
        there = torch.tensor([1.0, 2.0], device=OTHER)
        for made in (there, there.new_tensor([3.0]), there * 2, torch.zeros_like(there), there[0]):
            assert made.device.type == OTHER
        assert torch.arange(2).device.type == there.cpu().device.type == "cpu"
        assert there.tolist() == [1, 2]


def test_gradients() -> None:
    gradients = []
    layer = torch.nn.Linear(3, 2)
    with other_device():
        for device in ("cpu", OTHER):
            layer.to(device).zero_grad()
            layer(torch.ones(4, 3, device=device)).square().sum().backward()
            assert layer.weight.grad.device.type == device
            gradients.append(layer.weight.grad.cpu())
    torch.testing.assert_close(*gradients)
