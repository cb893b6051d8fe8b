"""Text cut into token chunks of one length: the sample that measurements run on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.errors import DataError, InputError
from tempering.text_tables import TextTable


def chunks_digest(chunks: Int[Tensor, "chunks length"]) -> str:
    """16 hexadecimal digits that name these tokens, cut in this way."""
    digest = hashlib.sha256(str(tuple(chunks.shape)).encode())
    digest.update(chunks.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def token_chunks(
    tokenizer: Any, text: str | TextTable, length: int = 512, limit: int | None = None
) -> Int[Tensor, "chunks length"]:
    """Cut a text into consecutive chunks of `length` tokens; a shorter rest is left out.

    Parameters
    ----------
    tokenizer: a transformers tokenizer; no special tokens are added.
    text: in memory, or a table of texts on disk, whose chunks then stay on disk too.
    length: tokens in a chunk, at least 2.
    limit: how many chunks at most; spread evenly over the text when it has more.

    Raises DataError when the text has fewer tokens than one chunk.
    """
    if length < 2:
        raise InputError(f"a chunk has at least 2 tokens, not {length}")
    if limit is not None and limit < 1:
        raise InputError(f"at least one chunk is needed, not {limit}")
    if isinstance(text, TextTable):
        ids = text.ids(tokenizer)
    else:
        # The tokenizer's warning about the model's length does not apply: chunks are cut below.
        asked: dict[str, Any] = {"return_tensors": "pt", "verbose": False}
        ids = tokenizer(text, add_special_tokens=False, **asked).input_ids[0]
    count = len(ids) // length
    if len(ids) < 2:
        raise DataError(
            f"the text has {len(ids)} token{'' if len(ids) == 1 else 's'}, and a chunk has at "
            "least 2, since the first of them predicts the next; give a longer text"
        )
    if count == 0:
        raise DataError(
            f"the text has {len(ids)} tokens, less than one chunk of {length}; "
            f"give a longer text or shorter chunks (at most {len(ids)} tokens)"
        )
    chunks = ids[: count * length].view(count, length)
    if limit is not None and limit < count:
        chunks = chunks[torch.linspace(0, count - 1, limit).round().long()]
    return chunks
