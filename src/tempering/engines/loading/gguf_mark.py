"""How a GGUF file says that it was baked: a metadata pair, or the order of its metadata.

A baked file that may grow carries its mark as JSON under `tempering.bake`. One whose scales were
changed in place has no room for that: the header is padded to the alignment, which leaves 0 to 31
bytes, too few for a pair in most files. Its mark is in two parts:

- The order of its metadata pairs says that it was baked. Readers look pairs up by key, so any order
  means the same, and n pairs have n! of them. Pairs that aren't arrays, but for the first, stand in
  the order of SHA-256(key); arrays keep their places. This costs no byte, changes no value, and
  goes where the file goes. Tools that add, drop or move a few pairs leave it readable: a file
  counts as baked when so many of its pairs are in this order that the chance of it is below 1e-9.
- A file beside it, NAME.gguf.tempering.json, says what was folded, so that it can be undone: the
  mark as other formats carry it, the order that the pairs had, and the SHA-256 of the changed
  tensors, which binds it to the file.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tempering.errors import BakeError

MARK = "tempering.bake"
# What a loaded model's config holds where the file tells no more.
IN_PLACE: Mapping[str, Any] = {"in_place": True}
_CHANCE = 1e-9


def is_baked(reader: Any) -> bool:
    """Whether a GGUF file carries a mark of either kind."""
    return reader.get_field(MARK) is not None or _by_order(reader)


def loaded_mark(reader: Any, source: Path) -> Mapping[str, Any] | None:
    """What the config of the loaded model says about a bake; None when there was none."""
    field = reader.get_field(MARK)
    if field is not None:
        return _json(field.contents(), str(source))
    return IN_PLACE if _by_order(reader) else None


def read_beside(reader: Any, source: Path) -> Mapping[str, Any] | None:
    """The mark beside a file that was changed in place; None when it wasn't.

    Raises BakeError when the mark is missing, damaged, or of other weights.
    """
    if reader.get_field(MARK) is not None or not _by_order(reader):
        return None
    beside = beside_of(source)
    try:
        mark = _json(beside.read_text(encoding="utf-8"), str(beside))
    except (OSError, UnicodeDecodeError) as error:
        raise BakeError(
            f"{source} was baked in place, and what undoes it is in {beside}, which can't be read "
            f"({error}); put that file beside it, or take the original"
        ) from error
    try:
        same = mark["sha256"] == digest(reader, mark["tensors"])
        list(mark["order"])
    except (KeyError, TypeError) as error:
        raise BakeError(f"the mark in {beside} is damaged: {error!r}") from error
    if not same:
        raise BakeError(
            f"{beside} is the mark of other weights than those in {source}; put the one that was "
            "written with it beside it, or take the original"
        )
    return mark


def beside_of(path: Path) -> Path:
    """Where the mark of a file that was changed in place lies."""
    return path.with_name(path.name + ".tempering.json")


def digest(reader: Any, names: Iterable[str]) -> str:
    """SHA-256 of the data of some tensors, in the order of their names."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    whole = hashlib.sha256()
    for name in sorted(names):
        whole.update(tensors[name].data.tobytes())
    return whole.hexdigest()


def order_of(reader: Any) -> list[str]:
    """The keys whose order is the mark, as they stand."""
    return [key for key, _, _, moves in _pairs(reader) if moves]


def marked_order(reader: Any, source: Path) -> list[str]:
    """The order of the same keys that marks a file; BakeError where they are too few for that."""
    keys = order_of(reader)
    if not 1 / math.factorial(len(keys)) < _CHANCE:
        raise BakeError(
            f"{source} has {len(keys)} metadata pairs that may change places, too few to mark it "
            "by their order; bake it without --in-place-scales"
        )
    return sorted(keys, key=_rank)


def header(reader: Any, order: list[str]) -> tuple[int, bytes]:
    """Where the metadata pairs start, and their bytes with `order_of` as given."""
    pairs = _pairs(reader)
    data = {key: reader.data[start:stop].tobytes() for key, start, stop, _ in pairs}
    waiting = iter(order)
    keys = [next(waiting) if moves else key for key, _, _, moves in pairs]
    return pairs[0][1], b"".join(data[key] for key in keys)


def _pairs(reader: Any) -> list[tuple[str, int, int, bool]]:
    """(key, start, stop, whether it may move) of each metadata pair, as they stand."""
    from gguf import GGUFValueType

    fields = [item for item in reader.fields.values() if not item.name.startswith("GGUF.")]
    starts = [int(item.offset) for item in fields] + [int(reader.tensors[0].field.offset)]
    return [
        (item.name, starts[i], starts[i + 1], i > 0 and item.types[0] != GGUFValueType.ARRAY)
        for i, item in enumerate(fields)
    ]


def _rank(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _by_order(reader: Any) -> bool:
    if not reader.tensors:
        return False
    ranks = [_rank(key) for key in order_of(reader)]
    # The longest ascending subsequence: `ends[i]` is the least end of one of length i + 1.
    ends: list[bytes] = []
    for rank in ranks:
        place = bisect.bisect_left(ends, rank)
        ends[place : place + 1] = [rank]
    # A random order of n pairs has C(n, m) / m! ascending subsequences of length m on average.
    return math.comb(len(ranks), len(ends)) / math.factorial(len(ends)) < _CHANCE


def _json(text: Any, where: str) -> dict[str, Any]:
    try:
        mark = json.loads(text)
    except (TypeError, ValueError) as error:
        raise BakeError(f"the mark of {where} is damaged: it is not JSON ({error})") from error
    if not isinstance(mark, dict):
        raise BakeError(f"the mark of {where} is damaged: it is not a JSON object")
    return mark
