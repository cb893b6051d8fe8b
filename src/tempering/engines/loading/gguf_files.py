"""Open GGUF files, and load the models in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempering.attention.control.tempered import BAKED_MARK
from tempering.engines.loading.catalogue import MODELS
from tempering.engines.loading.embedded import JOINED, embedded_directory
from tempering.engines.loading.gguf_mark import loaded_mark
from tempering.engines.loading.gguf_model import gguf_network, gguf_tokenizer
from tempering.engines.loading.packages import find_source
from tempering.errors import BakeError, ModelError


def open_gguf(source: Path) -> Any:
    """A GGUFReader; ModelError for what is none, BakeError for what can't be baked as it is."""
    from gguf import GGUFEndian

    from tempering.engines.loading.gguf_reading import QuickReader

    if not source.is_file():
        raise ModelError(f"no GGUF file {source}")
    try:
        reader = QuickReader(source)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"can't read {source} as a GGUF file: {error}") from error
    if reader.endianess != GGUFEndian.LITTLE:
        raise BakeError(
            f"{source} is big-endian, and its blocks are read as little-endian; convert it first: "
            "gguf-convert-endian FILE little"
        )
    split = reader.get_field("split.count")
    if split is not None and int(split.contents()) > 1:
        raise BakeError(
            f"{source} is one part of a split model; join the parts first: llama-gguf-split --merge"
        )
    return reader


def check_positions(source: Path) -> None:
    """ModelError for a file whose positions are stretched: transformers would leave that out.

    Its readers of GGUF files (5.23) take the base of the rotation and nothing else, gpt-oss
    apart: what ran in this process would be another model. The weights are read whole, so that
    a fold needs no such check.
    """
    reader = open_gguf(source)
    field = reader.get_field("general.architecture")
    kind = "" if field is None else str(field.contents())
    scaling = reader.get_field(f"{kind}.rope.scaling.type")
    why = None
    if scaling is not None and scaling.contents() != "none":
        why = f"rope.scaling.type = {scaling.contents()}"
    for tensor in reader.tensors:
        if tensor.name in _STRETCHES:
            why = f"its tensor {tensor.name}"
    if why is not None and kind != "gpt-oss":
        raise ModelError(
            f"{source} stretches positions ({why}), which transformers leaves out of GGUF files: "
            "here it would be another model. Name the checkpoint that the file was made from"
        )


# llama3's and longrope's factors of frequencies.
_STRETCHES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def embedded_gguf(name: str) -> Path:
    """The GGUF file that an embedded model comes in; ModelError where it comes in another."""
    model = MODELS[name]
    if model.format != "gguf":
        raise ModelError(
            f"{name} comes as {model.format} ({model.source}), not as a GGUF file; name a model "
            "that does, or the path of a GGUF file"
        )
    if model.parts:
        return embedded_directory(model) / JOINED
    return find_source(model).weights[0].path


def load_gguf(source: Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a GGUF file that transformers can read."""
    mark = loaded_mark(open_gguf(source), source)
    tokenizer = gguf_tokenizer(source)
    model = gguf_network(source)
    if mark:
        setattr(model.config, BAKED_MARK, dict(mark))
    return model, tokenizer
