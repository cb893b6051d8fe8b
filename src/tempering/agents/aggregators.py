"""From many answers to one: plain functions `(answers) -> Decision`.

Answers compete. The answer of sample i has the energy d_i = -(its score), where a score is a mean
log probability in nats per token, and the tempered posterior over the samples decides:

    r_i = exp(-d_i/T) / sum_j exp(-d_j/T)          share of an answer = sum of r_i over its samples

At T = inf every sample weighs the same, which is the majority vote; at T = 0 only the likeliest
sample counts, which is best of n; in between lies the tempered vote. The support of the shares,
exp(entropy), says how settled the vote is: 1 when all agree.

Samples without a readable answer (`text` None) abstain, and a decision counts them. All spellings
of an answer (42 and 42.0; Paris, paris) count as one answer: votes compare forms, as checkers do.
Options are set with functools.partial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from tempering.agents.checkers import form
from tempering.errors import InputError
from tempering.posterior import responsibilities, support


@dataclass(frozen=True)
class Answer:
    """One sample's answer.

    text: the answer as a checker read it, or None where it could not. output: all that was
    generated. form: what all spellings of the answer share, as `Checker.form` gives it;
    `form(text)` where None. score: mean log probability, nats per token, or None where unknown.
    temperature: of sampling; heat: of the attention's amplitude, 1 for the model's own.
    tokens: generated.
    """

    text: str | None
    output: str = ""
    score: float | None = None
    temperature: float | None = None
    heat: float = 1.0
    tokens: int = 0
    form: str | None = None


@dataclass(frozen=True)
class Decision:
    """What the answers add up to.

    answer: as the sample at `index` spelled it; None where no sample had one.
    shares: of each answer, in its first spelling, sum 1, largest first.
    support: 1..answers, 0 where there are none.
    n: samples with an answer. abstained: samples without one.
    """

    answer: str | None
    index: int | None
    shares: dict[str, float]
    support: float
    n: int
    abstained: int = field(default=0, compare=False)


Aggregator = Callable[[Sequence[Answer]], Decision]


def _none(answers: Sequence[Answer]) -> Decision:
    """The decision where every sample abstains."""
    return Decision(None, None, {}, 0.0, 0, len(answers))


def majority(answers: Sequence[Answer]) -> Decision:
    """The answer that most samples gave; of several, the one given first."""
    valid = [i for i, answer in enumerate(answers) if answer.text is not None]
    return _decision(answers, valid, [1.0 / len(valid)] * len(valid)) if valid else _none(answers)


def tempered_vote(answers: Sequence[Answer], *, temperature: float = 0.1) -> Decision:
    """The answer with the largest share of the tempered posterior; see the module's head.

    temperature: in nats per token, 0..inf; at 0.1 a sample that is 0.23 nats per token likelier
        weighs ten times as much.

    Raises InputError when a sample with an answer has no score.
    """
    valid = [i for i, answer in enumerate(answers) if answer.text is not None]
    if not valid:
        return _none(answers)
    energies = torch.tensor([-_score(answers, i) for i in valid], dtype=torch.float64)
    return _decision(answers, valid, responsibilities(energies, temperature).tolist())


def best_of_n(
    answers: Sequence[Answer], *, scorer: Callable[[Answer], float] | None = None
) -> Decision:
    """The answer of the sample with the highest score.

    scorer: gives the score of an answer, higher is better; None takes the model's likelihood.
    """
    valid = [i for i, answer in enumerate(answers) if answer.text is not None]
    if not valid:
        return _none(answers)
    scores = [_score(answers, i) if scorer is None else scorer(answers[i]) for i in valid]
    for i, score in zip(valid, scores, strict=True):
        if math.isnan(score):
            raise InputError(f"the score of sample {i} is NaN; a scorer returns a number")
    best = scores.index(max(scores))
    weights = [1.0 if i == best else 0.0 for i in range(len(valid))]
    return _decision(answers, valid, weights)


def difficulty_aware(answers: Sequence[Answer], *, settled: float = 2.0) -> Decision:
    """Cold explorers decide easy questions, hot ones hard questions.

    The samples are split at their median heat (amplitude of attention, then temperature). Where
    the support of the colder half's answers is at most `settled`, the question is easy and the
    majority of the colder half decides; else the majority of the hotter half does, if that half
    has an answer. Where all samples are equally hot, the majority of all decides.

    Source: the difficulty-aware aggregation of "Thermometer of Thoughts" (ACL 2026) in spirit:
    higher attention temperatures help on hard problems, lower ones on easy ones. Departure: their
    measure of difficulty is replaced by the support of the cold answers. On the embedded model it
    was right less often than the majority (docs/agents.md).
    """
    order = sorted({(a.heat, a.temperature or 0.0) for a in answers})
    if len(order) < 2:
        return majority(answers)
    heats = sorted((a.heat, a.temperature or 0.0) for a in answers)
    median = heats[(len(heats) - 1) // 2]
    cold = [i for i, a in enumerate(answers) if (a.heat, a.temperature or 0.0) <= median]
    hot = [i for i in range(len(answers)) if i not in cold]
    decisions = []
    for half in (cold, hot):
        decided = majority([answers[i] for i in half])
        index = None if decided.index is None else half[decided.index]
        decisions.append(replace(decided, index=index))
    easy = decisions[0].answer is not None and decisions[0].support <= settled
    first, second = decisions if easy else reversed(decisions)
    return first if first.answer is not None else second


def synthesis(
    answers: Sequence[Answer],
    *,
    ask: Callable[[str], str],
    read: Callable[[str], str | None],
    task: str,
) -> Decision:
    """The model merges the answers into one.

    ask: prompt -> output of the model. read: output -> answer, as a checker does. task: the
    question. The shares are those of the samples; `index` is None where no sample gave the
    model's answer.
    """
    vote = majority(answers)
    if vote.answer is None:
        return _none(answers)
    merged = read(ask(synthesis_prompt(answers, task)))
    index = None
    if merged is not None:
        alike = (i for i, a in enumerate(answers) if a.text == merged or _form(a) == form(merged))
        index = next(alike, None)
    return replace(vote, answer=merged, index=index)


def synthesis_prompt(answers: Sequence[Answer], task: str) -> str:
    """What `synthesis` asks: the question, and each distinct answer with its count."""
    vote = majority(answers)
    lines = [
        f"- {answer} (given {round(share * vote.n)} of {vote.n} times)"
        for answer, share in vote.shares.items()
    ]
    return (
        f"{task}\n\nSeveral attempts gave these answers:\n" + "\n".join(lines) + "\n\nDecide which "
        "answer is right, or give a better one. Answer the question."
    )


def support_so_far(answers: Sequence[Answer]) -> float:
    """Support of the answers with one sample set aside for an answer not yet seen.

    N = exp(-sum_a p_a log p_a),  p = (c_1, .., c_m, 1) / (n + 1), c_a the count of answer a.

    Without the one set aside, a single sample would look settled. Where all n samples agree,
    N is 2.0, 1.75, 1.57 and 1.46 at n = 1, 3, 5 and 7.
    """
    counts = _counts(answers)
    weights = torch.tensor([*counts.values(), 1], dtype=torch.float64)
    return float(support(-weights.log()))


def settled(answers: Sequence[Answer], threshold: float) -> bool:
    """Whether to stop sampling: there is an answer, and `support_so_far` is under the threshold.

    Raises InputError for a threshold that no number of samples gets under.
    """
    if not threshold > 1:
        raise InputError(
            f"a threshold on the support of answers is above 1, got {threshold:g}; 1.5 stops after "
            "6 samples that agree"
        )
    return bool(_counts(answers)) and support_so_far(answers) < threshold


# The aggregators that need nothing but the answers.
AGGREGATORS: dict[str, Aggregator] = {
    "majority": majority,
    "tempered vote": tempered_vote,
    "difficulty-aware": difficulty_aware,
    "best of n": best_of_n,
}


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for answer in answers:
        if (own_form := _form(answer)) is not None:
            counts[own_form] = counts.get(own_form, 0) + 1
    return counts


def _form(answer: Answer) -> str | None:
    """What all spellings of the answer share; None for a sample that abstains."""
    if answer.text is None:
        return None
    return form(answer.text) if answer.form is None else answer.form


def _score(answers: Sequence[Answer], index: int) -> float:
    score = answers[index].score
    if score is None or math.isnan(score):
        raise InputError(
            f"sample {index} has no score; this engine doesn't tell the likelihood of what it "
            "generates: use majority, a scorer of your own, or the engine local"
        )
    return score


def _decision(answers: Sequence[Answer], valid: list[int], weights: Sequence[float]) -> Decision:
    """The answer of the largest share; of equal shares, the answer given first."""
    weight_of: dict[str, float] = {}
    first_spelling: dict[str, str] = {}
    heaviest: dict[str, tuple[float, int]] = {}
    for i, weight in zip(valid, weights, strict=True):
        own_form = str(_form(answers[i]))
        weight_of[own_form] = weight_of.get(own_form, 0.0) + weight
        first_spelling.setdefault(own_form, str(answers[i].text))
        if own_form not in heaviest or weight > heaviest[own_form][0]:
            heaviest[own_form] = (weight, i)
    # Sums of the same weights in another order differ by rounding, which is a tie and no lead:
    # at most 2.2e-16 a sample, so 1e-12 is enough for thousands of samples.
    most = max(weight_of.values())
    winner = next(own_form for own_form, share in weight_of.items() if share >= most * (1 - 1e-12))
    energies = torch.tensor([-math.log(s) if s > 0 else math.inf for s in weight_of.values()])
    ordered = sorted(weight_of.items(), key=lambda item: -item[1])
    index = heaviest[winner][1]
    return Decision(
        answers[index].text,
        index,
        {first_spelling[own_form]: share for own_form, share in ordered},
        float(support(energies.double())),
        len(valid),
        len(answers) - len(valid),
    )
