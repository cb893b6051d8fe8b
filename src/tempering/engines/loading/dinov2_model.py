"""DINOv2 inside an ONNX file, turned into a directory that transformers loads.

PyTorch's export keeps the names of parameters, but for the matrices of linear layers and the
position embeddings: those are constants without a name. A matrix is told by the node that
multiplies by it, whose output is named after its module, and is stored transposed. The position
embeddings are in two pieces, that of the class token and those of the 37 x 37 patches.

An ONNX file is a protobuf message: fields of a number and a wire type (varints, and bytes of a
stated length). What is read: ModelProto.graph (7), GraphProto.node (1) and initializer (5),
NodeProto.input (1), output (2) and op_type (4), TensorProto.dims (1), data_type (2), name (8) and
raw_data (9). Only a file whose SHA-256 is known gets here.

Source: https://github.com/onnx/onnx, onnx/onnx.proto3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tempering.errors import ModelError

_MATRIX = re.compile(r"/backbone/(encoder/layer\.\d+/.+)/MatMul_output_0")
_BACKBONE = "backbone."
# As facebook/dinov2-small publishes it.
_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def convert_dinov2(source: Path, target: Path) -> None:
    """Write the backbone and its image processor into the empty directory `target`.

    Raises ModelError for a file of another kind, OSError when the result can't be written.
    """
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    weights = dinov2_weights(source)
    width, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    places = weights["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len({n.split(".")[2] for n in weights if n.startswith("encoder.layer.")}),
        num_attention_heads=width // 64,  # as in every DINOv2: heads are 64 wide
        image_size=patch * round(places**0.5),
        patch_size=patch,
        use_mask_token=False,  # the export has none
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(target)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "preprocessor_config.json").write_text(
        json.dumps(_PREPROCESSOR, indent=2), encoding="utf-8"
    )


def dinov2_weights(path: Path) -> dict[str, np.ndarray]:
    """The backbone's parameters by their names in Dinov2Model."""
    data = path.read_bytes()
    arrays: dict[str, np.ndarray] = {}
    matrices: dict[str, str] = {}
    graph = next(span for number, _, span in _fields(data, 0, len(data)) if number == 7)
    for number, _, span in _fields(data, *graph):
        if number == 5:
            name, array = _tensor(data, *span)
            arrays[name] = array
        elif number == 1:
            inputs, output = _node(data, *span)
            if len(inputs) == 2 and (found := _MATRIX.fullmatch(output)):
                matrices[found[1].replace("/", ".")] = inputs[1]
    weights = {
        name.removeprefix(_BACKBONE): array
        for name, array in arrays.items()
        if name.startswith(_BACKBONE)
    }
    for module, name in matrices.items():
        if name in arrays:  # queries by keys, and weights by values, multiply no constant
            weights[f"{module}.weight"] = np.ascontiguousarray(arrays[name].T)
    width = weights["embeddings.cls_token"].shape[-1]
    unnamed = [arrays[name] for name in arrays.keys() - matrices.values() if "::" in name]
    pieces = sorted((a for a in unnamed if a.ndim == 3 and a.shape[-1] == width), key=np.size)
    if len(pieces) != 2 or pieces[0].shape[1] != 1:
        raise ModelError(f"{path} has no position embeddings as DINOv2's export holds them")
    weights["embeddings.position_embeddings"] = np.concatenate(pieces, axis=1)
    return weights


def _tensor(data: bytes, start: int, stop: int) -> tuple[str, np.ndarray]:
    name, shape, kind, raw = "", [], 0, (0, 0)
    for number, value, span in _fields(data, start, stop):
        if number == 1:  # one by one, or packed
            shape += _varints(data, *span) or [value]
        elif number == 2:
            kind = value
        elif number == 8:
            name = data[slice(*span)].decode()
        elif number == 9:
            raw = span
    if kind != 1:  # float32
        return name, np.zeros(0, np.float32)
    count = (raw[1] - raw[0]) // 4
    return name, np.frombuffer(data, "<f4", count, raw[0]).reshape(shape).astype(np.float32)


def _node(data: bytes, start: int, stop: int) -> tuple[list[str], str]:
    inputs, output, kind = [], "", ""
    for number, _, span in _fields(data, start, stop):
        if number in (1, 2, 4):
            text = data[slice(*span)].decode()
            if number == 1:
                inputs.append(text)
            elif number == 2:
                output = text
            else:
                kind = text
    return (inputs, output) if kind == "MatMul" else ([], "")


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """(number, value, span) of each field: of an integer its value, of any other its bytes."""
    while start < stop:
        key, start = _varint(data, start)
        wire = key & 7
        if wire == 0:
            value, start = _varint(data, start)
            yield key >> 3, value, (0, 0)
            continue
        if wire == 2:
            length, start = _varint(data, start)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ModelError(f"a protobuf field of wire type {wire} at byte {start}: not ONNX")
        yield key >> 3, 0, (start, start + length)
        start += length


def _varints(data: bytes, start: int, stop: int) -> list[int]:
    found = []
    while start < stop:
        value, start = _varint(data, start)
        found.append(value)
    return found


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
