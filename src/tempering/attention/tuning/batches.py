"""Batches of tokens, and the losses of a tempered model on them, in nats.

    next token   -log q(token), mean over all predicted tokens          (plain text)
    answer       -log q(token), mean over the tokens of the answers     (prompt and answer)
    divergence   sum_v p (log p - log q), mean over predicted tokens    (stay near the untempered)
    lesson       the divergence from a teacher's p, kept on disk          (be like the teacher)

p is the untempered model's distribution but in a lesson, q the tempered model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tempering.attention.examining.stored import input_device
from tempering.attention.tuning.lessons import Lesson, lesson_losses
from tempering.errors import DataError, RefusedError
from tempering.inputs.answers import answers_of, called, check_goals, on
from tempering.inputs.example import NO_GOAL, Inputs


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids of rows of one length, and which tokens count as targets.

    ids: Int[Tensor, "rows length"]. targets: Bool[Tensor, "rows length"]; the first token of a
    row is never one. origin: names the source, in errors. lessons: for each row what a teacher
    says in place of its next tokens (see `teacher`); none for the tokens themselves. arguments:
    what the model is called with, where that is more than the ids: images, sound, what an encoder
    reads. Then its logits at position i name ids[i + 1]: the next token of a decoder, or the class
    of a classifier, which has one position.
    """

    ids: Int[Tensor, "rows length"]
    targets: Bool[Tensor, "rows length"]
    origin: str = ""
    lessons: tuple[Lesson, ...] = ()
    arguments: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> list[int]:
        """Number of target tokens in each row."""
        return self.targets[:, 1:].sum(1).tolist()

    @property
    def count(self) -> int:
        """Number of target tokens."""
        return sum(self.counts)


def text_batches(chunks: Int[Tensor, "chunks length"], origin: str = "text") -> list[Batch]:
    """One batch a chunk; every token but the first of a chunk is a target."""
    everything = torch.ones_like(chunks[:1], dtype=torch.bool)
    return [Batch(ids[None], everything, f"{origin}, chunk {i}") for i, ids in enumerate(chunks)]


def example_batches(inputs: Inputs) -> list[Batch]:
    """One batch an example; its goals are the targets.

    Raises DataError for examples whose right answer isn't known, with their place.
    """
    batches = []
    for example in inputs:
        if example.goals is None or inputs.own:
            raise DataError(
                f"{example.origin}: nothing says what is right to answer, so nothing can be "
                "learned; put images into folders named by their labels, write NAME.txt beside "
                "NAME.wav, or give labels"
            )
        goals = example.goals
        ids = torch.cat([goals.new_zeros(1), goals.clamp(min=0)])[None]
        targets = torch.cat([torch.zeros(1, dtype=torch.bool), goals != NO_GOAL])[None]
        read = example.arguments.get("input_ids")
        arguments = example.arguments
        if len(arguments) == 1 and read is not None and read.shape == ids.shape:
            asked = targets[0, 1:]
            if torch.equal(read[0, 1:][asked], goals[asked]):  # the text's own next tokens
                ids, arguments = read, {}
        batches.append(Batch(ids, targets, example.origin, (), arguments))
    return batches


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
        # A token may span the end of the prompt: it then belongs to the answer.
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
    """The loss at every target, in reading order; differentiable in live temperatures."""
    return losses_of(*target_logits(model, batch), batch)


def losses_of(
    logits: Float[Tensor, "targets vocabulary"], goals: Int[Tensor, "targets"], batch: Batch
) -> Float[Tensor, "targets"]:
    """-log q of every target, or its divergence from the teacher where the batch has lessons."""
    if batch.lessons:
        return lesson_losses(logits, batch.lessons)
    return F.cross_entropy(logits.float(), goals, reduction="none")


def divergences(
    model: Any, batch: Batch, reference: Float[Tensor, "targets vocabulary"]
) -> tuple[Float[Tensor, "targets"], Float[Tensor, "targets"]]:
    """KL(p || q) and -log q(target) at every target; p is the softmax of `reference`."""
    logits, goals = target_logits(model, batch)
    q = torch.log_softmax(logits.float(), dim=-1)
    p = torch.log_softmax(reference.float(), dim=-1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return kl, -q.gather(1, goals[:, None])[:, 0]


def target_logits(
    model: Any, batch: Batch
) -> tuple[Float[Tensor, "targets vocabulary"], Int[Tensor, "targets"]]:
    """The logits that predict the targets, and the targets.

    Raises RefusedError for a model that is no decoder of tokens by itself.
    """
    if batch.arguments:
        return _answer_logits(model, batch)
    if getattr(model.config, "is_encoder_decoder", False):
        raise RefusedError(
            f"{type(model).__name__} has an encoder and a decoder, whose losses need both sides; "
            "give pairs, images or sound with answers: from_inputs(name, inputs, model)"
        )
    device = input_device(model)
    ids = batch.ids.to(device)
    wanted = batch.targets[:, 1:].to(device)
    goals = ids[:, 1:][wanted]
    places = wanted.any(0).nonzero()[:, 0]
    if len(places) < wanted.shape[1] // 2 and _takes_positions(model):
        # Logits are formed only where some row has a target. An index on the CPU serves a model
        # whose last layers are on another device.
        out = model(input_ids=ids, use_cache=False, logits_to_keep=places.cpu()).logits
        wanted = wanted[:, places]
    else:
        out = model(input_ids=ids, use_cache=False).logits[:, :-1]
    rows = out.flatten(0, 1)
    if not bool(wanted.all()):
        rows = rows.index_select(0, wanted.flatten().nonzero()[:, 0].to(rows.device))
    return rows, goals.to(rows.device)


def _answer_logits(
    model: Any, batch: Batch
) -> tuple[Float[Tensor, "targets vocabulary"], Int[Tensor, "targets"]]:
    """`target_logits` of rows that are more than tokens."""
    arguments = on(model, batch.arguments, input_device(model))
    logits = answers_of(model, called(model, arguments)).logits
    if logits is None:
        raise RefusedError(
            f"{type(model).__name__} gives features and no distribution over answers; give a "
            "Python objective that computes the loss: from_functions(name, [f, ...])"
        )
    check_goals(model, logits, batch.ids[:, 1:], batch.origin)
    wanted = batch.targets[:, 1:].to(logits.device)
    goals = batch.ids[:, 1:].to(logits.device)[wanted]
    return logits[:, : wanted.shape[1]][wanted], goals


def _takes_positions(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
