"""The trial of the softmax route: are the logits that reach the softmax divided by T?

Here the logits are at hand before and after, so they are compared one by one: each to its own
rounding, and masking to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tempering.attention import axes
from tempering.attention.examining.interface_trial import (
    Trial,
    in_force,
    row_temperatures,
    trial_state,
)
from tempering.attention.examining.reference import Arguments, product_logits
from tempering.attention.hooks import softmax_route
from tempering.attention.hooks.state import TemperatureState
from tempering.attention.layout import AttentionLayer

# Two roundings, of beta and of the product, and as many in the sums of a scaled dot product.
_ROUNDINGS = 4


class SoftmaxTrial:
    """Shown, by `softmaxes`, what a tempered module does to its logits."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

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
        own = axes.standard(before, pattern, state.layer.heads)
        ours = axes.standard(after, pattern, state.layer.heads)
        floor = max(state.layer.mask_floor, torch.finfo(before.dtype).min / 2)
        self._judge(state, own.double(), ours.double(), own <= floor, own.double().abs(), own.dtype)

    def product(
        self,
        state: TemperatureState,
        before: Arguments,
        after: Arguments,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Called with query, key, value and mask before and after they were divided."""
        own, size = product_logits(before, args, kwargs)
        ours, _ = product_logits(after, args, kwargs)
        floor = max(state.layer.mask_floor, torch.finfo(before[0].dtype).min / 2)
        self._judge(state, own, ours, own <= floor, size, before[0].dtype)

    def _judge(
        self,
        state: TemperatureState,
        own: Tensor,
        ours: Tensor,
        masked: Tensor,
        size: Tensor,
        dtype: torch.dtype,
    ) -> None:
        layer, trial = state.layer, self.trial
        temperature = in_force(state, len(own)).to(own.device)[:, :, None, None]
        exact = torch.where(masked, own, own / temperature)
        eps = max(torch.finfo(dtype).eps, torch.finfo(state.beta.dtype).eps)
        allowed = (_ROUNDINGS * eps * size / temperature).masked_fill(masked, 0.0)
        error = (ours - exact).nan_to_num(0.0).abs()
        trial.calls[layer.name] = trial.calls.get(layer.name, 0) + 1
        if bool(((error > allowed) | (ours.isnan() & ~own.isnan())).any()):
            trial.object(
                f"{layer.name} disagrees with the reference: a logit of its softmax is off by "
                f"{error.max().item():.2g} (allowed {allowed.max().item():.2g})"
            )
        if bool(((ours != exact) & (temperature == 1) & (size > 0)).any()):
            trial.object(f"{layer.name}: T = 1 does not reproduce the original bit for bit")
        live = ~masked
        change = (exact - own)[live].norm().item()
        if change > 0:
            trial.share = max(trial.share, error[live].norm().item() / change)
            trial.moved = max(trial.moved, change / own[live].norm().item())
        trial.spread = max(trial.spread, spread(own, masked))


def spread(logits: Tensor, masked: Tensor) -> float:
    """Root mean square over queries of the standard deviation over keys."""
    live = logits.masked_fill(masked, torch.nan)
    return float((live - live.nanmean(-1, keepdim=True)).square().nanmean().sqrt())
