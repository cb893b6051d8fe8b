"""Masks so mild that a temperature would show what they hide, and logits of any number of rows."""

from __future__ import annotations

import pytest
import torch

from tempering.attention.axes import FOLDED, STANDARD, candidates, of_any_rows
from tempering.attention.examining.masking import soft_mask
from tempering.attention.hooks.dividing import with_hard_mask

STATES = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def mask(hidden: float, shown: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor([[shown, hidden], [hidden, shown]], dtype=dtype)


def test_the_argument_that_holds_a_mild_mask_is_found():
    assert soft_mask(((STATES, mask(-100.0)), {})) == 1
    assert soft_mask(((STATES,), {"attention_mask": mask(-100.0)})) == "attention_mask"
    assert soft_mask(((STATES, mask(-200.0, dtype=torch.float16)), {})) == 1


@pytest.mark.parametrize(
    "item",
    [
        None,
        mask(-1e4),  # hides at any temperature, and is known by its size
        mask(float("-inf")),
        mask(-8.0),  # a bias
        mask(-100.0, shown=-1.0),  # of a bias and a mask: not 0 and one number
        torch.tensor([[0.0, -100.0, -60.0]]),
        torch.zeros(2, 2),
        torch.tensor([[0, -100]]),
        torch.zeros(0),
        STATES * 100,
        torch.tensor([[float("nan"), 0.0]]),
    ],
)
def test_what_is_no_mild_mask(item):
    assert soft_mask(((STATES, item), {"more": item})) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_mask_alone_is_hardened(dtype):
    given = mask(-100.0, dtype=dtype)
    lowest = torch.finfo(dtype).min
    wanted = torch.tensor([[0.0, lowest], [lowest, 0.0]], dtype=dtype)
    args, kwargs = with_hard_mask(1, (STATES, given, "more"), {"x": STATES})
    assert args[0] is STATES and args[2] == "more" and kwargs == {"x": STATES}
    assert torch.equal(args[1], wanted)
    args, kwargs = with_hard_mask("mask", (STATES,), {"mask": given})
    assert torch.equal(kwargs["mask"], wanted)
    assert torch.equal(given, mask(-100.0, dtype=dtype))  # the caller's own stays


@pytest.mark.parametrize("place", [1, 5, "mask"])
def test_a_call_without_the_mask_stays_as_it_is(place):
    args, kwargs = with_hard_mask(place, (STATES, None), {})
    assert args == (STATES, None)
    assert kwargs == {}


def test_any_number_of_rows_is_read_where_heads_have_an_axis():
    assert of_any_rows((18, 4, 16, 16), {4}) == [(STANDARD, 4)]
    assert of_any_rows((72, 16, 16), {4}) == [(FOLDED, 4)]
    assert of_any_rows((70, 16, 16), {4}) == []
    assert of_any_rows((18, 3, 16, 16), {4}) == []
    assert of_any_rows((2, 3, 4, 16, 16), {4}) == []


def test_one_head_and_one_window_are_no_two_readings():
    assert len(candidates((2, 1, 1, 64, 64), 2, {1})) == 1
    assert len(candidates((2, 4, 4, 8, 8), 2, {4})) == 2
