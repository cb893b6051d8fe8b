"""gguf's reader, quick at arrays.

`gguf.GGUFReader` makes several views of the file for each element of an array, one element a
call: a minute for the 262,000 tokens of Gemma's vocabulary, and transformers reads a file three
times. The parts of a field are the same here, made in one go.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType

_LOCK = threading.RLock()
_LONG = 1000  # strings; a vocabulary has more


class QuickReader(GGUFReader):
    """A GGUFReader whose fields and tensors are those of the original."""

    def _build_fields(self, offs: Any, count: Any) -> Any:
        self.data: Any = np.asarray(self.data)  # the same memory, without numpy's memmap at a slice
        return super()._build_fields(offs, count)

    def _get_field_parts(
        self, orig_offs: Any, raw_type: Any
    ) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start, count = orig_offs + 12, int(length[0])
        item = GGUFValueType(kind[0])
        numbers = self.gguf_scalar_to_np.get(item)
        if count == 0 or (numbers is None and item != GGUFValueType.STRING):
            return super()._get_field_parts(orig_offs, raw_type)
        if numbers is None:
            parts, stop = self._strings(start, count)
            data = list(range(3, 2 + len(parts), 2))
        else:
            stop = start + count * np.dtype(numbers).itemsize
            self._within(stop)
            values = self._get(start, numbers, count)
            parts = [values[i : i + 1] for i in range(count)]
            data = list(range(2, 2 + count))
        types = [GGUFValueType.ARRAY, item]
        return stop - orig_offs, [kind, length, *parts], data, types

    def _strings(self, place: int, count: int) -> tuple[list[Any], int]:
        """Length and bytes of each string, and where they end."""
        self._within(place + 8 * count)
        raw = memoryview(self.data)
        parts: list[Any] = []
        lengths = np.empty(count, np.dtype(np.uint64).newbyteorder(self.byte_order))
        for i, (start, stop) in enumerate(self._spans(place, count)):
            lengths[i] = stop - start
            # transformers reads them byte by byte, which a memoryview does in a fifth of the time.
            parts += (lengths[i : i + 1], raw[start:stop])
            place = stop
        return parts, place

    def _spans(self, place: int, count: int) -> Iterator[tuple[int, int]]:
        """Where each of `count` strings begins and ends."""
        raw, end = memoryview(self.data), len(self.data)
        order: Any = "little" if (np.little_endian != (self.byte_order == "S")) else "big"
        for _ in range(count):
            start = place + 8
            place = start + int.from_bytes(raw[place:start], order)
            if start > end or place > end:
                self._within(max(start, place))
            yield start, place

    def _within(self, stop: int) -> None:
        if stop > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, within its metadata")


class WeightsReader(QuickReader):
    """One that leaves out the vocabulary: transformers parses every field, whatever it wants."""

    def _strings(self, place: int, count: int) -> tuple[list[Any], int]:
        if count < _LONG:
            return super()._strings(place, count)
        for _, stop in self._spans(place, count):
            place = stop
        return [], place

    def _push_field(self, field: Any, skip_sum: bool = False) -> int:
        if field.name.startswith("tokenizer.ggml.") and field.types[0] == GGUFValueType.ARRAY:
            return 0
        return super()._push_field(field, skip_sum)


@contextmanager
def quick_gguf(reader: type[GGUFReader] = QuickReader) -> Iterator[None]:
    """Let transformers, which takes `gguf.GGUFReader` by its name, read with this one.

    gguf's map of names, which transformers asks for anew for every module of a model, is made once.
    """
    with _LOCK:
        before = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader = reader
        gguf.get_tensor_name_map = functools.lru_cache(before[1])
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = before
