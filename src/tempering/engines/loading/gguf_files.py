"""Open GGUF files, and load the models in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempering.attention.control.tempered import BAKED_MARK
from tempering.engines.loading import embedded
from tempering.engines.loading.gguf_mark import loaded_mark
from tempering.engines.loading.gguf_model import forget_quantization, gguf_tokenizer
from tempering.engines.loading.quiet import quiet
from tempering.errors import BakeError, ModelError


def open_gguf(source: Path) -> Any:
    """A GGUFReader; ModelError for what is none, BakeError for what can't be baked as it is."""
    from gguf import GGUFEndian, GGUFReader

    if not source.is_file():
        raise ModelError(f"no GGUF file {source}")
    try:
        reader = GGUFReader(source)
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


def embedded_gguf(name: str) -> Path:
    """The GGUF file that an embedded model comes in."""
    return embedded._find(embedded.MODELS[name]).path


def load_gguf(source: Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a GGUF file that transformers can read."""
    import torch
    from transformers import AutoModelForCausalLM

    mark = loaded_mark(open_gguf(source), source)
    tokenizer = gguf_tokenizer(source)
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(source.parent), gguf_file=source.name, dtype=torch.float32
            )
        except Exception as error:  # the loaders raise every kind
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"transformers can't read {source}: {reason}") from error
    forget_quantization(model)
    if mark:
        setattr(model.config, BAKED_MARK, dict(mark))
    return model.eval(), tokenizer
