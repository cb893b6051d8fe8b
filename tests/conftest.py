"""Shapes in signatures are checked at run time in every test but those of tests/compiled."""

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One thread: small operations on many threads wait for each other, worst on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings

# Speed is never asserted: a busy machine is no defect.
settings.register_profile("tempering", deadline=None)
settings.load_profile("tempering")
if not os.environ.get("SHAPES_UNCHECKED"):
    from tests import shapes

    shapes.install()


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of the embedded model, float32, in eval mode; don't change it."""
    from tempering.engines.loading.hub import load_model

    return load_model("smollm2")


@pytest.fixture(scope="session")
def gemma() -> tuple[Any, Any]:
    """(model, tokenizer) of gemma3-270m, float32; for tests marked `models`. Don't change it."""
    from tempering.engines.loading.hub import load_model

    return load_model("gemma3-270m")


def pytest_runtest_setup(item: pytest.Item) -> None:
    names = [name for mark in item.iter_markers("models") for name in mark.args]
    if not names:
        return
    from tempering.engines.loading.catalogue import MODELS
    from tempering.engines.loading.packages import find_source
    from tempering.errors import TemperingError

    for name in names:
        try:
            find_source(MODELS[name])
        except TemperingError:
            pytest.skip(f"{name} is not here; fetch it with: make models")
