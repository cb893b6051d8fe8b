"""The trial of the softmax route: are the logits that reach the softmax divided by T?

The logits before and after the division are at hand here, so they are compared one by one: live
ones to within their own rounding; masked ones to the bit, if they are -inf or the dtype's minimum.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tempering.attention import axes
from tempering.attention.examining.interface_trial import (
    Findings,
    in_force,
    row_temperatures,
    trial_state,
)
from tempering.attention.examining.reference import Arguments, logit_spread, product_logits
from tempering.attention.hooks import softmax_route
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.attention.layout import AttentionLayer

# So many logits of a call are compared at most, of queries at an even stride: an image of 64 x 64
# latents has 2e7 a head. What divides one query's logits divides all.
_ENTRIES = 1 << 22
# Two roundings, of beta and of the product, and as many in the sums of a scaled dot product.
_ROUNDINGS = 4


class SoftmaxTrial:
    """What the softmax route calls with the logits of a module, before and after it divides them.

    findings: where it notes what the reference made of them.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def try_softmax(self, layer: AttentionLayer, logits: Tensor, dim: int) -> None:
        """Try a softmax of an untempered module."""
        for state in self._states(layer, logits):
            softmax_route.tempered_logits(state, logits, dim)

    def try_product(
        self, layer: AttentionLayer, arguments: Arguments, options: dict[str, Any]
    ) -> None:
        """Try a scaled dot product attention of an untempered module."""
        for state in self._states(layer, arguments[0]):
            softmax_route.tempered_product(state, *arguments, (), options)

    def _states(self, layer: AttentionLayer, like: Tensor) -> list[TemperatureState]:
        """T = 1, and random temperatures in the last row of the batch."""
        rows = like.shape[0] // layer.heads if like.ndim == 3 else like.shape[0]
        states = []
        for table in (torch.ones(1, layer.heads).double(), row_temperatures(layer, rows)):
            state = trial_state(layer, like)
            state.set(self, table)
            state.trial = self
            states.append(state)
        return states

    def softmax(self, state: TemperatureState, pattern: str, before: Tensor, after: Tensor) -> None:
        """Called with the logits of a softmax before and after they were divided."""
        plain = axes.standard(before, pattern, state.layer.heads)
        some = _some_queries(plain.shape)
        plain = plain[:, :, some]
        over_t = axes.standard(after, pattern, state.layer.heads)[:, :, some].double()
        floor = max(state.layer.mask_floor, torch.finfo(before.dtype).min / 2)
        masked, dtype = plain <= floor, plain.dtype
        plain = plain.double()
        self._judge(state, plain, over_t, masked, plain.abs(), dtype)

    def product(
        self,
        state: TemperatureState,
        before: Arguments,
        after: Arguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Called with query, key, value and mask before and after they were divided."""
        causal = args[1] if len(args) > 1 else kwargs.get("is_causal", False)
        if not causal:
            some = _some_queries((*before[0].shape[:3], before[1].shape[2]))
            before, after = _of_queries(before, some), _of_queries(after, some)
        plain, size = product_logits(before, args, kwargs)
        over_t, _ = product_logits(after, args, kwargs)
        floor = max(state.layer.mask_floor, torch.finfo(before[0].dtype).min / 2)
        self._judge(state, plain, over_t, plain <= floor, size, before[0].dtype)

    def _judge(
        self,
        state: TemperatureState,
        plain: Tensor,
        over_t: Tensor,
        masked: Tensor,
        size: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """Compare logits over T, as the route made them, with the reference's.

        size: of the summands of each logit, which its rounding is a share of.
        """
        layer, findings = state.layer, self.findings
        temperature = in_force(state, len(plain)).to(plain.device)[:, :, None, None]
        exact = torch.where(masked, plain, plain / temperature)
        eps = max(torch.finfo(dtype).eps, torch.finfo(state.beta.dtype).eps)
        rounding = _ROUNDINGS * eps * size / temperature
        error = (over_t - exact).nan_to_num(0.0).abs()
        # Masking by a mild constant is no one number: it is to stay under the floor and, divided
        # by T < 1, as far under the live logits.
        lowest = torch.finfo(dtype).min / 2
        hidden = plain / temperature.clamp(max=1.0)
        deep = (over_t <= hidden + rounding) | (temperature > 1)
        mild = masked & (plain > lowest) & (over_t <= max(layer.mask_floor, lowest)) & deep
        error, allowed = error.masked_fill(mild, 0.0), rounding.masked_fill(masked, 0.0)
        findings.calls[layer.name] = findings.calls.get(layer.name, 0) + 1
        if bool(((error > allowed) | (over_t.isnan() & ~plain.isnan())).any()):
            findings.disagree(
                f"{layer.name} disagrees with the reference: a logit of its softmax is off by "
                f"{error.max().item():.2g} (allowed {allowed.max().item():.2g})"
            )
        if bool(((over_t != plain) & (temperature == 1) & (size > 0)).any()):
            findings.disagree(f"{layer.name}: T = 1 does not reproduce the original bit for bit")
        live = ~masked
        change = (exact - plain)[live].norm().item()
        if change > 0:
            findings.share = max(findings.share, error[live].norm().item() / change)
            findings.moved = max(findings.moved, change / plain[live].norm().item())
        findings.spread = max(findings.spread, logit_spread(plain, masked))


def _some_queries(shape: Collection[int]) -> slice:
    """Which queries of logits [rows, heads, queries, keys] are compared."""
    return slice(None, None, 1 + math.prod(shape) // _ENTRIES)


def _of_queries(arguments: Arguments, some: slice) -> Arguments:
    """The arguments of a scaled dot product attention for some of its queries."""
    query, key, value, mask = arguments
    if isinstance(mask, Tensor) and mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., some, :]
    return query[:, :, some], key, value, mask
