"""Write GGUF files with folds in them: anew, or as the same bytes but for scales."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tempering.attention.baking.comparison import ROUNDING
from tempering.engines.checkpoints.gguf_blocks import Parts, fold_in_type, fold_tensor
from tempering.engines.loading.gguf_files import open_gguf
from tempering.engines.loading.gguf_mark import MARK, digest, header, marked_order, order_of


class WrittenTensors(NamedTuple):
    """Tensors that kept their type and those that took a wider one, by type; the worst loss."""

    kept: dict[str, int]
    widened: dict[str, int]
    rounding: float


def write_in_place(
    reader: Any,
    source: Path,
    target: Path,
    folds: Mapping[str, Parts],
    limit: float,
    order: Sequence[str] | None = None,
) -> WrittenTensors:
    """Copy a GGUF file byte by byte, with folds in scales and its pairs in another order.

    limit: share of a head's weights that may be lost. order: of the pairs; None marks the file.

    Raises BakeError for a tensor that can't take its folds in its own type.
    """
    start, pairs = header(reader, marked_order(reader, source) if order is None else list(order))
    shutil.copyfile(source, target)
    kept: dict[str, int] = {}
    worst = 0.0
    with target.open("r+b") as stream:
        stream.seek(start)
        stream.write(pairs)
        for tensor in reader.tensors:
            if tensor.name in folds:
                data, lost = fold_in_type(
                    tensor.name, tensor.data, tensor.tensor_type, folds[tensor.name], limit
                )
                stream.seek(int(tensor.data_offset))
                stream.write(data.tobytes())
                worst = max(worst, lost)
                kept[tensor.tensor_type.name] = kept.get(tensor.tensor_type.name, 0) + 1
        stream.flush()
        os.fsync(stream.fileno())
    return WrittenTensors(kept, {}, worst)


def sidecar(reader: Any, written: Path, mark: Mapping[str, Any]) -> dict[str, Any]:
    """What lies beside a file that was changed in place; see `gguf_mark`.

    reader: of the original. written: the changed file. mark: as other formats carry it.
    """
    changed = digest(open_gguf(written), mark["tensors"])
    return {**mark, "order": order_of(reader), "sha256": changed}


def write_anew(
    reader: Any, target: Path, folds: Mapping[str, Parts], mark: str | None
) -> WrittenTensors:
    """Write a GGUF file with folds in its tensors, wider where they need it, and with a mark."""
    from gguf import GGUFValueType, GGUFWriter

    architecture = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(target, architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        name = field.name
        if name in ("general.architecture", MARK) or name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    if mark is not None:
        writer.add_string(MARK, mark)
    kept: dict[str, int] = {}
    widened: dict[str, int] = {}
    changed: dict[str, Any] = {}
    worst = 0.0
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if tensor.name in folds:
            data, kind, lost = fold_tensor(data, kind, folds[tensor.name], ROUNDING)
            worst = max(worst, lost)
            changed[tensor.name] = data
            own = kind == tensor.tensor_type
            text = kind.name if own else f"{tensor.tensor_type.name} -> {kind.name}"
            count = kept if own else widened
            count[text] = count.get(text, 0) + 1
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(changed.pop(tensor.name, tensor.data))
    finally:
        writer.close()
    return WrittenTensors(kept, widened, worst)
