"""Moments of a softmax over its keys, one set a query, in memory linear in the length.

Logits are formed for a tile of queries and keys that stays in the processor's cache, reduced to
six numbers a query, and dropped. No values are weighted, so all six numbers together cost less
than the attention itself. On CUDA one kernel takes the place of `moments`: see `fused`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.logits import AttentionCall
from tempering.attention.visibility import visible

# Entries of a tile. On a CPU a few of them in float32 fit into the cache; elsewhere
# a tile should be worth the launch of a dozen kernels.
_ENTRIES_CPU, _ENTRIES = 1 << 18, 1 << 24
# Where all keys but the likeliest have less weight than this (the likeliest has 1), they are summed
# in float64, so that small entropies keep their digits.
_PEAKED = 0.02
# Queries of a tile: fewer make its products slow, and more on a CPU outgrow the cache.
_MOST_QUERIES, _FEWEST_QUERIES = 128, 32


class Moments(NamedTuple):
    """Sums over the keys of a softmax with logits x, e = exp(x - max x); float64.

    All are Float[Tensor, "batch heads q_seq"]. top: max x, -inf where a query sees no key.
    partition: sum e, 0 where it sees none. first, second: sums of e (x - top), e (x - top)^2.
    squares: sum e^2. distance: sum of e |i - j| for query i and key j, over keys that have a place.
    placed: sum of e over these keys.
    """

    top: Tensor
    partition: Tensor
    first: Tensor
    second: Tensor
    squares: Tensor
    distance: Tensor
    placed: Tensor


def moments(
    call: AttentionCall, first: int = 0, places: Float[Tensor, "tokens axes"] | None = None
) -> Moments:
    """The moments of every query of an attention call over its keys from `first` on.

    places: where each token stands, NaN for one without a place; None for tokens in a row.
    Learned sink logits are left out; `statistics_of_moments` adds the sink in closed form.
    """
    batch, heads, q_seq, _ = call.query.shape
    rows = _Rows(batch, heads, q_seq, call.query.device, call.work)
    before: range | None = None
    near, here = torch.empty(0), None
    for tile in tiles(call, first, rows.space):
        if tile.queries is not before:  # all heads of a row share the distances of a block
            near = _distances(call, tile.queries, tile.keys, call.work, places)
            here = None if places is None else _placed(places, tile.keys, call)
            before = tile.queries
        rows.reduce(tile.logits, tile.row, tile.heads, tile.queries, near, here)
    return rows.moments()


class Tile(NamedTuple):
    """Finished logits of some queries over all the keys that any of them sees.

    logits: Float[Tensor, "heads queries keys"] in units of log 2; hidden ones at `hidden_logit` or
    below. row: of the batch. heads, queries, keys: which they are.
    """

    logits: Tensor
    row: int
    heads: slice
    queries: range
    keys: range


Space = Callable[[int, tuple[int, ...]], Tensor]


def tiles(call: AttentionCall, first: int, space: Space) -> Iterator[Tile]:
    """The logits of an attention call over its keys from `first` on, a tile at a time.

    space: gives the memory of a tile, (0, shape) -> tensor; it may be the same for all.
    """
    heads = call.query.shape[1]
    kv_heads = call.key.shape[1]
    group = heads // kv_heads
    plain = call.only_products
    factor = call.scaling * math.log2(math.e) if plain else call.scaling
    for row in range(call.query.shape[0]):
        keys = call.key[row].to(call.work)
        for queries, seen in _blocks(call, row, first, group):
            if not seen:
                continue
            q = call.query[row, :, queries.start : queries.stop].to(call.work) * factor
            for kv in range(kv_heads):
                of = slice(kv * group, (kv + 1) * group)
                tile = space(0, (group, len(queries), len(seen)))
                here = keys[kv, seen.start : seen.stop]
                torch.mm(q[of].flatten(0, 1), here.t(), out=tile.flatten(0, 1))
                if plain:
                    _hide(tile, call, row, of, queries, seen)
                else:
                    _finish(tile, call, row, of, queries, seen)
                yield Tile(tile, row, of, queries, seen)


def first_key(call: AttentionCall) -> Float[Tensor, "batch heads q_seq"]:
    """The finished logits of the first key, -inf where it is hidden."""
    heads, q_seq = call.query.shape[1:3]
    keys = call.key[:, :, 0].to(call.work).repeat_interleave(heads // call.key.shape[1], dim=1)
    products = call.query.to(call.work) @ keys[..., None] * call.scaling
    queries = torch.arange(q_seq, device=call.query.device)
    return call.finish(products, queries, keys=slice(0, 1))[..., 0]


def moments_of_logits(
    logits: Float[Tensor, "batch heads q_seq kv_seq"], floor: float, first: int = 0
) -> Moments:
    """`moments` of finished logits that a model formed; those at or below `floor` are masked.

    The last query is taken to stand at the last key.
    """
    batch, heads, q_seq, kv_seq = logits.shape
    work = torch.promote_types(logits.dtype, torch.float32)
    rows = _Rows(batch, heads, q_seq, logits.device, work)
    for row in range(batch):
        for queries in _steps(q_seq, 0, heads * kv_seq, logits.device) if kv_seq > first else ():
            part = logits[row][:, queries.start : queries.stop, first:]
            tile = rows.space(0, tuple(part.shape))
            tile.copy_(part).masked_fill_(part <= floor, -math.inf)
            tile.mul_(math.log2(math.e)).clamp_(min=rows.hidden)
            place = torch.arange(first, kv_seq, device=logits.device, dtype=work)
            at = torch.arange(queries.start, queries.stop, device=logits.device, dtype=work)
            near = (place - (at[:, None] + (kv_seq - q_seq))).abs_()
            rows.reduce(tile, row, slice(None), queries, near)
    return rows.moments()


def _steps(q_seq: int, first_keys: int, entries: int, device: torch.device) -> Iterator[range]:
    """Consecutive ranges of queries.

    entries: of a tile for one query; 0 for a causal call, where they grow with the query.
    """
    budget = _ENTRIES_CPU if device.type == "cpu" else _ENTRIES
    most = _MOST_QUERIES if device.type == "cpu" else q_seq
    start = 0
    while start < q_seq:
        each = entries or first_keys * max(start, 1)
        count = max(_FEWEST_QUERIES, min(most, budget // max(1, each)))
        yield range(start, min(q_seq, start + count))
        start += count


def _blocks(call: AttentionCall, row: int, first: int, group: int) -> Iterator[tuple[range, range]]:
    """Ranges of queries, each with the range of keys outside which none of them sees any."""
    q_seq, kv_seq = call.query.shape[2], call.key.shape[2]
    dense = 0 if call.causal else group * kv_seq
    for queries in _steps(q_seq, group, dense, call.query.device):
        low, high = first, kv_seq
        if call.causal:
            high = min(high, queries.stop)
            if call.window is not None:
                low = max(low, queries.start - call.window + 1)
        if call.mask is not None and call.mask.dtype == torch.bool:
            low, high = _seen(call.mask, row, queries, low, high)
        yield queries, range(low, max(low, high))


def _seen(mask: Tensor, row: int, queries: range, low: int, high: int) -> tuple[int, int]:
    """The narrowest range of keys that holds all that a boolean mask shows."""
    part = mask[row if mask.shape[0] > 1 else 0]
    part = part[:, queries.start : queries.stop] if part.shape[1] > 1 else part
    places = part.any(0).any(0)[low:high].nonzero().flatten()
    if len(places) == 0:
        return low, low
    return low + int(places[0]), low + int(places[-1]) + 1


def _placed(places: Tensor, keys: range, call: AttentionCall) -> Tensor:
    """1 for each key that has a place, 0 for the others."""
    here = ~places[keys.start : keys.stop].isnan().any(-1)
    return here.to(call.query.device, call.work)


def _distances(
    call: AttentionCall, queries: range, keys: range, dtype: torch.dtype, places: Tensor | None
) -> Tensor:
    """|i - j|; for causal calls only the part that all queries share, last query - j.

    With places, the length of the straight line between them, and 0 where one of them has none.
    """
    device = call.query.device
    if places is not None:
        at, to = (places[part.start : part.stop].to(device, dtype) for part in (queries, keys))
        return (at[:, None] - to).square().sum(-1).sqrt().nan_to_num(0.0)
    place = torch.arange(keys.start, keys.stop, device=device, dtype=dtype)
    if call.causal:
        return (queries.stop - 1) - place
    offset = call.key.shape[2] - call.query.shape[2]
    at = torch.arange(queries.start, queries.stop, device=device, dtype=dtype) + offset
    return (place - at[:, None]).abs_()


def _hide(
    tile: Tensor, call: AttentionCall, row: int, heads: slice, queries: range, keys: range
) -> None:
    """Mask a tile of scaled products in place; causality hides in the tile's corners alone."""
    hidden = hidden_logit(tile.dtype)
    if call.mask is not None:
        part = call.mask[row if call.mask.shape[0] > 1 else 0]
        part = part[heads] if part.shape[0] > 1 else part
        part = part[:, queries.start : queries.stop] if part.shape[1] > 1 else part
        tile.masked_fill_(~part[..., keys.start : keys.stop], hidden)
    if not call.causal:
        return
    at = torch.arange(queries.start, queries.stop, device=tile.device)
    ahead = range(max(keys.start, queries.start), keys.stop)
    if len(ahead):
        corner = tile[..., ahead.start - keys.start :]
        corner.masked_fill_(~visible(at, ahead, causal=True), hidden)
    if call.window is None:
        return
    left = range(keys.start, min(keys.stop, queries.stop - call.window))
    if len(left):
        seen = visible(at, left, causal=True, window=call.window)
        tile[..., : len(left)].masked_fill_(~seen, hidden)


def _finish(
    tile: Tensor, call: AttentionCall, row: int, heads: slice, queries: range, keys: range
) -> None:
    """Cap, bias and mask a tile of scaled products, and put it in units of log 2."""
    at = torch.arange(queries.start, queries.stop, device=tile.device)
    finished = call.finish(tile[None], at, slice(row, row + 1), heads, slice(keys.start, keys.stop))
    torch.mul(finished[0], math.log2(math.e), out=tile)
    tile.clamp_(min=hidden_logit(tile.dtype))


def hidden_logit(dtype: torch.dtype) -> float:
    """A hidden logit: finite, so that 0 times it is 0."""
    return torch.finfo(dtype).min / 4


class _Rows:
    """What the tiles were reduced to, and the memory that they share.

    sums: the fields of `Moments` in units of log 2; partition and squares less 1, and placed less
    partition.
    """

    def __init__(
        self, batch: int, heads: int, q_seq: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.sums = torch.zeros(7, batch, heads, q_seq, device=device, dtype=dtype)
        self.hidden = hidden_logit(dtype)
        self.sums[0] = self.hidden
        self._memory = [torch.empty(0, device=device, dtype=dtype) for _ in range(3)]

    def space(self, which: int, shape: tuple[int, ...]) -> Tensor:
        """One of three pieces of memory, used again for every tile."""
        size = math.prod(shape)
        if self._memory[which].numel() < size:
            self._memory[which] = self._memory[which].new_empty(size)
        return self._memory[which][:size].view(shape)

    def reduce(
        self,
        tile: Tensor,
        row: int,
        heads: slice,
        queries: range,
        near: Tensor,
        here: Tensor | None = None,
    ) -> None:
        """Reduce logits in units of log 2 [heads, queries, keys]; the tile is overwritten.

        here: 1 for keys with a place, 0 for others; None where all have one.
        """
        shape = tuple(tile.shape)
        top = tile.amax(-1)
        x = tile.sub_(top[..., None])
        # exp2 takes a sixth of the time of exp (CPU, torch 2.13).
        e = torch.exp2(x, out=self.space(1, shape))
        weighted = torch.mul(e, x, out=self.space(2, shape))
        rest = e.sum(-1) - 1
        first = weighted.sum(-1)
        second = weighted.mul_(x).sum(-1)
        squares = torch.linalg.vector_norm(e, dim=-1).square_() - 1
        peaked = rest < _PEAKED
        if bool(peaked.any()):
            exact = e[peaked].double()
            rest[peaked] = (exact.sum(-1) - 1).to(rest)
            squares[peaked] = (exact.square_().sum(-1) - 1).to(rest)
        if near.ndim == 1:
            shared = torch.mv(e.view(-1, shape[-1]), near).view(shape[:-1])
            behind = torch.arange(len(queries) - 1, -1, -1, device=tile.device, dtype=tile.dtype)
            distance = shared - (rest + 1) * behind
        else:
            distance = torch.mul(e, near, out=weighted).sum(-1)
        unplaced = torch.zeros_like(rest)
        if here is not None:
            # A sum over few keys, so that it keeps its digits; most have a place.
            unplaced = torch.mv(e.view(-1, shape[-1]), here - 1).view(shape[:-1])
        found = (top, rest, first, second, squares, distance, unplaced)
        room = self.sums[:, row, heads, queries.start : queries.stop]
        for place, value in zip(room, found, strict=True):
            place.copy_(value)

    def moments(self) -> Moments:
        """In natural units, where a query saw a key."""
        top, rest, first, second, squares, distance, unplaced = self.sums.double()
        unseen = top <= self.hidden / 2
        log2 = math.log(2)
        placed = rest + 1 + unplaced
        sums = (rest + 1, first * log2, second * log2**2, squares + 1, distance, placed)
        return Moments(
            (top * log2).masked_fill(unseen, -math.inf), *(s.masked_fill(unseen, 0) for s in sums)
        )
