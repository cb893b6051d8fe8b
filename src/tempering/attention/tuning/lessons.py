"""Lessons: a teacher's distributions over a row of tokens, and a student's divergence from them.

A lesson holds, for every target of one row, the k likeliest tokens of the teacher p with their log
probabilities, and the log probability of all other tokens together. The student q is then judged by

    D = sum_{v in top} p_v (log p_v - log q_v) + p_rest (log p_rest - log q_rest)      nats

which is KL(p || q) with all tokens outside the top taken as one. It is at most the full KL, by the
data-processing inequality, and equal to it where k is the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.errors import DataError, OutputError
from tempering.files import replace_atomic


class Distributions(NamedTuple):
    """The teacher's distribution at every target of a row.

    top: the likeliest tokens. log_p: of each. log_rest: of all others together; -inf for none.
    """

    top: Int[Tensor, "targets top"]
    log_p: Float[Tensor, "targets top"]
    log_rest: Float[Tensor, "targets"]


@dataclass(frozen=True)
class Lesson:
    """One row's distributions, in a file that is read when they are needed.

    identity: of teacher, row and k; part of the digest of what is learned.
    """

    path: Path
    identity: str

    def write(self, known: Distributions) -> None:
        """Keep the distributions, whole or not at all; OutputError when that fails."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {name: item.cpu().contiguous() for name, item in known._asdict().items()}
        try:
            replace_atomic(
                self.path, lambda path: save_file(tensors, path, {"identity": self.identity})
            )
        except SafetensorError as error:  # raised where the disk is full, too
            raise OutputError(
                f"can't write {self.path}: {error}; free some space. Lessons so far are kept"
            ) from error

    def read(self) -> Distributions:
        """The distributions; DataError for a file that is missing, damaged, or another lesson."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") == self.identity:
                    return Distributions(*(file.get_tensor(n) for n in Distributions._fields))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self.path} is no lesson that can be read ({error}); delete it, and the teacher "
                "is asked again"
            ) from error
        raise DataError(
            f"{self.path} is a lesson of another teacher, text or number of tokens; delete it, "
            "and the teacher is asked again"
        )


def distributions(logits: Float[Tensor, "targets vocabulary"], top: int | None) -> Distributions:
    """The likeliest tokens of each row, and the mass of the others."""
    log_p = torch.log_softmax(logits.float(), -1)
    size = log_p.shape[-1]
    if top is None or top >= size:
        every = torch.arange(size, device=logits.device, dtype=torch.int32)
        none = log_p.new_full((len(log_p),), -torch.inf)
        return Distributions(every.expand(len(log_p), size).contiguous(), log_p, none)
    best = log_p.topk(top, -1)
    return Distributions(best.indices.int(), best.values, _log_rest(log_p, best.indices))


def lesson_losses(
    logits: Float[Tensor, "targets vocabulary"], lessons: Sequence[Lesson]
) -> Float[Tensor, "targets"]:
    """D at every target (see the module), differentiable in the logits."""
    read = [lesson.read() for lesson in lessons]
    top, log_p, log_rest = (torch.cat(part).to(logits.device) for part in zip(*read, strict=True))
    if len(top) != len(logits):
        raise DataError(
            f"{lessons[0].path} has distributions for {len(top)} targets where {len(logits)} are "
            "predicted; delete it, and the teacher is asked again"
        )
    index = top.long()
    if int(index.max()) >= logits.shape[-1]:
        raise DataError(
            f"the teacher knows the token {int(index.max())}, and this model has a vocabulary of "
            f"{logits.shape[-1]}; a teacher shares the tokenizer of its student"
        )
    log_q = torch.log_softmax(logits.float(), -1)
    # A token that the teacher rules out adds nothing; a NaN of the student stays one.
    terms = log_p.exp() * (log_p - log_q.gather(-1, index))
    named = torch.where(log_p > -torch.inf, terms, 0.0).sum(-1)
    # Where the top is the whole vocabulary, neither distribution has a rest.
    has_rest = log_rest > -torch.inf
    if not bool(has_rest.any()):
        return named
    log_p_rest = log_rest.masked_fill(~has_rest, 0.0)
    log_q_rest = _log_rest(log_q, index).masked_fill(~has_rest, 0.0)
    return named + torch.where(has_rest, log_p_rest.exp() * (log_p_rest - log_q_rest), 0.0)


def _log_rest(log_p: Tensor, index: Tensor) -> Float[Tensor, "targets"]:
    """Log probability of all tokens that `index` leaves out."""
    return log_p.scatter(-1, index, -torch.inf).logsumexp(-1)
