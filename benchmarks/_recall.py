"""Many questions on one context in one pass: each sees the context and itself, not the others.

The context's tokens stand once; every question follows in a segment of its own, at the positions
it would have right after the context, under a mask that hides the other segments. The logits are
those of each prompt by itself; layers that see a window see it in positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tempering.chunks import text_ids
from tempering.evaluation.recall import Recall


@dataclass(frozen=True, eq=False)
class Packed:
    """ids, positions [1, length]; mask [1, 1, length, length]; sources: where answers' tokens
    (goals) are predicted; owners: the question of each; questions: how many."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    sources: Tensor
    goals: Tensor
    owners: Tensor
    questions: int
    wording: str


def pack(tokenizer: Any, item: Recall) -> Packed:
    """Tokens of a context and its questions; prompt and answer are cut apart as by from_pairs."""
    rows = [
        (
            text_ids(tokenizer, prompt),
            tokenizer(answer, add_special_tokens=False, verbose=False).input_ids,
        )
        for prompt, answer in item.pairs()
    ]
    first = rows[0][0]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == first[shared] for p, _ in rows):
        shared += 1
    ids, positions, segment = list(first[:shared]), list(range(shared)), [-1] * shared
    sources, goals, owners = [], [], []
    for place, (prompt, answer) in enumerate(rows):
        tail = prompt[shared:] + answer[:-1]
        start = len(ids) + len(prompt) - shared - 1
        ids += tail
        positions += range(shared, shared + len(tail))
        segment += [place] * len(tail)
        sources += range(start, start + len(answer))
        goals += answer
        owners += [place] * len(answer)
    own = torch.tensor(segment)
    index = torch.arange(len(ids))
    seen = (own[None] == -1) | (own[:, None] == own[None])
    mask = (index[:, None] >= index[None]) & seen
    return Packed(
        torch.tensor(ids)[None],
        torch.tensor(positions)[None],
        mask[None, None],
        torch.tensor(sources),
        torch.tensor(goals),
        torch.tensor(owners),
        len(rows),
        item.wording,
    )


def answer_logits(model: Any, item: Packed) -> Tensor:
    """Logits that predict the answers' tokens, [goals, vocabulary]."""
    device = model.get_input_embeddings().weight.device
    found = model(
        input_ids=item.ids.to(device),
        attention_mask=_masks(model, item, device),
        position_ids=item.positions.to(device),
        use_cache=False,
        logits_to_keep=item.sources.to(device),
    )
    return found.logits[0].float()


def _masks(model: Any, item: Packed, device: Any) -> Any:
    """The mask, or one for each kind of layer where some see a window: transformers takes a mask
    of four dimensions for all layers alike."""
    mask = item.mask.to(device)
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"}:
        return mask
    if kinds - {"full_attention", "sliding_attention"}:
        raise SystemExit(f"questions can't be packed for layers of the kinds {sorted(kinds)}")
    place = item.positions[0].to(device)
    near = place[:, None] - place[None] < config.sliding_window
    return {"full_attention": mask, "sliding_attention": mask & near}


def answer_loss(model: Any, item: Packed) -> Tensor:
    """Mean -log q of the answers' tokens, nats."""
    logits = answer_logits(model, item)
    return F.cross_entropy(logits, item.goals.to(logits.device))


def each_answered(model: Any, item: Packed) -> tuple[Tensor, Tensor]:
    """For every question the mean loss of its answer's tokens, and 1 if each is likeliest."""
    with torch.no_grad():
        logits = answer_logits(model, item).cpu()
    losses = F.cross_entropy(logits, item.goals, reduction="none")
    hits = (logits.argmax(-1) == item.goals).float()
    loss, right = torch.zeros(item.questions), torch.ones(item.questions)
    loss.scatter_reduce_(0, item.owners, losses, "mean", include_self=False)
    right.scatter_reduce_(0, item.owners, hits, "amin")
    return loss, right


def answered(model: Any, item: Packed) -> tuple[float, float]:
    """Mean loss of the answers' tokens, and the share of questions with every token likeliest."""
    loss, right = each_answered(model, item)
    tokens = torch.bincount(item.owners, minlength=item.questions)
    return float((loss * tokens).sum() / tokens.sum()), float(right.mean())
