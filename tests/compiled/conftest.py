"""Compiled models, in a process that imports tempering as users do: `make test` starts it.

Dynamo can't trace the wrappers that check shapes in the other tests.
"""

import os
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if os.environ.get("SHAPES_UNCHECKED"):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip("compiled models: run with SHAPES_UNCHECKED=1"))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
