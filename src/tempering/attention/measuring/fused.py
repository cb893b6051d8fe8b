"""The moments of an attention call, and its output, by one Triton kernel.

`moments` here has the interface of `streaming.moments`. It forms each logit once, in registers,
where the streaming path writes tiles of them to memory; on a GPU that is most of the time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.logits import AttentionCall
from tempering.attention.measuring import streaming
from tempering.attention.measuring.streaming import Moments
from tempering.errors import TemperingWarning

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
_LOG2E = 1.4426950408889634


class Fused(NamedTuple):
    """What one pass gives.

    first_key: Float[Tensor, "batch heads q_seq"], the logits of key 0 where the moments leave it
    out, -inf where hidden. output: Float[Tensor, "batch heads q_seq d"] of the attention, or None.
    """

    moments: Moments
    first_key: Float[Tensor, "batch heads q_seq"]
    output: Float[Tensor, "batch heads q_seq d"] | None


def serves(call: AttentionCall) -> bool:
    """Whether the kernel is used for a call: on CUDA, where it works, if it can run the call."""
    return call.query.is_cuda and can_run(call) and _works(call.query.device)


def can_run(call: AttentionCall) -> bool:
    """Whether the kernel computes this call: all but float64, additive masks and other caps."""
    cap_per_head = not isinstance(call.cap, Tensor) or call.cap.shape[2:] == (1, 1)
    shown = call.mask is None or call.mask.dtype == torch.bool
    width = call.query.shape[-1]
    plain = call.query.dtype in _DTYPES and call.key.dtype == call.query.dtype
    return plain and cap_per_head and shown and width <= _LARGEST_HEAD and call.key.shape[2] > 0


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether the kernel runs on a device, to the numbers of the streaming path; warns if not."""
    if importlib.util.find_spec("triton") is None:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, 70, 64, generator=generator).to(device) for n in (4, 2))
    call = AttentionCall(query, key, 0.3, causal=True, window=40)
    try:
        found, expected = run(call, 1).moments, streaming.moments(call, 1)
        # Where a query sees no key, both tops are -inf.
        pairs = zip(found, expected, strict=True)
        off = torch.stack([(a - b).abs().masked_fill(a == b, 0) for a, b in pairs])
        worst = float(off.max())  # NaN where one is
        why = f"it is off by {worst:.2g}" if not worst < 1e-2 else None
    except Exception as error:  # a compiler has many of its own
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if why is not None:
        warnings.warn(
            f"the fused kernel for measuring doesn't work on {device} ({why}); measuring goes on "
            "without it, more slowly and to the same numbers",
            TemperingWarning,
            stacklevel=2,
        )
    return why is None


def run(
    call: AttentionCall,
    first: int = 0,
    value: Float[Tensor, "batch kv_heads kv_seq d"] | None = None,
    beta: Float[Tensor, "rows heads"] | None = None,
) -> Fused:
    """One pass over an attention call.

    Parameters
    ----------
    first: 0, or 1 to leave key 0 out of the moments (not of the output).
    value: with it, the output is computed too; learned sinks take part in it, and not in moments.
    beta: 1/T of each head, for one row or each; the finished logits are divided by T, learned sinks
        too. 1 without it.
    """
    from tempering.attention.measuring.fused_kernel import HIDDEN, attention_moments

    batch, heads, q_seq, width = call.query.shape
    kv_seq, device = call.key.shape[2], call.query.device
    over_t = torch.ones(batch, heads, device=device)
    if beta is not None:
        over_t = over_t * beta.to(device, torch.float32)
    cap = torch.zeros(batch, heads, device=device)
    if call.cap is not None:
        own = call.cap.reshape(call.cap.shape[:2]) if isinstance(call.cap, Tensor) else call.cap
        cap = (cap + own) * over_t
    bias, mask, sinks = call.bias, call.mask, None
    if bias is not None:
        bias = bias.to(torch.float32) * over_t[:, :, None, None]
    if mask is not None:
        mask = mask.to(torch.int8)
    if call.sinks is not None and value is not None:
        sinks = call.sink_column(torch.arange(q_seq, device=device))[..., 0].float()
        sinks = sinks * over_t[:, :, None]
    sums = torch.zeros(6, batch, heads, q_seq, device=device)
    first_key = torch.full((batch, heads, q_seq), -torch.inf, device=device)
    output = (
        None
        if value is None
        else torch.empty_like(call.query, memory_format=torch.contiguous_format)
    )
    block_d = max(16, 1 << (width - 1).bit_length())
    block_m, block_n = (64, 64) if block_d <= 128 else (32, 32)
    floor = -1e30 if call.only_products else torch.finfo(call.query.dtype).min / 2 * _LOG2E
    anything = sums  # stands where the kernel has nothing to read
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        attention_moments[(-(-q_seq // block_m), batch * heads)](
            call.query,
            call.key,
            anything if value is None else value,
            anything if mask is None else mask,
            anything if bias is None else bias,
            over_t.contiguous() * call.scaling,
            cap.contiguous(),
            anything if sinks is None else sinks,
            sums,
            first_key,
            anything if output is None else output,
            *call.query.stride(),
            *call.key.stride(),
            *(value.stride() if value is not None else (0,) * 4),
            *_strides(mask, call),
            *_strides(bias, call),
            *(sinks.stride() if sinks is not None else (0,) * 3),
            heads,
            heads // call.key.shape[1],
            q_seq,
            kv_seq,
            first,
            0 if call.causal else kv_seq - q_seq,
            call.window or 0,
            max(floor, -3e38),
            sums[0].numel(),
            HAS_CAP=call.cap is not None,
            HAS_MASK=mask is not None,
            HAS_BIAS=bias is not None,
            HAS_SINKS=sinks is not None,
            CAUSAL=call.causal,
            HAS_WINDOW=call.window is not None,
            WITH_OUTPUT=value is not None,
            WIDE=not call.query.is_cuda,
            D=width,
            BLOCK_D=block_d,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
    return Fused(_natural(sums, float(HIDDEN.value)), first_key, output)


def _strides(item: Tensor | None, call: AttentionCall) -> tuple[Any, ...]:
    """Strides over [batch, heads, q_seq, kv_seq] of a tensor that broadcasts to it."""
    if item is None:
        return (0,) * 4
    shape = (*call.query.shape[:3], call.key.shape[2])
    return item[..., : shape[3]].expand(shape).stride()


def _natural(sums: Tensor, hidden: float) -> Moments:
    """Moments from sums in units of log 2, partition and squares less the likeliest key."""
    top, rest, first, second, squares, distance = sums.double()
    unseen = top <= hidden / 2
    whole = (rest + 1, first / _LOG2E, second / _LOG2E**2, squares + 1, distance)
    return Moments(
        (top / _LOG2E).masked_fill(unseen, -torch.inf), *(s.masked_fill(unseen, 0) for s in whole)
    )
