"""``--full``: every test, on a machine that has every optional package. ``-m gpu``: on a GPU."""

import importlib
from collections.abc import Iterator

import pytest
import torch

from tests.other_device import OTHER, other_device


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the tests marked full too, and fail where an optional package is missing"
    parser.addoption("--full", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("full"):
        pytest.importorskip = importlib.import_module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = set() if config.getoption("full") else {"full"}
    if "gpu" not in config.getoption("markexpr"):
        unwanted.add("gpu")
    left_out = [item for item in items if any(map(item.get_closest_marker, unwanted))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=[OTHER, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Something else than the CPU: a stand-in on every machine, and a GPU with ``-m gpu``."""
    if request.param == OTHER:
        monkeypatch.setattr(
            "fairseq_lowbit.cli.device_option.known_devices", lambda: ["cpu", OTHER]
        )
        with other_device():
            yield OTHER
        return
    # Convolutions of ten bits of mantissa, which CUDA takes by default, are no parity.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield "cuda"
