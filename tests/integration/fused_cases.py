"""What the fused kernel must agree with: definitions, in loops over float64 weights.

TRITON_INTERPRET=1 python -m tests.integration.fused_cases [masks kinds outputs hard]
"""

from __future__ import annotations

import dataclasses
import math
import sys

import torch

from tempering.attention.logits import AttentionCall
from tempering.attention.measuring import fused
from tempering.attention.measuring.statistics import QueryStatistics, statistics_of_moments
from tests.integration.test_streaming import finished, row_statistics


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def made(
    q_seq: int = 37, kv_seq: int = 37, heads: int = 4, kv_heads: int = 2, width: int = 64,
    dtype: torch.dtype = torch.float32, size: float = 1.5, batch: int = 2, **more: object,
) -> AttentionCall:  # fmt: skip
    """A call as models make them: heads are a view into the tokens' states."""
    query = (draw(batch, q_seq, heads, width) * size).to(dtype).transpose(1, 2)
    key = draw(batch, kv_seq, kv_heads, width, seed=2, dtype=dtype).transpose(1, 2)
    return AttentionCall(query, key, width**-0.5, **more)


def statistics(call: AttentionCall, beta: torch.Tensor | None) -> QueryStatistics:
    """As `posteriors` makes them of the kernel's sums; temperatures are the kernel's own."""
    learned = call.sinks is not None
    found = fused.run(call, 0 if learned else 1, beta=beta)
    before = 0 if call.causal else call.key.shape[2] - call.query.shape[2]
    sink = found.first_key
    if learned:
        sink = call.sink_column(torch.arange(call.query.shape[2]))[..., 0].double()
        sink = sink if beta is None else sink * beta[..., None]
    return statistics_of_moments(found.moments, sink, learned=learned, first=before)


def agree(
    call: AttentionCall, relative: float = 2e-5, beta: torch.Tensor | None = None, every: int = 1
) -> None:
    """Every statistic of every query (or of every so many), and the output of the attention."""
    value = draw(*call.key.shape, seed=3, dtype=call.key.dtype)
    output = fused.run(call, 1, value, beta).output
    found, exact = statistics(call, beta), finished(call)
    if beta is not None:
        exact = exact * beta.double().view(*beta.shape, 1, 1)
    keys, offset = call.key.shape[2], call.key.shape[2] - call.query.shape[2]
    sink = keys if call.sinks is not None else 0
    wide = value.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    weights = torch.softmax(exact, -1).nan_to_num(0.0)[..., :keys]
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[call.query.dtype]
    torch.testing.assert_close(output.double(), weights @ wide, rtol=close, atol=close)
    places = torch.cartesian_prod(*(torch.arange(n) for n in exact.shape[:3]))[::every]
    for row, head, query in places.tolist():
        x = exact[row, head, query]
        seen = (x > -math.inf).nonzero().flatten().tolist()
        assert found.seen[row, head, query] == bool(seen)
        assert found.others[row, head, query] == any(place != sink for place in seen)
        if not seen:
            assert all(item[row, head, query] == 0 for item in found)
            continue
        at = query + (0 if call.causal else offset)
        for name, wanted in row_statistics(x[seen], seen, at, sink, call.sinks is not None).items():
            ours = float(getattr(found, name)[row, head, query])
            off = abs(ours - wanted)
            assert off <= relative * max(1.0, abs(wanted)), (name, row, head, query, ours, wanted)


def masks() -> None:
    agree(made(causal=True))
    agree(made(causal=True, window=9))
    agree(made(q_seq=130, kv_seq=130, causal=True, window=70), every=7)
    agree(made())  # an encoder
    agree(made(q_seq=5, kv_seq=61))  # the last queries of a longer text
    agree(made(q_seq=1, kv_seq=67))  # decoding
    agree(made(q_seq=1, kv_seq=1, causal=True))
    padded = torch.ones(2, 1, 37, 37, dtype=torch.bool).tril()
    padded[1, :, :, :11] = False  # its first queries see nothing
    agree(made(mask=padded))
    agree(made(mask=torch.ones(1, 1, 1, 37, dtype=torch.bool)))
    agree(made(mask=draw(2, 4, 37, 37) > 0))


def kinds() -> None:
    for heads, kv_heads in ((4, 4), (6, 2), (3, 1)):
        agree(made(heads=heads, kv_heads=kv_heads, causal=True), every=3)
    for width in (8, 64, 80, 96, 128, 192, 256):
        agree(made(width=width, causal=True, batch=1), every=2)
    agree(made(causal=True, cap=4.0, size=6.0))
    per_head = torch.tensor([[[[2.0]], [[4.0]], [[8.0]], [[30.0]]]])
    agree(made(causal=True, cap=per_head, size=6.0))
    agree(made(causal=True, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])))
    agree(made(causal=True, window=5, sinks=draw(2, 4, 37, 1)))
    agree(made(causal=True, bias=draw(1, 4, 37, 37)))
    agree(made(bias=draw(1, 4, 1, 37), cap=9.0))
    for dtype in (torch.bfloat16, torch.float16):
        agree(made(causal=True, dtype=dtype), every=2)
        agree(made(causal=True, dtype=dtype, window=13, cap=20.0, width=80), every=2)


def outputs() -> None:
    """With a temperature for each head, and for each row and head."""
    for beta in (torch.tensor([[0.5, 1.0, 2.0, 1 / 3]]), 0.3 + 2 * torch.rand(2, 4)):
        wide = beta.expand(2, 4)
        agree(made(causal=True), beta=wide)
        agree(made(causal=True, window=9, cap=5.0, size=4.0), beta=wide)
        agree(made(causal=True, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])), beta=wide)
        agree(made(bias=draw(1, 4, 37, 37)), beta=wide)


def hard() -> None:
    """Peaked rows keep the digits of small entropies; lengths about a block; what is refused."""
    call = made(causal=True, size=60.0, q_seq=70, kv_seq=70)
    found = statistics(call, None)
    exact = finished(call)
    p = torch.softmax(exact, -1)
    own = torch.special.entr(p).sum(-1)
    # Against the rounding of logits of this size in float32, relative to the entropy itself.
    off = ((found.entropy - own).abs() / own.clamp(min=1e-12))[own > 1e-10]
    assert float(off.median()) < 1e-4 and float(off.max()) < 2e-2, off.max()
    assert float(own.min()) < 1e-9
    for length in (63, 64, 65, 127, 128, 129):
        agree(made(q_seq=length, kv_seq=length, causal=True, batch=1, heads=2), every=5)
    assert not fused.can_run(made(dtype=torch.float64))
    assert not fused.can_run(made(mask=torch.zeros(2, 1, 37, 37)))
    assert not fused.can_run(made(cap=torch.ones(1, 4, 37, 1)))
    assert not fused.can_run(made(width=320))
    assert not fused.serves(made())  # on a CPU
    for bad in (math.nan, math.inf):
        broken = made(causal=True)
        query = broken.query.clone()
        query[1, 2, 5, 3] = bad
        try:
            statistics(dataclasses.replace(broken, query=query), None)
        except ValueError as error:
            assert "head 2, query 5 (row 1 of the batch)" in str(error)
        else:
            raise AssertionError("a logit that is no number went through")


if __name__ == "__main__":
    torch.manual_seed(0)
    parts = {"masks": masks, "kinds": kinds, "outputs": outputs, "hard": hard}
    for part in sys.argv[1:] or parts:
        parts[part]()
        print(part, "agree", flush=True)
