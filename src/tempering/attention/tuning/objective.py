"""What is tuned for: losses of a tempered model on batches of tokens, in nats.

    next token   -log q(token), mean over all predicted tokens          (plain text)
    answer       -log q(token), mean over the tokens of the answers     (prompt and answer)
    divergence   sum_v p (log p - log q), mean over predicted tokens    (stay near the untempered)

p is the untempered model's distribution, q the tempered one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tempering.errors import DataError

@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids of rows of one length, and which tokens count as targets.

    ids: Int[Tensor, "rows length"]. targets: Bool[Tensor, "rows length"]; the first token of a
    row is never one. origin: names the source, in errors.
    """

    ids: Int[Tensor, "rows length"]
    targets: Bool[Tensor, "rows length"]
    origin: str = ""

    @property
    def count(self) -> int:
        """Number of target tokens."""
        return int(self.targets[:, 1:].sum())


def text_batches(chunks: Int[Tensor, "chunks length"], origin: str = "text") -> list[Batch]:
    """One batch a chunk; every token but the first of a chunk is a target."""
    everything = torch.ones_like(chunks[:1], dtype=torch.bool)
    return [Batch(ids[None], everything, f"{origin}, chunk {i}") for i, ids in enumerate(chunks)]


def answer_batches(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], origin: str = "answers"
) -> list[Batch]:
    """One batch a pair of prompt and answer; the answer's tokens are the targets.

    Raises DataError for an answer of no tokens, with its place.
    """
    batches = []
    for place, (prompt, answer) in enumerate(pairs):
        first = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        both = tokenizer(prompt + answer, add_special_tokens=False, verbose=False).input_ids
        # Tokens may merge over the seam: what is not common to both belongs to the answer.
        start = next(
            (i for i, (a, b) in enumerate(zip(first, both, strict=False)) if a != b),
            min(len(first), len(both)),
        )
        start = max(start, 1)
        if not answer.strip() or start >= len(both):
            raise DataError(
                f"{origin}, pair {place}: the answer {answer!r} has no tokens of its own; "
                "give each prompt an answer"
            )
        ids = torch.tensor([both])
        targets = torch.zeros_like(ids, dtype=torch.bool)
        targets[:, start:] = True
        batches.append(Batch(ids, targets, f"{origin}, pair {place}"))
    return batches


def target_losses(model: Any, batch: Batch) -> Float[Tensor, "targets"]:
    """-log q of every target, in reading order; differentiable in live temperatures."""
    logits, goals = target_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits.float(), goals, reduction="none")


def divergences(
    model: Any, batch: Batch, reference: Float[Tensor, "targets vocabulary"]
) -> tuple[Float[Tensor, "targets"], Float[Tensor, "targets"]]:
    """KL(p || q) and -log q(target) at every target; p is the softmax of `reference`."""
    logits, goals = target_logits(model, batch)
    q = torch.log_softmax(logits.float(), dim=-1)
    p = torch.log_softmax(reference.float(), dim=-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return kl, -q.gather(1, goals[:, None])[:, 0]


def target_logits(
    model: Any, batch: Batch
) -> tuple[Float[Tensor, "targets vocabulary"], Int[Tensor, "targets"]]:
    """The logits that predict the targets, and the targets."""
    device = model.get_input_embeddings().weight.device
    ids = batch.ids.to(device)
    logits = model(input_ids=ids, use_cache=False).logits
    wanted = batch.targets[:, 1:].to(logits.device)
    return logits[:, :-1][wanted], ids[:, 1:].to(logits.device)[wanted]
