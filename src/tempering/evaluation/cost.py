"""What tempering costs: the rise of negative log-likelihood on text, and the distance moved.

    cost = mean over predicted tokens of  -log q(token) + log p(token)      nats per token
    KL   = mean over positions of  sum_v p(v) (log p(v) - log q(v))         nats per token

p is the untempered model's next-token distribution, q the tempered one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.control.handle import Tempering
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.stored import input_device
from tempering.attention.modes import evaluation_mode
from tempering.attention.profiles.fingerprint import agree_on_model
from tempering.attention.profiles.profile import Profile
from tempering.chunks import chunks_digest
from tempering.errors import InputError
from tempering.evaluation.journal import Journal
from tempering.evaluation.paired import IntervalEstimate, mean_estimate, paired_difference
from tempering.evaluation.shared_ledger import SharedLedger
from tempering.ranks import here

# Positions whose distributions over the vocabulary are held at once.
_POSITIONS = 256


@dataclass(frozen=True)
class Variant:
    """One way to run the model: an attention profile, and a divisor of its output logits.

    temperature: of the next-token distribution (sampling temperature), 1 for none.
    """

    label: str
    profile: Profile | None = None
    temperature: float = 1.0
    family: str = "attention pattern"
    text: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            raise InputError("a variant needs a label, by which its numbers are kept")
        if not 0 < self.temperature < float("inf"):
            raise InputError(
                f"{self.label}: the cost of a sampling temperature of {self.temperature} is not "
                "finite; give one above 0"
            )


@dataclass(frozen=True)
class Cost:
    """The cost of one variant, in nats per token, paired over chunks of text."""

    label: str
    cost: IntervalEstimate
    kl: IntervalEstimate
    nll: float
    untempered_nll: float
    tokens: int


def check_labels(variants: Sequence[Variant]) -> None:
    """InputError for two variants of one label."""
    labels = [variant.label for variant in variants]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError(f"two variants are called '{twice}'; give each its own label")


class _Subject:
    """A model that is run under one profile after the other, through one handle.

    The handle is attached at the first profile: where all numbers are kept already, nothing is.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.handle: Tempering | None = None

    def __enter__(self) -> _Subject:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.handle is not None:
            self.handle.remove()

    def set(self, profile: Profile | None) -> None:
        if self.handle is not None:
            self.handle.update(profile or Profile.neutral(layout(self.model)))
        elif profile is not None:
            self.handle = tempered(self.model, profile)


def next_token_logits(
    subject: _Subject, ids: Int[Tensor, "length"], profile: Profile | None
) -> Float[Tensor, "positions vocabulary"]:
    """Logits at all positions but the last, each predicting the next token."""
    subject.set(profile)
    with torch.no_grad():
        given = ids[None].to(input_device(subject.model))
        return subject.model(input_ids=given, use_cache=False).logits[0, :-1]


def losses_and_divergence(
    logits: Float[Tensor, "positions vocabulary"],
    reference: Float[Tensor, "positions vocabulary"] | None,
    targets: Int[Tensor, "positions"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "positions"], Float[Tensor, "positions"]]:
    """-log q(target) and KL(p || q) at each position; the KL is 0 without a reference."""
    nll, kl = [], []
    for start in range(0, len(logits), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        q = torch.log_softmax(logits[part].float() / temperature, dim=-1)
        target = targets[part].to(q.device)
        nll.append(-q.gather(1, target[:, None])[:, 0])
        if reference is None:
            kl.append(torch.zeros_like(nll[-1]))
            continue
        p = torch.log_softmax(reference[part].float(), dim=-1)
        kl.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    return torch.cat(nll), torch.cat(kl)


def measure_costs(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"],
    variants: Sequence[Variant],
    *,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Cost], bool]:
    """The cost of each variant against the untempered model, chunk by chunk.

    Every chunk is run once untempered and once under each variant, so costs are paired over any
    number of finished chunks. Ctrl-C returns the costs over these; the second value says whether
    they are all chunks. With a journal, finished chunks are kept and not computed again; where a
    run has several ranks (`tempering.ranks`), they share the chunks, and the journal is rank 0's.

    Returns costs in the order of `variants`. Raises InputError for two variants of one label.
    """
    rows, complete = cost_rows(model, chunks, variants, journal=journal, progress=progress)
    return summarised(rows, variants, chunks.shape[1] - 1), complete


def cost_rows(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"],
    variants: Sequence[Variant],
    *,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, list[float]]], bool]:
    """The numbers behind `measure_costs`: for each chunk {label: [mean nll, mean KL]}."""
    check_labels(variants)
    if len(chunks) == 0:
        raise InputError("a cost needs at least one chunk of text")
    _agree(model, chunks, variants)
    ledger = SharedLedger(journal)
    rows: list[dict[str, list[float]]] = []
    try:
        with evaluation_mode(model), _Subject(model) as subject:

            def one(index: int) -> dict[str, list[float]]:
                return _chunk(subject, chunks[index], variants, ledger, index)

            for found in ledger.rounds(len(chunks), one):
                rows += found
                if progress is not None:
                    progress(len(rows), len(chunks))
    except KeyboardInterrupt:
        if not rows:
            raise
    return rows, len(rows) == len(chunks)


def _agree(
    model: nn.Module, chunks: Int[Tensor, "chunks length"], variants: Sequence[Variant]
) -> None:
    """RankError where the ranks of a run have other models, texts or variants."""
    if here().size > 1:
        agree_on_model(model)
        profiles = [variant.profile and variant.profile.to_text() for variant in variants]
        labels = [(variant.label, variant.temperature) for variant in variants]
        given = {"text": chunks_digest(chunks), "variants": labels, "profiles": profiles}
        here().agree(given)


def _chunk(
    subject: _Subject,
    ids: Tensor,
    variants: Sequence[Variant],
    ledger: SharedLedger,
    index: int,
) -> dict[str, list[float]]:
    """{label: [mean nll, mean KL]} of one chunk; "" is the untempered model."""
    row: dict[str, list[float]] = {}
    reference: Tensor | None = None
    for variant in (None, *variants):
        label = "" if variant is None else variant.label
        name = f"{index}:{label}"
        if name in ledger:
            row[label] = ledger[name]
            continue
        if reference is None:
            reference = next_token_logits(subject, ids, None)
        if variant is None:
            nll, kl = losses_and_divergence(reference, None, ids[1:])
        else:
            same = variant.profile is None
            logits = reference if same else next_token_logits(subject, ids, variant.profile)
            nll, kl = losses_and_divergence(logits, reference, ids[1:], variant.temperature)
        row[label] = [float(nll.double().mean()), float(kl.double().mean())]
        ledger.put(name, row[label])
    return row


def mean_loss(logprobs: Sequence[float | None]) -> float:
    """Mean -log q of the tokens after the first, nats; None (of the first) has none."""
    return -math.fsum(x for x in logprobs if x is not None) / (len(logprobs) - 1)


def summarised(
    rows: Sequence[Mapping[str, list[float]]], variants: Sequence[Variant], positions: int
) -> list[Cost]:
    """Costs from [mean nll, mean KL] of each chunk by label; "" is the untempered model."""
    base = [row[""][0] for row in rows]
    costs = []
    for variant in variants:
        nll = [row[variant.label][0] for row in rows]
        costs.append(
            Cost(
                label=variant.label,
                cost=paired_difference(nll, base),
                kl=mean_estimate([row[variant.label][1] for row in rows]),
                nll=sum(nll) / len(nll),
                untempered_nll=sum(base) / len(base),
                tokens=positions * len(rows),
            )
        )
    return costs
