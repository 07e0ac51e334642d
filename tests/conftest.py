"""Tests marked slow take minutes and run when they are asked for: pytest -m slow."""
import pytest


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr: return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
