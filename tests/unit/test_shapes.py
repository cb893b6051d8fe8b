"""The check of signatures in tests: which sizes, dtypes and types it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from tempering.estimators.mixture import moves, radial
from tests.shapes import checked

if TYPE_CHECKING:
    from tempering.attention.profiles.profile import Profile

PerRow = Float[Tensor, " rows"]


@checked
def mean(values: Float[Tensor, "rows features"], weights: PerRow) -> PerRow:
    return weights @ values if len(weights) == 7 else values.mean(1)


@checked
def doubled(count: int, profile: Profile | None = None) -> int:
    return str(count) if count < 0 else 2 * count  # type: ignore[return-value]


@checked
def numbers(count: int) -> Iterator[int]:
    yield from range(count)


@checked
@dataclass(frozen=True)
class Pair:
    first: int
    second: Float[Tensor, " n"]
    third: Float[Tensor, " n"]


def test_sizes_of_one_name_are_equal_also_behind_an_alias() -> None:
    assert mean(torch.ones(3, 2), torch.ones(3)).shape == (3,)
    with pytest.raises(TypeCheckError, match="weights"):
        mean(torch.ones(3, 2), torch.ones(4))
    with pytest.raises(TypeCheckError, match="values"):
        mean(torch.ones(3, 2, dtype=torch.int64), torch.ones(3))
    with pytest.raises(TypeCheckError, match="return value"):
        mean(torch.ones(7, 2), torch.ones(7))


def test_types_of_arguments_and_results() -> None:
    assert doubled(2, profile=None) == 4 and list(numbers(2)) == [0, 1]
    wrong: Any = "2"
    for call in (lambda: doubled(wrong), lambda: doubled(-1), lambda: list(numbers(wrong))):
        with pytest.raises(BeartypeCallHintViolation):
            call()


def test_a_name_for_type_checkers_only_takes_anything_and_annotations_stay_as_written() -> None:
    anything: Any = object()
    assert doubled(1, anything) == 2
    assert doubled.__annotations__["profile"] == "Profile | None"


def test_dataclasses() -> None:
    assert Pair(1, torch.ones(2), torch.ones(2)).first == 1
    with pytest.raises(TypeCheckError):
        Pair(1, torch.ones(2), torch.ones(3))


def test_the_package_is_checked() -> None:
    wrong: Any = "12"
    with pytest.raises(BeartypeCallHintViolation):
        radial.radial("student_t", wrong)
    x, r = torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(TypeCheckError, match="the parameters of tempering.*refit"):
        moves.refit(x, r, wrong, wrong)
