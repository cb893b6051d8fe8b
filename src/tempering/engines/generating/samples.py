"""Text that a model writes itself, to learn from where there is no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.attention.examining.stored import input_device
from tempering.errors import RefusedError

_ROWS = 8  # side by side


def write_samples(
    model: Any,
    tokenizer: Any,
    count: int,
    length: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "count length"]:
    """Rows of tokens drawn from the model itself at T = 1, each from the start of a text.

    A row starts with the token that starts or parts texts, which is left out of it, and goes on
    past ends of texts: where the model ends one it starts another.

    Parameters
    ----------
    model, tokenizer: a causal language model.
    count, length: rows, and tokens in each. seed: of the draws; they depend on torch's version.
    progress: (done, total) rows.

    Raises RefusedError for a tokenizer without a token that starts or ends texts.
    """
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise RefusedError(
            "this tokenizer has no token that starts or ends a text, so the model can't begin one; "
            "give a text to learn from"
        )
    device = input_device(model)
    generator = torch.Generator(device).manual_seed(seed)
    rows = []
    with torch.no_grad():
        for first in range(0, count, _ROWS):
            size = min(_ROWS, count - first)
            ids = torch.full((size, 1), start, device=device)
            drawn, cache = [], None
            for _ in range(length):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                p = torch.softmax(out.logits[:, -1].float(), -1)
                ids = torch.multinomial(p, 1, generator=generator)
                drawn.append(ids)
            rows.append(torch.cat(drawn, 1))
            if progress is not None:
                progress(first + size, count)
    return torch.cat(rows).cpu()
