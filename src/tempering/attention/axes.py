"""Where the rows and the heads of a batch lie among the axes of softmax logits.

Patterns name the axes: b the row of the batch, h the head, q the query, k the key, n anything
that the heads share (n-gram streams, blocks); "(b h)" is one axis with the heads inside.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

STANDARD, FOLDED, STREAMS, BLOCKS, WINDOWS = (
    "b h q k",
    "(b h) q k",
    "b n h q k",
    "b h n q k",
    "b q h k",
)


def candidates(shape: Collection[int], batch: int, heads: Collection[int]) -> list[tuple[str, int]]:
    """(pattern, number of heads) of every reading of `shape` that puts known heads on an axis."""
    sizes = list(shape)
    found = []
    if len(sizes) == 3:
        found = [(FOLDED, h) for h in heads if h > 1 and sizes[0] == batch * h]
    elif sizes[0] == batch and len(sizes) == 4:
        found = [(STANDARD, sizes[1])] if sizes[1] in heads else []
        if not found and sizes[2] in heads:
            found = [(WINDOWS, sizes[2])]
    elif sizes[0] == batch and len(sizes) == 5:
        found = [(BLOCKS, sizes[1])] if sizes[1] in heads else []
        found += [(STREAMS, sizes[2])] if sizes[2] in heads else []
    return found


def of_any_rows(shape: Collection[int], heads: Collection[int]) -> list[tuple[str, int]]:
    """`candidates` for any number of rows: [rows, heads, q, k], or [(rows heads), q, k]."""
    sizes = list(shape)
    if len(sizes) == 3:
        return [(FOLDED, h) for h in heads if sizes[0] % h == 0]
    return [(STANDARD, sizes[1])] if len(sizes) == 4 and sizes[1] in heads else []


def fits(pattern: str, shape: Collection[int], heads: int) -> bool:
    """Whether logits of this shape can be read by a pattern with so many heads."""
    sizes = list(shape)
    if pattern == FOLDED:
        return len(sizes) == 3 and sizes[0] % heads == 0
    axes = pattern.split()
    return len(sizes) == len(axes) and sizes[axes.index("h")] == heads


def rows(pattern: str, shape: Collection[int], heads: int) -> int:
    """Rows of the batch in logits of this shape."""
    sizes = list(shape)
    return sizes[0] // heads if pattern == FOLDED else sizes[0]


def shaped_for(table: Tensor, pattern: str, count: int) -> Tensor:
    """A table [rows, heads] in a shape that multiplies logits of `count` rows in this pattern."""
    if pattern == FOLDED:
        return table.expand(count, -1).reshape(-1, 1, 1)
    axes = pattern.split()
    view = [1] * len(axes)
    view[0], view[axes.index("h")] = table.shape[0], table.shape[1]
    return table.reshape(view)


def standard(logits: Tensor, pattern: str, heads: int) -> Tensor:
    """The same logits as [rows, heads, queries, keys]; streams and blocks count as queries.

    Queries stay in the order of their tokens: the streams of one token follow each other.
    """
    if pattern == STANDARD:
        return logits
    if pattern == FOLDED:
        return logits.reshape(-1, heads, *logits.shape[-2:])
    if pattern == WINDOWS:
        return logits.transpose(1, 2)
    if pattern == STREAMS:
        logits = logits.permute(0, 2, 3, 1, 4)
    return logits.flatten(2, 3)
