"""``--full``: every test, on a machine that has every optional package."""

import importlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run the tests marked full too, and fail where an optional package is missing"
    parser.addoption("--full", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("full"):
        pytest.importorskip = importlib.import_module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("full"):
        return
    full = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if item not in full]
