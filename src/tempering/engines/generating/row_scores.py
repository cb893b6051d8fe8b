"""How likely outputs are under the untempered model; equal pairs are read and scored once.

score = mean over the output's tokens of log p(token | what came before),   T = 1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.attention.examining.stored import input_device
from tempering.engines.generating.row_sampling import BatchRow
from tempering.engines.generating.rows import forward_options, read_prompts

_LOGIT_BYTES = 2**28  # bytes of logits at once, 256 MiB

Pair = tuple[tuple[int, ...], tuple[int, ...]]


def score_rows(
    model: Any, prompts: Sequence[Int[Tensor, " _"]], outputs: Sequence[Sequence[int]]
) -> list[float | None]:
    """Mean log probability of each output after its prompt, nats per token; None for an empty one.

    The model is used as it is: untempered, unless the caller has a profile in force on it.
    """
    pairs = [
        (tuple(prompt.tolist()), tuple(output))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    # Sorted, a batch has little padding and reads each prompt once.
    distinct = sorted(
        {pair for pair in pairs if pair[1]}, key=lambda pair: (len(pair[1]), len(pair[0]), pair)
    )
    vocabulary = int(model.config.get_text_config().vocab_size)
    found: dict[Pair, float] = {}
    while len(found) < len(distinct):
        left = distinct[len(found) :]
        most = _LOGIT_BYTES // (4 * vocabulary)
        # Batches grow while the logits of their longest output, which is the last, fit.
        count = 1
        while count < len(left) and (count + 1) * len(left[count][1]) <= most:
            count += 1
        for pair, score in zip(left[:count], _scores(model, left[:count]), strict=True):
            found[pair] = score
    return [found.get(pair) for pair in pairs]


def _scores(model: Any, pairs: Sequence[Pair]) -> list[float]:
    device = input_device(model)
    rows = [BatchRow(torch.tensor(prompt)) for prompt, _ in pairs]
    logits, past, node, mask, _ = read_prompts(model, rows)
    if len(mask) < len(rows):
        past.batch_select_indices(node)
        logits, mask = logits[node], mask[node]
    lengths = torch.tensor([len(output) for _, output in pairs], device=device)
    width = int(lengths.max())
    tokens = torch.zeros(len(pairs), width, dtype=torch.long, device=device)
    for row, (_, output) in enumerate(pairs):
        tokens[row, : len(output)] = torch.tensor(output, device=device)
    there = torch.arange(width, device=device) < lengths[:, None]
    logits = logits[:, None]
    if width > 1:
        mask = torch.cat([mask, there[:, :-1].to(mask.dtype)], dim=1)
        with torch.no_grad():
            out = model(
                input_ids=tokens[:, :-1],
                attention_mask=mask,
                past_key_values=past,
                use_cache=True,
                **forward_options(model)(mask, width - 1, width - 1),
            )
        logits = torch.cat([logits, out.logits[:, -(width - 1) :]], dim=1)
    logits = logits.float()
    logs = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)
    total = torch.where(there, logs, 0.0).double().sum(-1)
    return (total / lengths).tolist()
