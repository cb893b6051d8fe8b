"""Triton kernel: the moments of every softmax next to the output of the attention, in one pass.

As flash attention does, a block of queries meets the keys block by block; beside the running
maximum m and the weighted values, five sums over keys are carried. With x = logit - m in units of
log 2 and e = 2^x, a change of the maximum by d = m - m' multiplies weights by w = 2^d, and

    sum e x    ->  w (sum e x + d sum e)
    sum e x^2  ->  w (sum e x^2 + 2 d sum e x + d^2 sum e)
    sum e^2    ->  w^2 sum e^2,        sum e |i - j|  ->  w sum e |i - j|

The likeliest key itself (x = 0, e = 1) is left out of sum e and sum e^2, so that small entropies
keep their digits in float32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Below every logit; finite, so that 0 times it is 0. In units of log 2.
HIDDEN = tl.constexpr(-1.0e30)
# A difference of logits beyond which a weight is 0 in float32 anyway; its square is finite.
_FARTHEST = tl.constexpr(-1.0e4)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x: Any) -> Any:
    e = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))  # a tensor first, which the interpreter needs
    size = (1.0 - e) / (1.0 + e)
    # Near 0 the difference loses its digits; the series is exact to float32 there.
    square = x * x
    series = tl.abs(x) * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * 17.0 / 315)))
    size = tl.where(tl.abs(x) < 0.1, series, size)
    return tl.where(x < 0, -size, size)


@triton.jit
def _finished(
    product: Any, scale: Any, cap: Any, bias: Any, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr
) -> Any:
    """Products -> logits in units of log 2."""
    x = product * scale
    if HAS_CAP:
        x = _tanh(x / cap) * cap
    if HAS_BIAS:
        x = x + bias
    return x * _LOG2E


@triton.jit
def attention_moments(
    Q: Any,
    K: Any,
    V: Any,
    Mask: Any,
    Bias: Any,
    Scale: Any,
    Cap: Any,
    Sinks: Any,
    Sums: Any,
    FirstKey: Any,
    Out: Any,
    stride_qb: Any,
    stride_qh: Any,
    stride_qm: Any,
    stride_qd: Any,
    stride_kb: Any,
    stride_kh: Any,
    stride_kn: Any,
    stride_kd: Any,
    stride_vb: Any,
    stride_vh: Any,
    stride_vn: Any,
    stride_vd: Any,
    stride_mb: Any,
    stride_mh: Any,
    stride_mm: Any,
    stride_mn: Any,
    stride_bb: Any,
    stride_bh: Any,
    stride_bm: Any,
    stride_bn: Any,
    stride_sb: Any,
    stride_sh: Any,
    stride_sm: Any,
    heads: Any,
    group: Any,
    q_len: Any,
    kv_len: Any,
    first: Any,
    offset: Any,
    window: Any,
    floor: Any,
    rows: Any,
    HAS_CAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WITH_OUTPUT: tl.constexpr,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One block of queries of one head.

    Sums: [6, batch, heads, q_seq], the fields of `streaming.Moments` in units of log 2; partition
    and squares less 1. FirstKey: [batch, heads, q_seq], the logits of the first key, in nats; -inf
    where hidden. Out: [batch, heads, q_seq, d]. floor: logits at or below it are hidden, in units
    of log 2. rows: batch * heads * q_seq. WIDE: multiply in float32, for the interpreter, which
    has no bfloat16.
    """
    start = tl.program_id(0) * BLOCK_M
    at = tl.program_id(1)
    batch = (at // heads).to(tl.int64)
    head = (at % heads).to(tl.int64)
    kv = head // group
    m_at = start + tl.arange(0, BLOCK_M)
    n_at = tl.arange(0, BLOCK_N)
    d_at = tl.arange(0, BLOCK_D)
    m_ok = m_at < q_len
    d_ok = d_at < D
    scale = tl.load(Scale + at)
    cap = tl.load(Cap + at)
    q_place = Q + batch * stride_qb + head * stride_qh
    k_place = K + batch * stride_kb + kv * stride_kh
    v_place = V + batch * stride_vb + kv * stride_vh
    mask_place = Mask + batch * stride_mb + head * stride_mh
    bias_place = Bias + batch * stride_bb + head * stride_bh
    q = tl.load(
        q_place + m_at[:, None] * stride_qm + d_at[None, :] * stride_qd,
        mask=m_ok[:, None] & d_ok[None, :],
        other=0.0,
    )

    if WIDE:
        q = q.to(tl.float32)

    top = tl.full([BLOCK_M], HIDDEN, tl.float32)
    rest = tl.zeros([BLOCK_M], tl.float32)  # sum e, less the likeliest key
    one = tl.zeros([BLOCK_M], tl.float32)  # sum e x
    two = tl.zeros([BLOCK_M], tl.float32)  # sum e x^2
    squares = tl.zeros([BLOCK_M], tl.float32)  # sum e^2, less the likeliest key
    far = tl.zeros([BLOCK_M], tl.float32)  # sum e |i - j|
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # sum e v

    low = first
    high = kv_len
    if CAUSAL:
        high = tl.minimum(kv_len, start + BLOCK_M)
        if HAS_WINDOW:
            low = tl.maximum(first, start - window + 1)
    for begin in range(low, high, BLOCK_N):
        key = begin + n_at
        n_ok = key < high
        k = tl.load(
            k_place + key[:, None] * stride_kn + d_at[None, :] * stride_kd,
            mask=n_ok[:, None] & d_ok[None, :],
            other=0.0,
        )
        if WIDE:
            k = k.to(tl.float32)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(
                bias_place + m_at[:, None] * stride_bm + key[None, :] * stride_bn,
                mask=m_ok[:, None] & n_ok[None, :],
                other=0.0,
            ).to(tl.float32)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        x = _finished(product, scale, cap, bias, HAS_CAP, HAS_BIAS)
        seen = m_ok[:, None] & n_ok[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= m_at[:, None])
            if HAS_WINDOW:
                seen = seen & (key[None, :] > m_at[:, None] - window)
        if HAS_MASK:
            shown = tl.load(
                mask_place + m_at[:, None] * stride_mm + key[None, :] * stride_mn,
                mask=m_ok[:, None] & n_ok[None, :],
                other=0,
            )
            seen = seen & (shown != 0)
        # NaN is not hidden, and refused by the caller.
        seen = seen & ~(x <= floor)
        x = tl.where(seen, x, HIDDEN)

        # The block by itself, about its own maximum.
        b_top = tl.max(x, 1)
        b_there = b_top > HIDDEN / 2
        likeliest = tl.argmax(x, 1)
        x = tl.maximum(x - tl.where(b_there, b_top, 0.0)[:, None], _FARTHEST)
        e = tl.where(seen, tl.exp2(x), 0.0)
        is_likeliest = n_at[None, :] == likeliest[:, None]
        others = tl.where(is_likeliest, 0.0, e)
        b_rest = tl.sum(others, 1)
        b_one = tl.sum(e * x, 1)
        b_two = tl.sum(e * x * x, 1)
        b_squares = tl.sum(others * others, 1)
        near = tl.abs(m_at[:, None] + offset - key[None, :]).to(tl.float32)
        b_far = tl.sum(e * near, 1)

        # Both about the greater maximum.
        there = top > HIDDEN / 2
        new = tl.maximum(top, b_top)
        d_a = tl.where(there, tl.maximum(top - new, _FARTHEST), 0.0)
        d_b = tl.where(b_there, tl.maximum(b_top - new, _FARTHEST), 0.0)
        w_a = tl.where(there, tl.exp2(d_a), 0.0)
        w_b = tl.where(b_there, tl.exp2(d_b), 0.0)
        wins = (top >= b_top) & there
        whole_a = 1.0 + rest
        whole_b = 1.0 + b_rest
        two = w_a * (two + d_a * (2.0 * one + d_a * whole_a)) + w_b * (
            b_two + d_b * (2.0 * b_one + d_b * whole_b)
        )
        one = w_a * (one + d_a * whole_a) + w_b * (b_one + d_b * whole_b)
        far = w_a * far + w_b * b_far
        squares = tl.where(
            wins,
            squares + w_b * w_b * (1.0 + b_squares),
            b_squares + w_a * w_a * (1.0 + squares),
        )
        rest = tl.where(wins, rest + w_b * whole_b, b_rest + w_a * whole_a)
        squares = tl.where(there | b_there, squares, 0.0)
        rest = tl.where(there | b_there, rest, 0.0)
        if WITH_OUTPUT:
            v = tl.load(
                v_place + key[:, None] * stride_vn + d_at[None, :] * stride_vd,
                mask=n_ok[:, None] & d_ok[None, :],
                other=0.0,
            )
            if WIDE:
                v = v.to(tl.float32)
            product = tl.dot(e.to(v.dtype), v, input_precision="ieee")
            mixed = mixed * w_a[:, None] + product * w_b[:, None]
        top = new

    place = at.to(tl.int64) * q_len + m_at
    tl.store(Sums + place, top, mask=m_ok)
    tl.store(Sums + rows + place, rest, mask=m_ok)
    tl.store(Sums + 2 * rows + place, one, mask=m_ok)
    tl.store(Sums + 3 * rows + place, two, mask=m_ok)
    tl.store(Sums + 4 * rows + place, squares, mask=m_ok)
    tl.store(Sums + 5 * rows + place, far, mask=m_ok)

    # The key that is left out of the sums, where there is one: the first, in closed form.
    left = tl.full([BLOCK_M], HIDDEN, tl.float32)
    if first > 0:
        k = tl.load(k_place + d_at * stride_kd, mask=d_ok, other=0.0).to(tl.float32)
        product = tl.sum(q.to(tl.float32) * k[None, :], 1)
        bias_0 = 0.0
        if HAS_BIAS:
            bias_0 = tl.load(bias_place + m_at * stride_bm, mask=m_ok, other=0.0).to(tl.float32)
        x_0 = _finished(product, scale, cap, bias_0, HAS_CAP, HAS_BIAS)
        seen_0 = m_ok
        if CAUSAL and HAS_WINDOW:
            seen_0 = seen_0 & (m_at < window)
        if HAS_MASK:
            seen_0 = seen_0 & (tl.load(mask_place + m_at * stride_mm, mask=m_ok, other=0) != 0)
        seen_0 = seen_0 & ~(x_0 <= floor)
        left = tl.where(seen_0, x_0, HIDDEN)
        nats = tl.where(seen_0, x_0 / _LOG2E, float("-inf"))
        tl.store(FirstKey + place, nats, mask=m_ok)
    if WITH_OUTPUT:
        if HAS_SINKS:
            sink = tl.load(
                Sinks + batch * stride_sb + head * stride_sh + m_at * stride_sm,
                mask=m_ok,
                other=0.0,
            ).to(tl.float32)
            sink = sink * _LOG2E
        else:
            sink = tl.full([BLOCK_M], HIDDEN, tl.float32)
        final = tl.maximum(tl.maximum(top, left), sink)
        w = tl.where(top > HIDDEN / 2, tl.exp2(tl.maximum(top - final, _FARTHEST)), 0.0)
        w_0 = tl.where(left > HIDDEN / 2, tl.exp2(tl.maximum(left - final, _FARTHEST)), 0.0)
        w_s = tl.where(sink > HIDDEN / 2, tl.exp2(tl.maximum(sink - final, _FARTHEST)), 0.0)
        norm = w * (1.0 + rest) + w_0 + w_s
        mixed = mixed * w[:, None]
        if first > 0:
            v = tl.load(v_place + d_at * stride_vd, mask=d_ok, other=0.0).to(tl.float32)
            mixed = mixed + w_0[:, None] * v[None, :]
        mixed = mixed / tl.where(norm > 0, norm, 1.0)[:, None]
        tl.store(
            Out + place[:, None] * D + d_at[None, :],
            mixed.to(Out.dtype.element_ty),
            mask=m_ok[:, None] & d_ok[None, :],
        )
