"""softmax(l / T) V in float64 in place of all attention that a model of diffusers calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# What a mask of diffusers adds where it hides a key.
HIDDEN = -1e4


@contextlib.contextmanager
def attention_divided(
    model: Any, temperatures: dict[str, Tensor], beta: Callable[..., Tensor] | None = None
) -> Iterator[list[str]]:
    """softmax(l / T) V in float64, in place of every attention that the model's modules call.

    temperatures: [heads] or [rows, heads] by module. beta: (module, keys seen of every query) ->
    one more factor. Yields the names of the modules in the order of their calls. It shares no code
    with the library: scaled dot products are written out, and the module is the innermost one, of
    those that have a temperature, whose forward runs.
    """
    running: list[str] = []
    called: list[str] = []
    handles = []
    for name in temperatures:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    own = torch.Tensor.softmax

    def over_t(logits: Tensor) -> Tensor:
        """Finished logits [rows, heads, q, k] over T; those at or under -5000 are hidden."""
        name = running[-1]
        called.append(name)
        T = temperatures[name].double()
        T = T.expand(logits.shape[0], -1) if T.ndim == 1 else T
        factor = 1 / T[:, :, None, None]
        live = logits > HIDDEN / 2
        if beta is not None:
            factor = factor * beta(name, live.sum(-1, keepdim=True))
        hidden = torch.where(live.any(-1, keepdim=True), -torch.inf, logits)
        return torch.where(live, logits * factor, hidden)

    def product(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        dtype = query.dtype
        query, key, value = query.double(), key.double(), value.double()
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
        if is_causal:
            later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask.double()
        over = over_t(logits)
        weights = torch.exp(over - over.logsumexp(-1, keepdim=True)).nan_to_num(0.0)
        # In the memory order of PyTorch's own kernels, which some models rely on.
        mixed = torch.einsum("bhqk,bhkd->bqhd", weights, value).to(dtype)
        return mixed.contiguous().transpose(1, 2)

    def softmax(logits, dim=None, *args, **kwargs):
        if not running:
            return own(logits, dim, *args, **kwargs)
        heads = temperatures[running[-1]].shape[-1]
        folded = logits.double().reshape(-1, heads, *logits.shape[-2:])
        return own(over_t(folded), -1).reshape(logits.shape).to(logits.dtype)

    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", product),
        mock.patch.object(torch.Tensor, "softmax", softmax),
        mock.patch.object(torch, "softmax", softmax),
        mock.patch.object(functional, "softmax", softmax),
    ):
        try:
            yield called
        finally:
            for handle in handles:
                handle.remove()


def random_rows(plan: Any, seed: int = 3) -> list[Tensor]:
    """Temperatures of every head, log-uniform in 1/3..3."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.exp(1.1 * (2 * torch.rand(heads, generator=generator, dtype=torch.float64) - 1))
        for heads in plan.heads
    ]
