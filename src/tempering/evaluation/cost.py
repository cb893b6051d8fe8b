"""What tempering costs: the rise of negative log-likelihood on data, and the distance moved.

    cost = mean over predicted tokens of  -log q(token) + log p(token)      nats per token
    KL   = mean over positions of  sum_v p(v) (log p(v) - log q(v))         nats per token

p is the untempered model's next-token distribution, q the tempered one's. Of a classifier they are
its distributions over classes, in nats per answer. Where the right answer is not known, the
likeliest one of p takes its place. A model that gives features f and no distribution costs

    mean over its vectors of  1 - cos(f untempered, f tempered)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.control.handle import Tempering
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout, layout_reached
from tempering.attention.examining.stored import input_device
from tempering.attention.examining.subject import unwrapped
from tempering.attention.modes import evaluation_mode
from tempering.attention.profiles.fingerprint import agree_on_model
from tempering.attention.profiles.profile import Profile
from tempering.errors import InputError
from tempering.evaluation.journal import Journal
from tempering.evaluation.paired import IntervalEstimate, mean_estimate, paired_difference
from tempering.evaluation.shared_ledger import SharedLedger
from tempering.inputs.answers import Answers, answers, check_goals
from tempering.inputs.example import NO_GOAL, Example, Inputs, as_inputs
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
    """The cost of one variant, paired over chunks of text or other examples.

    unit: "nats/token", "nats/answer", or "1 - cosine" of features, whose KL is NaN. tokens: how
    many tokens, answers or vectors it is a mean over.
    """

    label: str
    cost: IntervalEstimate
    kl: IntervalEstimate
    nll: float
    untempered_nll: float
    tokens: int
    unit: str = "nats/token"


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


def answers_under(subject: _Subject, example: Example, profile: Profile | None) -> Answers:
    """What the model says of an example under a profile; of logits those that have a goal."""
    subject.set(profile)
    model = subject.model
    with torch.no_grad():
        found = answers(model, example, input_device(model))
    if found.logits is None:
        return found
    goals = example.goals
    check_goals(model, found.logits, goals, example.origin)
    return found if goals is None else Answers(logits=found.logits[:, : len(goals)])


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


class CostRows(NamedTuple):
    """The numbers behind costs.

    rows: for each example {label: [mean nll, mean KL]}; "" is the untempered model. counts: tokens
    (or answers, or vectors) of each. unit: of the costs.
    """

    rows: list[dict[str, list[float]]]
    counts: list[int]
    unit: str
    complete: bool


def measure_costs(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"] | Any,
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

    chunks: token ids, or what the model's processor gives (see `tempering.inputs.as_inputs`).
    Returns costs in the order of `variants`. Raises InputError for two variants of one label,
    RefusedError for a model that gives neither a distribution nor features.
    """
    found = cost_rows(model, chunks, variants, journal=journal, progress=progress)
    return summarised(found.rows, variants, found.counts, found.unit), found.complete


def cost_rows(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"] | Any,
    variants: Sequence[Variant],
    *,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CostRows:
    """The numbers behind `measure_costs`."""
    check_labels(variants)
    if isinstance(chunks, Tensor) and len(chunks) == 0:
        raise InputError("a cost needs at least one chunk of text")
    network: Any = unwrapped(model)
    inputs = as_inputs(chunks, network)
    if network.config.is_encoder_decoder:
        for example in inputs:
            if "decoder_input_ids" not in example.arguments:
                raise InputError(
                    f"{example.origin}: {type(network).__name__} has an encoder and a decoder, and "
                    "a text alone doesn't say what the decoder reads; give pairs of prompt and "
                    "answer, or labels"
                )
    layout_reached(model, inputs.sample)
    _agree(model, inputs, variants)
    ledger = SharedLedger(journal)
    found = CostRows([], [], "nats/token", False)
    try:
        with evaluation_mode(model), _Subject(model) as subject:

            def one(index: int) -> tuple[dict[str, list[float]], int, str]:
                return _chunk(subject, inputs.examples[index], variants, ledger, index)

            for done in ledger.rounds(len(inputs), one):
                for row, count, unit in done:
                    found.rows.append(row)
                    found.counts.append(count)
                    found = found._replace(unit=unit)
                if progress is not None:
                    progress(len(found.rows), len(inputs))
    except KeyboardInterrupt:
        if not found.rows:
            raise
    return found._replace(complete=len(found.rows) == len(inputs))


def _agree(model: nn.Module, inputs: Inputs, variants: Sequence[Variant]) -> None:
    """RankError where the ranks of a run have other models, texts or variants."""
    if here().size > 1:
        agree_on_model(model)
        profiles = [variant.profile and variant.profile.to_text() for variant in variants]
        labels = [(variant.label, variant.temperature) for variant in variants]
        given = {"text": inputs.digest, "variants": labels, "profiles": profiles}
        here().agree(given)


def _chunk(
    subject: _Subject,
    example: Example,
    variants: Sequence[Variant],
    ledger: SharedLedger,
    index: int,
) -> tuple[dict[str, list[float]], int, str]:
    """{label: [mean nll, mean KL]} of one example, "" the untempered model; targets, and unit."""
    row: dict[str, list[float]] = {}
    reference: Answers | None = None
    for variant in (None, *variants):
        label = "" if variant is None else variant.label
        name = f"{index}:{label}"
        if name in ledger:
            row[label] = ledger[name]
            continue
        if reference is None:
            reference = answers_under(subject, example, None)
        if variant is None:
            row[label] = _compared(reference, None, reference, example)
            row[label] += _counted(subject.model, reference, example)
        else:
            same = variant.profile is None
            own = reference if same else answers_under(subject, example, variant.profile)
            row[label] = _compared(own, variant.temperature, reference, example)
        ledger.put(name, row[label])
    count, kind = row[""][2:]
    return row, int(count), UNITS[int(kind)]


# Of costs, by the number that a journal keeps.
UNITS = ("nats/token", "nats/answer", "1 - cosine")


def _counted(model: Any, reference: Answers, example: Example) -> list[float]:
    """How many targets (or vectors) an example has, and the place of their unit in `UNITS`."""
    if reference.logits is None:
        assert reference.features is not None
        return [float(reference.features.shape[1]), 2.0]
    goals = _goals(reference.logits, example)
    return [float((goals != NO_GOAL).sum()), float(reference.logits.shape[1] == 1)]


def _goals(logits: Float[Tensor, "rows positions classes"], example: Example) -> Tensor:
    """What the logits should name; the likeliest answers of the model where nothing is known."""
    goals = example.goals
    return logits[0].argmax(-1) if goals is None else goals.to(logits.device)


def _compared(
    own: Answers, temperature: float | None, reference: Answers, example: Example
) -> list[float]:
    """Mean nll and mean KL of answers; temperature: of their distributions, None untempered."""
    if own.logits is None or reference.logits is None:
        assert own.features is not None and reference.features is not None
        if temperature not in (None, 1.0):
            raise InputError("a model of features has no distribution for a sampling temperature")
        cosine = torch.nn.functional.cosine_similarity(
            own.features.double(), reference.features.double(), dim=-1
        )
        return [0.0 if temperature is None else float((1 - cosine).mean()), math.nan]
    goals = _goals(reference.logits, example)
    asked = goals != NO_GOAL
    logits, goals = own.logits[0][asked], goals[asked]
    before = None if temperature is None else reference.logits[0][asked]
    nll, kl = losses_and_divergence(logits, before, goals, temperature or 1.0)
    return [float(nll.double().mean()), float(kl.double().mean())]


def mean_loss(logprobs: Sequence[float | None]) -> float:
    """Mean -log q of the tokens after the first, nats; None (of the first) has none."""
    return -math.fsum(x for x in logprobs if x is not None) / (len(logprobs) - 1)


def summarised(
    rows: Sequence[Mapping[str, list[float]]],
    variants: Sequence[Variant],
    counts: Sequence[int],
    unit: str = "nats/token",
) -> list[Cost]:
    """Costs from [mean nll, mean KL] of each chunk by label; "" is the untempered model.

    counts: targets of each chunk. Where they differ, means are over targets, and their intervals
    those of a ratio of sums (linearised; Cochran 1977, section 6).
    """

    def over_targets(place: int, label: str) -> Tensor:
        values = torch.tensor([row[label][place] for row in rows], dtype=torch.float64)
        weights = torch.tensor(counts, dtype=torch.float64)
        if bool((weights == weights[0]).all()):
            return values
        mean = (weights * values).sum() / weights.sum()
        return mean + weights / weights.mean() * (values - mean)

    base = over_targets(0, "")
    costs = []
    for variant in variants:
        nll = over_targets(0, variant.label)
        costs.append(
            Cost(
                label=variant.label,
                cost=paired_difference(nll, base),
                kl=mean_estimate(over_targets(1, variant.label)),
                nll=float(nll.mean()),
                untempered_nll=float(base.mean()),
                tokens=sum(counts),
                unit=unit,
            )
        )
    return costs
