"""The trial of the softmax route: are the logits that reach the softmax divided by T?

The logits before and after the division are at hand here, so they are compared one by one: live
ones to within their own rounding, masked ones to the bit.
"""

from __future__ import annotations

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
        self, layer: AttentionLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Try a scaled dot product attention of an untempered module."""
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        more = {name: item for name, item in kwargs.items() if name != "attn_mask"}
        for state in self._states(layer, args[0]):
            softmax_route.tempered_product(state, args[0], args[1], args[2], mask, args[4:], more)

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
        over_t = axes.standard(after, pattern, state.layer.heads).double()
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
        allowed = (_ROUNDINGS * eps * size / temperature).masked_fill(masked, 0.0)
        error = (over_t - exact).nan_to_num(0.0).abs()
        findings.calls[layer.name] = findings.calls.get(layer.name, 0) + 1
        if bool(((error > allowed) | (over_t.isnan() & ~plain.isnan())).any()):
            findings.disagree(
                f"{layer.name} disagrees with the reference: a logit of its softmax is off by "
                f"{error.max().item():.2g} (allowed {allowed.max().item():.2g})"
            )
        if bool(((over_t != exact) & (temperature == 1) & (size > 0)).any()):
            findings.disagree(f"{layer.name}: T = 1 does not reproduce the original bit for bit")
        live = ~masked
        change = (exact - plain)[live].norm().item()
        if change > 0:
            findings.share = max(findings.share, error[live].norm().item() / change)
            findings.moved = max(findings.moved, change / plain[live].norm().item())
        findings.spread = max(findings.spread, logit_spread(plain, masked))
