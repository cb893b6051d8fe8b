"""Checks what an engine does with policies, on made-up logits, against plain Python.

An engine applies policies correctly when `check_engine(run)` returns. Then the temperatures and the
tempered posterior are those of the formulas, in any batch, with its rows in any order, and after
rewinds; and the same random numbers draw the same tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import CheckError
from tempering.tokens.grammar import parse_policy
from tempering.tokens.policy import Policy
from tempering.tokens.settings import RequestSettings
from tempering.tokens.token_state import NOTHING_GIVEN

VOCABULARY = 32
# Energies here reach about 20 and T goes down to 0.2, so that float32 gives exp(-d/T) to about
# 100 * 2^-24 = 6e-6; engines round a few times more.
_ROUNDING = 2e-5
_NEAR = 1e-3  # near a boundary of two tokens either may be drawn: 32 such roundings
OPEN, CLOSE = 3, 4  # the ids that open and close the phase of `POLICY_TEXTS`

POLICY_TEXTS = (
    "constant(1)",
    "constant(0.7)",
    "constant(0)",
    "constant(inf)",
    "schedule(linear(2,0.5), length=6)",
    f"phases(thinking=between(1.3, ids({OPEN}), ids({CLOSE})), answer=0.2)",
    f"phases(thinking=between(schedule(linear(2,1), length=4), ids({OPEN})), answer=0)",
    "support(5)",
    "support(throb(9,2,9), length=6)|clip(0.3,2)",
    "entropy(T0=1.2, theta=0.5)",
    "dynatemp(0.5, exponent=2, temperature=0.8)",
    "ladder(0.5,2, n=3)|room(0.5)",
    "constant(1e39)",
    "sampler(T=0.8, top_p=0.7, top_k=9, min_p=0.02)",
    f"phases(thinking=between(sampler(T=1.2, top_p=0.8), ids({OPEN}), ids({CLOSE})), "
    "answer=sampler(T=0.4, min_p=0.05))",
    "sampler(top_k=6)",
    "sampler(T=1.5, top_p=0.8)|order(min_p, top_k, top_p, temperature)",
    "sampler(T=support(3), top_p=0.95)|order(top_p, temperature)",
    "sampler(T=inf, top_p=0.5)",
    "constant(0.6)|loops(heat=2, ngram=1, window=4)",
    "constant(1.5)|after(ids(9), 2, 0.4)",
    f"phases(thinking=between(1.2, ids({OPEN}), ids({CLOSE})), answer=0.3)|budget(thinking=3)",
    f"phases(thinking=between(1.2, ids({OPEN}), ids({CLOSE})), answer=0.3)|budget(thinking=6)",
)
BUDGETS = {POLICY_TEXTS[21]: 3, POLICY_TEXTS[22]: 6}
# The settings of the requests that a policy is checked with, where they have any.
GIVEN = {
    POLICY_TEXTS[14]: RequestSettings(top_k=7),
    POLICY_TEXTS[15]: RequestSettings(temperature=0.7, top_p=0.9, min_p=0.1),
    POLICY_TEXTS[16]: RequestSettings(top_k=5, min_p=0.02),
}


@dataclass(frozen=True)
class Request:
    """One row: the token ids so far, which sample of its prompt it is, and its own settings."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    sample: int = 0
    given: RequestSettings = NOTHING_GIVEN


# run(policy, requests, logits [batch, vocab]) -> what the engine samples from, as logits
Run = Callable[[Policy, Sequence[Request], Tensor], Tensor]


def made_logits(requests: Sequence[Request]) -> Float[Tensor, "batch vocab"]:
    """Logits of each request, drawn from its tokens as a seed; one token of each row is masked."""
    rows = []
    for request in requests:
        draw = random.Random(repr((request.prompt, request.generated)))
        row = [draw.gauss(0, 3) for _ in range(VOCABULARY)]
        row[draw.randrange(VOCABULARY)] = -math.inf
        share = draw.random()
        if share < 0.3:  # two tokens tie for the maximum
            first, second = draw.sample(range(VOCABULARY), 2)
            row[first] = row[second] = max(row) + 1
        elif share < 0.45:  # one is forced, as vLLM's thinking budget forces it
            row[draw.randrange(VOCABULARY)] = 1e9
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


def check_engine(run: Run, *, samples: bool = True) -> int:
    """Check an engine against the contract of policies.

    Parameters
    ----------
    run: `run(policy, requests, logits) -> Tensor [batch, vocab]`, the logits (or log
        probabilities) that the engine would sample from, truncated where the policy `truncates`:
        by it, and by the settings `given` of each request.
    samples: whether the engine knows which of n samples a request is; if not, `ladder` is left out.

    Returns
    -------
    The number of rows that were checked.

    Raises
    ------
    CheckError: names policy, request, and both values.
    """
    checked = 0
    for text in POLICY_TEXTS:
        policy = parse_policy(text)
        if policy.samples is not None and not samples:
            continue
        requests = _requests(policy.samples or 1, GIVEN.get(text, NOTHING_GIVEN))
        batches = [*requests, requests[2], requests[0]]  # the last two are rewinds
        for batch in batches:
            if policy.samples is None:
                batch = batch[::-1]  # as beams do: the same histories in other rows
            logits = made_logits(batch)
            given = run(policy, batch, logits).double().softmax(-1)
            for row, request in enumerate(batch):
                _check_row(text, request, logits[row].tolist(), given[row].tolist())
                checked += 1
    return checked


def _requests(samples: int, given: RequestSettings) -> list[list[Request]]:
    """Batches that grow token by token; one of the two prompts opens a phase, replies reopen it."""
    prompts = [(1, OPEN, 9), (2, 6, 7)] if samples == 1 else [(2, 6, 7)]
    tokens = [(8, CLOSE, 5, OPEN, 9, 7), (OPEN, 9, 9, CLOSE, 8, 5)]
    return [
        [
            Request(prompt, tokens[index][:length], sample, given)
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        for length in range(7)
    ]


def _check_row(text: str, request: Request, logits: list[float], given: list[float]) -> None:
    temperature, expected = reference_row(text, request, logits)
    gap = max(abs(a - b) for a, b in zip(expected, given))
    if not gap <= _ROUNDING:
        raise CheckError(
            f"{text}, request {request}: the posterior differs by {gap:.3g} from that at "
            f"T = {temperature:g}; largest probability {max(given):.6f}, "
            f"expected {max(expected):.6f}"
        )
    draw = random.Random(repr(request)).random()
    token, expected_token = _drawn(given, draw), _drawn(expected, draw)
    if token is not None and expected_token is not None and token != expected_token:
        raise CheckError(
            f"{text}, request {request}: the random number {draw:.6f} draws token {token}, "
            f"expected {expected_token}"
        )


def _drawn(probabilities: list[float], draw: float) -> int | None:
    """The token that a number in [0, 1) draws; None within rounding of a boundary."""
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if abs(draw - total) < _NEAR and probability:
            return None
        if draw < total:
            return token
    return None


def reference_posterior(logits: Sequence[float], temperature: float | int) -> list[float]:
    """softmax(l/T) in plain Python floats, with both limits."""
    weights = _weights(logits, temperature)
    total = sum(weights)
    return [weight / total for weight in weights]


def _weights(logits: Sequence[float], temperature: float | int) -> list[float]:
    """exp((l - max l)/T): the largest is 1."""
    top = max(logits)
    if temperature == 0:
        return [float(value == top) for value in logits]
    if temperature == math.inf:
        return [float(value > -math.inf) for value in logits]
    return [math.exp((value - top) / temperature) for value in logits]


def reference_entropy(logits: Sequence[float], temperature: float | int = 1.0) -> float:
    """-sum r log r in nats, over the unmasked tokens.

    With weights w and their sum Z it is sum w (log Z - log w) / Z. Z - 1 is summed by itself: near
    certainty, log r of the likeliest token would be lost in the rounding of r.
    """
    weights = sorted(_weights(logits, temperature))
    rest = sum(weights[:-1])
    log_total = math.log1p(rest)
    return sum(w * (log_total - math.log(w)) for w in weights if w > 0) / (1 + rest)


def reference_support(logits: Sequence[float], target: float | int) -> float:
    """T with exp(S(T)) = target, by bisection in log T; 0 or inf where it can't be had."""
    unmasked, ties = (sum(v > -math.inf for v in logits), sum(v == max(logits) for v in logits))
    if target <= ties:
        return 0.0
    if target >= unmasked:
        return math.inf
    low, high = -40.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        hot = reference_entropy(logits, math.exp(middle)) > math.log(target)
        low, high = (low, middle) if hot else (middle, high)
    return math.exp(low)


def reference_row(text: str, request: Request, logits: list[float]) -> tuple[float, list[float]]:
    """T and the posterior of a request, with the truncations of its policy in their order."""
    if text in BUDGETS and _left(text, request) == 0:
        return 1.0, [float(token == CLOSE) for token in range(len(logits))]
    cuts, order = reference_cuts(text, request)
    temperature: float | None = None
    for name in order:
        if name == "temperature":
            temperature = reference_temperature(text, request, logits)
        elif name in cuts:
            logits = reference_kept(name, cuts[name], logits, temperature)
    if temperature is None:
        raise CheckError(f"{text}: no temperature in {order}")
    return temperature, reference_posterior(logits, temperature)


def reference_cuts(text: str, request: Request) -> tuple[dict[str, float | int], tuple[str, ...]]:
    """The truncations of a request under one of `POLICY_TEXTS`, and the order."""
    order: tuple[str, ...] = ("temperature", "min_p", "top_k", "top_p")
    thinking, _ = _phase(request)
    own: dict[str, tuple[dict[str, float | int], tuple[str, ...]]] = {
        POLICY_TEXTS[13]: ({"top_p": 0.7, "top_k": 9, "min_p": 0.02}, order),
        POLICY_TEXTS[14]: (
            {"top_k": 7, "top_p": 0.8} if thinking else {"top_k": 7, "min_p": 0.05},
            order,
        ),
        POLICY_TEXTS[15]: ({"top_k": 6, "top_p": 0.9, "min_p": 0.1}, order),
        POLICY_TEXTS[16]: (
            {"top_p": 0.8, "top_k": 5, "min_p": 0.02},
            ("min_p", "top_k", "top_p", "temperature"),
        ),
        POLICY_TEXTS[17]: ({"top_p": 0.95}, ("top_p", "temperature")),
        POLICY_TEXTS[18]: ({"top_p": 0.5}, order),
    }
    return own.get(text, ({}, order))


def reference_kept(
    name: str, value: float | int, logits: Sequence[float], temperature: float | None
) -> list[float]:
    """The logits that a truncation keeps, -inf for the others; tokens that tie share their fate."""
    weights = reference_posterior(logits, 1.0 if temperature is None else temperature)
    keep = []
    for own, weight in zip(logits, weights):
        likelier = [w for other, w in zip(logits, weights) if other > own]
        if name == "top_k":
            keep.append(len(likelier) < value)
        elif name == "top_p":
            keep.append(sum(likelier) < value)
        else:
            keep.append(weight >= value * max(weights))
    return [each if kept else -math.inf for each, kept in zip(logits, keep)]


def reference_temperature(text: str, request: Request, logits: list[float]) -> float:
    """T of a request under one of `POLICY_TEXTS`; each formula is written out by hand."""
    if sum(value >= max(logits) - 104 for value in logits) == 1:  # a certain token stays certain
        return 1.0
    position = len(request.generated)
    entropy = reference_entropy(logits)
    unmasked = sum(value > -math.inf for value in logits)
    share = min(position, 5) / 5
    phase, _ = _phase(request)
    written = request.generated
    loops = bool(written) and written[-1] in written[-4:-1]
    left = _left(text, request) if text in BUDGETS else None
    unclosed, unclosed_spent = _phase(request, closes=False)
    values: dict[str, Callable[[], float]] = {
        POLICY_TEXTS[0]: lambda: 1.0,
        POLICY_TEXTS[1]: lambda: 0.7,
        POLICY_TEXTS[2]: lambda: 0.0,
        POLICY_TEXTS[3]: lambda: math.inf,
        POLICY_TEXTS[4]: lambda: 2 - 1.5 * share,
        POLICY_TEXTS[5]: lambda: 1.3 if phase else 0.2,
        POLICY_TEXTS[6]: lambda: 2 - min(unclosed_spent, 3) / 3 if unclosed else 0.0,
        POLICY_TEXTS[7]: lambda: reference_support(logits, 5),
        POLICY_TEXTS[8]: lambda: min(
            max(reference_support(logits, _throb(share)), 0.3),
            2.0,
        ),
        POLICY_TEXTS[9]: lambda: 1.2 * 0.8 ** (0.5 / entropy),
        POLICY_TEXTS[10]: lambda: 0.3 + 1.0 * (entropy / math.log(unmasked)) ** 2,
        POLICY_TEXTS[11]: lambda: math.sqrt(0.5 * 4 ** (request.sample / 2)),
        POLICY_TEXTS[12]: lambda: math.inf,
        POLICY_TEXTS[13]: lambda: 0.8,
        POLICY_TEXTS[14]: lambda: 1.2 if phase else 0.4,
        POLICY_TEXTS[15]: lambda: 0.7,
        POLICY_TEXTS[16]: lambda: 1.5,
        POLICY_TEXTS[17]: lambda: reference_support(logits, 3),
        POLICY_TEXTS[18]: lambda: math.inf,
        POLICY_TEXTS[19]: lambda: 1.2 if loops else 0.6,
        POLICY_TEXTS[20]: lambda: 0.4 if written.count(9) >= 2 else 1.5,
        POLICY_TEXTS[21]: lambda: 0.3 if left is None else 1.2 * min(1.0, 4 * left / 2),
        POLICY_TEXTS[22]: lambda: 0.3 if left is None else 1.2 * min(1.0, 4 * left / 5),
    }
    return values[text]()


def _left(text: str, request: Request) -> int | None:
    """Tokens of a budget before its closing tag of one token; None outside the phase."""
    inside, spent = _phase(request)
    return max(0, BUDGETS[text] - 1 - spent) if inside else None


def _throb(share: float) -> float:
    """9 -> 2 -> 9, geometric between."""
    return 9 * (2 / 9) ** (2 * share) if share <= 0.5 else 2 * (9 / 2) ** (2 * share - 1)


def _phase(request: Request, closes: bool = True) -> tuple[bool, int]:
    """(whether the phase is open, tokens generated in it), by reading the ids."""
    inside, spent = False, 0
    ids: list[tuple[int, Any]] = [(token, False) for token in request.prompt]
    ids += [(token, True) for token in request.generated]
    for token, generated in ids:
        spent += inside and generated
        inside = (inside or token == OPEN) and not (closes and token == CLOSE)
    return inside, spent
