"""What attention should give: softmax(l / T) V in float64, with l read below the model's code.

For a call of the attention interface, the model's own eager function runs on float64 copies of
the arguments; the logits l are what arrives at PyTorch's softmax operator. The values are
weighted here, without the code of either route. At T = 1 the result must equal what the eager
function gives, which proves that l and the sinks are read rightly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tempering.attention.visibility import is_causal, is_flash, visible, visible_to_flash
from tempering.errors import ArchitectureError

# The first arrives in inference mode, where composite operators are not taken apart.
_SOFTMAX = ("aten::softmax", "aten::_softmax", "aten::_safe_softmax")
# Single precision, in which some models form their softmax whatever they are given; and how many
# of its roundings, relative to the largest logit, are allowed for.
_EPS, _FACTOR = torch.finfo(torch.float32).eps, 32

# Query, key, value, mask.
Arguments = tuple[Tensor, Tensor, Tensor, Any]


class _Logits(TorchDispatchMode):
    """Keeps what arrives at the softmax operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name in _SOFTMAX:
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))


class ReferenceCall:
    """One call of the attention interface, in float64.

    logits: Float[Tensor, "batch heads queries keys"], finished; with `sink_column` the last key
        is a sink, which has no value. masked: entries that masking hides.
    visible: queries that see at least one key; the others mean nothing.
    """

    def __init__(
        self,
        eager: Callable[..., Any],
        module: nn.Module,
        arguments: Arguments,
        kwargs: dict[str, Any],
        floor: float,
    ) -> None:
        query, key, value, mask = arguments
        dense = dense_mask(module, query, key, mask, kwargs)
        watcher = _Logits()
        wide = {name: widened(item) for name, item in kwargs.items()}
        with watcher:
            output = eager(module, query.double(), key.double(), value.double(), dense, **wide)
        if len(watcher.seen) != 1:
            raise ArchitectureError(
                f"the eager attention of {type(module).__name__} calls softmax "
                f"{len(watcher.seen)} times, so it is not softmax(l) V"
            )
        logits = watcher.seen[0].double()
        self.eager: Tensor = output[0].double()
        self.value = value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        keys = key.shape[2]
        sinks = _sinks(module, kwargs)
        if sinks is not None and logits.shape[-1] == keys:
            # The sink joins after the softmax, as a factor 1 / (1 + exp(sink - logsumexp(l))).
            column = sinks.double().reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, column], dim=-1)
        self.sink_column = logits.shape[-1] > keys
        if logits.shape[-1] - keys not in (0, 1):
            raise ArchitectureError(
                f"{type(module).__name__} has {logits.shape[-1]} logits a query for {keys} keys"
            )
        self.masked = torch.zeros_like(logits, dtype=torch.bool)
        self.masked[..., :keys] = _hidden(logits[..., :keys], dense, floor)
        self.logits = logits
        self.visible = (~self.masked[..., :keys]).any(-1).all(1)

    @property
    def noise(self) -> float:
        """What rounding of the logits may do to the output, as a share of it."""
        return _FACTOR * _EPS * (1 + self.logits.masked_fill(self.masked, 0.0).abs().max().item())

    def output(self, temperature: Float[Tensor, "rows heads"] | None = None) -> Tensor:
        """softmax(l / T) V as [batch, queries, heads, values]."""
        logits = self.logits if temperature is None else self.logits / temperature[:, :, None, None]
        weights = logits.masked_fill(self.masked, -math.inf).softmax(-1).nan_to_num(0.0)
        if self.sink_column:
            weights = weights[..., :-1]
        return (weights @ self.value).transpose(1, 2)

    def norm(self, output: Tensor) -> float:
        """The norm of an output, over the queries that see a key."""
        return output[self.visible].double().norm().item()

    def spread(self) -> float:
        """`logit_spread` of the call."""
        return logit_spread(self.logits, self.masked)


def logit_spread(logits: Tensor, masked: Tensor) -> float:
    """Root mean square over queries of the standard deviation of the logits over keys."""
    live = logits.masked_fill(masked, math.nan)
    return float((live - live.nanmean(-1, keepdim=True)).square().nanmean().sqrt())


def product_logits(
    arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Logits of a scaled dot product attention in float64, and the size of their summands.

    args: what follows the mask: dropout_p, is_causal, scale, enable_gqa.
    """
    options = dict(zip(("dropout_p", "is_causal", "scale", "enable_gqa"), args, strict=False))
    options |= kwargs
    query, key, _, mask = (widened(item) for item in arguments)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)
    factor = query.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    logits, size = query @ key * factor, query.abs() @ key.abs() * abs(factor)
    if mask is not None and mask.is_floating_point():
        logits, size = logits + mask, size + mask.abs()
    elif mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    elif options.get("is_causal"):
        seen = visible(*map(range, logits.shape[-2:]), causal=True, device=logits.device)
        logits = logits.masked_fill(~seen, -math.inf)
    return logits, size


def _hidden(logits: Tensor, mask: Tensor | None, floor: float) -> Tensor:
    hidden = logits == -math.inf
    return hidden if mask is None else hidden | (mask <= floor)


def widened(item: Any) -> Any:
    """A floating tensor in float64, its masking entries float32's lowest; else the item itself."""
    if isinstance(item, Tensor) and item.is_floating_point():
        floor = torch.finfo(item.dtype).min / 2
        return torch.where(item > floor, item.double(), torch.finfo(torch.float32).min)
    return item


def _sinks(module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
    for item in (kwargs.get("s_aux"), kwargs.get("sinks"), getattr(module, "sinks", None)):
        if isinstance(item, Tensor):
            return item
    return None


def dense_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of any implementation as float64 numbers to add to [batch, heads, queries, keys]."""
    least = torch.finfo(torch.float32).min
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point():
        # The minimum of half precision would be a live logit here, so float32's takes its place.
        floor = torch.finfo(mask.dtype).min / 2
        return torch.where(mask > floor, mask.double(), least)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        seen = mask.bool()
    elif mask is not None and not isinstance(mask, Tensor):
        seen = _block_mask(mask, query, key)
    else:
        implementation = str(module.config._attn_implementation)  # type: ignore[union-attr]
        if mask is None and implementation == "eager":
            return None
        implicit = _implicit_mask(module, query, key, mask, kwargs)
        if implicit is None:
            return None
        seen = implicit
    return torch.zeros_like(seen, dtype=torch.float64).masked_fill(~seen, least)


def _block_mask(mask: Any, query: Tensor, key: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = query.shape[:2]
    return create_mask(
        mask.mask_mod, batch, heads, query.shape[2], key.shape[2], device=str(query.device)
    )


def _implicit_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor | None:
    """What fused kernels hide by themselves, and a padding mask [batch, keys]; None for neither."""
    queries, keys = query.shape[2], key.shape[2]
    flash = is_flash(module)
    causal = is_causal(module, kwargs)
    window = kwargs.get("sliding_window") if flash else None
    if mask is None and not causal and window is None:
        return None
    if flash:
        seen = visible_to_flash(queries, keys, causal=causal, window=window, device=query.device)
    else:  # scaled dot products put the first query at the first key, and one query at the last
        causal = causal and queries > 1
        seen = visible(range(queries), range(keys), causal=causal, device=query.device)[None, None]
    return seen if mask is None else seen & mask.bool()[:, None, None, :keys]
