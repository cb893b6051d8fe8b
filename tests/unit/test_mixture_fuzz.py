"""The first data sets of the fuzz; `benchmarks/mixture_fuzz.py` runs two thousand."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # it imports its neighbour
        yield importlib.import_module("mixture_fuzz")


@pytest.mark.parametrize("first", [0, 12])
def test_fits_hold_warn_or_refuse_truthfully(fuzz, first):
    outcomes = {seed: fuzz.judge(fuzz.draw(seed)) for seed in range(first, first + 12)}
    failed = {seed: found for seed, found in outcomes.items() if found.kind in fuzz.FAILED}
    assert failed == {}
    kinds = [found.kind for found in outcomes.values()]
    assert kinds.count("fitted") >= 4  # most data sets are neither refused nor warned of


@pytest.mark.parametrize(
    ("seed", "kinds"),
    [
        (118, {"refused"}),  # reg_covar is lost in rounding, so the columns depend on each other
        (148, {"less likely, and says so", "fitted with a warning"}),  # 7 rows, 35 free numbers
        (358, {"less likely, and says so", "fitted with a warning"}),  # 14 rows, 34 free numbers
        (378, {"refused"}),  # Student's t on as many values as there are components
        (429, {"fitted"}),  # two components: merged and cut elsewhere
        (602, {"refused"}),  # a row far away is a component alone
        (1097, {"fitted"}),  # float32 rows on the mean of a Laplace component
    ],
)
def test_data_sets_that_failed_once(fuzz, seed, kinds):
    found = fuzz.judge(fuzz.draw(seed))
    assert found.kind in kinds, found
