"""Safetensors checkpoints, tensor by tensor: where each one lies, and changing it in place."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempering.attention.baking.folds import Fold
from tempering.errors import BakeError, ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# What quantised checkpoints hold beside them.
_RAW = _DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Weights in other formats, and what describes another directory than the new one.
_LEFT_OUT = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"}
_REPLACED = {"README.md", "config.json", "manifest.json", "pytorch_model.bin.index.json"}

Folds = Mapping[str, list[tuple[Fold, Tensor]]]


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file: where its bytes are, and what they are."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of a directory in transformers' format, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / INDEX
        if index.is_file():
            self.files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        elif (directory / SINGLE).is_file():
            self.files = [SINGLE]
        else:
            raise BakeError(
                f"{directory} keeps its weights in another format than safetensors; load and "
                "save the model with transformers, then bake that"
            )
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            tensors, metadata = _header(directory / file, file)
            self.tensors.update(tensors)
            self.metadata.update(metadata)
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by tensor name."""
        return {name: item.shape for name, item in self.tensors.items()}

    @property
    def main_dtype(self) -> torch.dtype:
        """What most weights are stored as; float32 where that is no dtype to load them in."""
        sizes: Counter[str] = Counter()
        for item in self.tensors.values():
            sizes[item.dtype] += item.stop - item.start
        most = sizes.most_common(1)[0][0] if sizes else "F32"
        return _DTYPES[most] if most in ("BF16", "F16") else torch.float32

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor; BakeError where it is none that weights can be folded in."""
        stored = self.tensors[name].dtype
        if stored not in _DTYPES:
            raise BakeError(
                f"{name} is stored as {stored}; only {', '.join(_DTYPES)} can be folded. "
                "Bake the model that it was quantised from"
            )
        return _DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """The values of a tensor, in float32 at least."""
        tensor = _load(self.directory / self.tensors[name].file, self.tensors[name])
        dtype = self.dtype(name)
        return tensor.to(torch.promote_types(dtype, torch.float32))

    def raw(self, name: str) -> Tensor:
        """A tensor as it is stored, integers as well; BakeError where it is missing or unknown."""
        stored = self.tensors.get(name)
        if stored is None or stored.dtype not in _RAW:
            raise BakeError(
                f"{self.directory} {'has no tensor' if stored is None else 'stores'} {name}"
                + (f" as {stored.dtype}, which isn't read here" if stored else "")
                + "; fetch or save the model again"
            )
        return _load(self.directory / stored.file, stored)

    def write(self, target: Path, folds: Folds) -> None:
        """Copy the directory into `target`, with folds in its weights.

        One tensor is in memory at a time; all others are copied byte by byte.
        """
        for name in folds:
            self.dtype(name)
        copy_settings(self.directory, target)
        for file in self.files:
            shutil.copyfile(self.directory / file, target / file)
            with (target / file).open("r+b") as stream:
                for name, parts in folds.items():
                    stored = self.tensors[name]
                    if stored.file == file:
                        tensor = _load(target / file, stored)
                        for fold, beta in parts:
                            fold.apply_(tensor, beta)
                        stream.seek(stored.start)
                        stream.write(tensor.flatten().view(torch.uint8).numpy().data)
                stream.flush()
                os.fsync(stream.fileno())


def copy_settings(directory: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, generation settings, licence."""
    for path in sorted(directory.iterdir()):
        if (
            path.is_file()
            and path.suffix not in _LEFT_OUT
            and path.name not in _REPLACED
            and not path.name.startswith(".")
        ):
            shutil.copyfile(path, target / path.name)


def _header(path: Path, file: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of a safetensors file: 8 bytes of length, JSON, then the data."""
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {
            name: Stored(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + size + entry["data_offsets"][0],
                8 + size + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
        return tensors, dict(metadata)
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise ModelError(
            f"can't read {path} as safetensors: {error}; fetch or save the model again"
        ) from error


def _load(path: Path, stored: Stored) -> Tensor:
    with path.open("rb") as stream:
        stream.seek(stored.start)
        data = bytearray(stream.read(stored.stop - stored.start))
    if len(data) != stored.stop - stored.start:
        raise ModelError(f"{path} ends early; fetch or save the model again")
    if not data:
        return torch.empty(stored.shape, dtype=_RAW[stored.dtype])
    return torch.frombuffer(data, dtype=_RAW[stored.dtype]).reshape(stored.shape)
