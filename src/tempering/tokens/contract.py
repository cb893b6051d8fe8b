"""What every engine must do with a policy, checked on recorded logits against plain Python.

An engine is adapted when `check_engine(run)` returns: the temperatures and the tempered posterior
are those of the formulas, whatever the batch, the order of its rows, and rewinds; and from the
same random numbers it draws the same tokens.
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

VOCABULARY = 32
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
)


@dataclass(frozen=True)
class Request:
    """One row: the token ids so far, and which sample of its prompt it is."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    sample: int = 0


# run(policy, requests, logits [batch, vocab]) -> what the engine samples from, as logits
Run = Callable[[Policy, Sequence[Request], Tensor], Tensor]


def recorded(requests: Sequence[Request]) -> Float[Tensor, "batch vocab"]:
    """Logits of each request: a function of its tokens, as a model's are; some are masked."""
    rows = []
    for request in requests:
        draw = random.Random(repr((request.prompt, request.generated)))
        row = [draw.gauss(0, 3) for _ in range(VOCABULARY)]
        row[draw.randrange(VOCABULARY)] = -math.inf
        kind = draw.random()
        if kind < 0.3:  # two tokens tie for the maximum
            first, second = draw.sample(range(VOCABULARY), 2)
            row[first] = row[second] = max(row) + 1
        elif kind < 0.45:  # one is forced, as by vLLM's thinking budget
            row[draw.randrange(VOCABULARY)] = 1e9
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


def check_engine(run: Run, *, samples: bool = True) -> int:
    """Check an engine against the contract of policies.

    Parameters
    ----------
    run: `run(policy, requests, logits) -> Tensor [batch, vocab]`, the logits (or log
        probabilities) that the engine would sample from, before any top-k.
    samples: whether the engine knows which of n samples a request is; without it no ladder.

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
        requests = _requests(policy.samples or 1)
        batches = [*requests, requests[2], requests[0]]  # the last two go back
        for batch in batches:
            if policy.samples is None:
                batch = batch[::-1]  # beams: the same histories at other rows
            logits = recorded(batch)
            got = run(policy, batch, logits).double().softmax(-1)
            for row, request in enumerate(batch):
                _check_row(text, request, logits[row].tolist(), got[row].tolist())
                checked += 1
    return checked


def _requests(samples: int) -> list[list[Request]]:
    """Batches that grow token by token: two prompts, phases opened in one, closed and reopened."""
    prompts = [(1, OPEN, 9), (2, 6, 7)] if samples == 1 else [(2, 6, 7)]
    tokens = [(8, CLOSE, 5, OPEN, 9, 7), (OPEN, 9, 9, CLOSE, 8, 5)]
    return [
        [
            Request(prompt, tokens[place][:length], sample)
            for place, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        for length in range(7)
    ]


def _check_row(text: str, request: Request, logits: list[float], got: list[float]) -> None:
    temperature = reference_temperature(text, request, logits)
    wanted = reference_posterior(logits, temperature)
    gap = max(abs(a - b) for a, b in zip(wanted, got))
    if not gap <= 2e-5:
        raise CheckError(
            f"{text}, request {request}: the posterior differs by {gap:.3g} from that at "
            f"T = {temperature:g}; largest probability {max(got):.6f}, expected {max(wanted):.6f}"
        )
    draw = random.Random(repr(request)).random()
    if (mine := _drawn(wanted, draw)) is not None and _drawn(got, draw) not in (mine, None):
        raise CheckError(
            f"{text}, request {request}: from the random number {draw:.6f} it draws token "
            f"{_drawn(got, draw)}, expected {mine}"
        )


def _drawn(probabilities: list[float], draw: float) -> int | None:
    """The token that a number in [0, 1) draws; None within rounding of a boundary."""
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if abs(draw - total) < 1e-3 and probability:
            return None
        if draw < total:
            return token
    return None


def reference_posterior(logits: Sequence[float], temperature: float | int) -> list[float]:
    """softmax(l/T) in plain Python floats, with both limits."""
    top = max(logits)
    if temperature == 0:
        weights = [float(value == top) for value in logits]
    elif temperature == math.inf:
        weights = [float(value > -math.inf) for value in logits]
    else:
        weights = [math.exp((value - top) / temperature) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def reference_entropy(logits: Sequence[float], temperature: float | int = 1.0) -> float:
    """-sum r log r in nats, over the unmasked tokens."""
    posterior = reference_posterior(logits, temperature)
    return -sum(r * math.log(r) for r in posterior if r > 0)


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


def reference_temperature(text: str, request: Request, logits: list[float]) -> float:
    """T of a request under one of `POLICY_TEXTS`, written out by hand for each."""
    if sum(value >= max(logits) - 104 for value in logits) == 1:  # p = 1 stays p = 1
        return 1.0
    place = len(request.generated)
    entropy = reference_entropy(logits)
    unmasked = sum(value > -math.inf for value in logits)
    share = min(place, 5) / 5
    phase, _ = _phase(request)
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
    }
    return values[text]()


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
