"""Text cut into token chunks, of one length or of several: what measurements run on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


def start_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text: <bos> of Llama and Gemma, or none.

    A model that was trained with them says little without: Gemma 3 loses a nat a token.
    Raises InputError where that can't be told.
    """
    whole = list(tokenizer("a", verbose=False).input_ids)
    bare = list(tokenizer("a", add_special_tokens=False, verbose=False).input_ids)
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return whole[:place]
    raise InputError(
        f"the tokenizer reads 'a' as {bare} alone and as {whole} with its special tokens, so what "
        "it puts before a text can't be told; give token ids in place of text"
    )


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens behind `start_ids`, unless it begins with them, as a chat template may."""
    start = start_ids(tokenizer)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return ids if ids[: len(start)] == start else start + ids


def token_chunks(
    tokenizer: Any, text: str | TextTable, length: int = 512, limit: int | None = None
) -> Int[Tensor, "chunks length"]:
    """Cut a text into consecutive chunks of `length` tokens; a shorter rest is left out.

    Each begins as the tokenizer begins a text (see `start_ids`), which counts among its tokens.

    Parameters
    ----------
    tokenizer: a transformers tokenizer.
    text: in memory, or a table of texts on disk, whose chunks then stay on disk too.
    length: tokens in a chunk, at least 2.
    limit: how many chunks at most; spread evenly over the text when it has more.

    Raises DataError when the text has fewer tokens than one chunk.
    """
    if length < 2:
        raise InputError(f"a chunk has at least 2 tokens, not {length}")
    if limit is not None and limit < 1:
        raise InputError(f"at least one chunk is needed, not {limit}")
    ids = token_ids(tokenizer, text)
    start = torch.tensor(start_ids(tokenizer), dtype=ids.dtype)
    own = length - len(start)
    if own < 2 and len(start) > 0:
        raise InputError(
            f"a chunk of {length} tokens leaves {own} for the text behind the {len(start)} that "
            f"the tokenizer puts first; ask for at least {len(start) + 2}"
        )
    count = len(ids) // own
    if len(ids) < 2:
        raise DataError(
            f"the text has {len(ids)} token{'' if len(ids) == 1 else 's'}, and a chunk has at "
            "least 2, since the first of them predicts the next; give a longer text"
        )
    if count == 0:
        raise DataError(
            f"the text has {len(ids)} tokens, less than one chunk of {own}; "
            f"give a longer text or shorter chunks (at most {len(ids) + len(start)} tokens)"
        )
    chunks = ids[: count * own].view(count, own)
    if limit is not None and limit < count:
        chunks = chunks[torch.linspace(0, count - 1, limit).round().long()]
    # A table's chunks stay on disk where nothing is put before them.
    return torch.cat([start.expand(len(chunks), -1), chunks], 1) if len(start) else chunks


def token_ids(tokenizer: Any, text: str | TextTable) -> Int[Tensor, "tokens"]:
    """The tokens of a text, or of a table of texts, without special ones."""
    if isinstance(text, TextTable):
        return text.ids(tokenizer)
    # The tokenizer's warning about the model's length does not apply: chunks are cut from these.
    found = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
    return found.input_ids[0]


def mixed_chunks(
    ids: Int[Tensor, "tokens"],
    lengths: Sequence[int],
    limit: int | None = None,
    start: Sequence[int] = (),
) -> list[Int[Tensor, "length"]]:
    """Cut tokens into consecutive chunks of several lengths, about as many tokens in each.

    A round of max(lengths) tokens for every length is repeated as often as it fits, `limit` times
    at most, spread evenly over the text. Each chunk begins with `start`, which counts.

    Raises DataError when there are fewer tokens than one round.
    """
    wanted = sorted({length - len(start) for length in lengths})
    if not wanted or wanted[0] < 2:
        raise InputError(f"chunks have at least 2 tokens each, not {', '.join(map(str, lengths))}")
    if limit is not None and limit < 1:
        raise InputError(f"at least one round of chunks is needed, not {limit}")
    sizes = [length for length in wanted for _ in range(wanted[-1] // length)]
    count = len(ids) // sum(sizes)
    if count == 0:
        raise DataError(
            f"the text has {len(ids)} tokens, and one round of chunks of "
            f"{', '.join(map(str, wanted))} tokens takes {sum(sizes)}; give a longer text or "
            "shorter lengths"
        )
    rounds = ids[: count * sum(sizes)].view(count, -1)
    if limit is not None and limit < count:
        rounds = rounds[torch.linspace(0, count - 1, limit).round().long()]
    first = torch.tensor(start, dtype=ids.dtype)
    return [torch.cat([first, chunk]) for row in rounds for chunk in row.split(sizes)]
