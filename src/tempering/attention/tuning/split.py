"""Data held out, and data refused because two sides share them: calibration and test."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence

import torch

from tempering.attention.tuning.batches import Batch
from tempering.attention.tuning.objectives import Objective, Piece
from tempering.counts import whole_number
from tempering.errors import DataError, InputError

# Two texts that share a run of so many tokens do so by no accident. Blocks of the one are looked
# for at every place of the other, so any common run of twice this length, less one, is found.
_BLOCK = 64
_ID = 8  # bytes of a token id


def split(objective: Objective, share: float, seed: int) -> tuple[Objective, Objective]:
    """Two objectives, for calibration and held out: pieces drawn by the seed.

    share: of the pieces that are held out, above 0 and at most 0.5; at least one piece.
    Pieces of the same content stay on one side.

    Raises DataError when there are too few different pieces.
    """
    if not 0 < share <= 0.5:
        raise InputError(f"a share from above 0 to 0.5 can be held out, not {share:g}")
    alike: dict[str, list[int]] = {}
    for place, piece in enumerate(objective.pieces):
        alike.setdefault(piece.digest, []).append(place)
    if len(alike) < 2:
        what = "chunk" if objective.kind == "text" else "piece"
        raise DataError(
            f"'{objective.name}' has {len(alike)} {what} of its own, and a part to hold out takes "
            f"at least 2: give more data or shorter {what}s, or hold nothing out (held_out=0)"
        )
    groups = list(alike.values())
    random.Random(whole_number(seed, "seed")).shuffle(groups)
    wanted = min(max(1, round(share * len(objective.pieces))), len(objective.pieces) - 1)
    chosen: set[int] = set()
    for group in groups[:-1]:
        if len(chosen) >= wanted:
            break
        chosen.update(group)
    calibration = [piece for i, piece in enumerate(objective.pieces) if i not in chosen]
    held_out = [piece for i, piece in enumerate(objective.pieces) if i in chosen]
    return objective.having(calibration), objective.having(held_out)


def refuse_overlap(first: Sequence[Objective], second: Sequence[Objective], what: str) -> None:
    """DataError when data of `second` are in `first` already.

    Texts are compared by blocks of 64 tokens, at every place; prompts with answers, and functions,
    as wholes. what: names both sides, e.g. "calibration and test".
    """
    known = {_identity(piece): piece.origin for item in first for piece in item.pieces}
    for item in second:
        for piece in item.pieces:
            if _identity(piece) in known:
                raise _overlap(what, piece.origin, known[_identity(piece)], "the same data")
    ours = [text for item in first for text in _texts(item)]
    tests = [sum(len(content) for _, content in _texts(item)) for item in second]
    sizes = [*(len(content) for _, content in ours), *(size for size in tests if size)]
    block = min([_BLOCK, *(size // _ID for size in sizes)])
    size = _ID * block
    found: dict[bytes, str] = {}
    for origin, content in ours:
        for start in range(0, len(content) - size + 1, size):
            found.setdefault(content[start : start + size], origin)
    for item in second:
        # As one text: a run that goes on from one chunk to the next is found too.
        theirs = _texts(item)
        whole = b"".join(content for _, content in theirs)
        ends = list(itertools.accumulate(len(content) for _, content in theirs))
        for start in range(0, len(whole) - size + 1, _ID):
            other = found.get(whole[start : start + size])
            if other is not None:
                origin = theirs[bisect.bisect_right(ends, start)][0]
                raise _overlap(what, origin, other, f"{block} tokens in common")


def _overlap(what: str, one: str, other: str, how: str) -> DataError:
    return DataError(
        f"{what} overlap: {one} and {other} have {how}; what was tuned on can't test it. "
        "Leave the common part out of one of them"
    )


def _identity(piece: Piece) -> object:
    return piece.digest if isinstance(piece.source, Batch) else piece.source


def _texts(objective: Objective) -> list[tuple[str, bytes]]:
    """Origin and token ids, as bytes, of every piece of a text."""
    return [
        (piece.origin, piece.source.ids.to("cpu", torch.int64).numpy().tobytes())
        for piece in objective.pieces
        if objective.kind == "text" and isinstance(piece.source, Batch)
    ]
