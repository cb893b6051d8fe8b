"""Ways to spend k samples of one question: one temperature, a ladder of them, attention, or both.

    sampling ladder    T_s = a (b/a)^(s/(k-1))                 s = 0..k-1
    attention ladder   amplitude A^(s/(k-1)) of a pattern over depth, or uniform temperatures
                       A^(2s/(k-1) - 1), from 1/A to A
    both               sample s has rung s of one and rung (m s mod k) of the other

The order of the samples spreads the first few of them over the whole ladder, since an early stop
may leave no more than these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tempering.errors import InputError, TemperatureError
from tempering.schedules import as_schedule

UNIFORM = "uniform"


@dataclass(frozen=True)
class Rung:
    """What one sample runs at: a sampling temperature, and a pattern over depth or None.

    heat: of attention, 1 for the model's own, above 1 hotter. token_policy: text of a policy of the
    sampling temperature by token, beside a temperature of 1; or None.
    """

    temperature: float
    attention: str | None = None
    heat: float = 1.0
    token_policy: str | None = None


@dataclass(frozen=True)
class Strategy:
    """A named way to spend k samples; rung i is that of sample i."""

    name: str
    rungs: tuple[Rung, ...]


def strategies(
    k: int,
    *,
    temperature: float,
    ladder: tuple[float, float],
    attention: str = UNIFORM,
    amplitude: float = 1.0,
) -> list[Strategy]:
    """Single temperature, ladder, attention ladder, and both, each with k samples.

    Parameters
    ----------
    temperature: of the single one, and of the attention ladder's sampling.
    ladder: coldest and hottest sampling temperature.
    attention: a pattern over depth, whose amplitude is the ladder, or "uniform".
    amplitude: of the attention's hottest rung; 1 leaves the two attention strategies out.
    """
    if k < 2:
        raise InputError(f"a ladder needs at least 2 samples, not {k}")
    low, high = ladder
    for value in (temperature, low, high):
        if not 0 < value < math.inf:
            raise TemperatureError(
                f"a rung is a temperature above 0 and finite, got {value:g}; for the likeliest "
                "answer alone one sample is enough"
            )
    if low > high:
        raise InputError(f"a ladder goes from cold to hot, got {low:g} to {high:g}")
    order = spread_order(k)
    steps = [low * (high / low) ** (s / (k - 1)) for s in range(k)]
    found = [
        Strategy(f"single T {temperature:g}", (Rung(temperature),) * k),
        Strategy(f"ladder T {low:g} to {high:g}", tuple(Rung(steps[s]) for s in order)),
    ]
    if amplitude == 1:
        return found
    heats = attention_rungs(k, attention, amplitude)
    other = pairing_order(k)
    return [
        *found,
        Strategy(
            f"attention {attention} to {amplitude:g}",
            tuple(Rung(temperature, *heats[s]) for s in order),
        ),
        Strategy("both", tuple(Rung(steps[s], *heats[other[s]]) for s in order)),
    ]


def attention_rungs(k: int, attention: str, amplitude: float) -> list[tuple[str | None, float]]:
    """(pattern over depth or None, heat) of k rungs, coldest first."""
    if not 1 < amplitude < math.inf:
        raise InputError(f"an attention ladder needs an amplitude above 1, got {amplitude:g}")
    found: list[tuple[str | None, float]] = []
    for s in range(k):
        u = s / (k - 1)
        heat = amplitude ** (2 * u - 1) if attention == UNIFORM else amplitude**u
        if abs(math.log(heat)) < 1e-12:  # the model's own, but for the rounding of the power
            found.append((None, 1.0))
        elif attention == UNIFORM:
            found.append((f"constant({heat!r})", heat))
        else:
            found.append((str(as_schedule(attention).amplitude(heat)), heat))
    return found


def spread_order(k: int) -> list[int]:
    """The rungs in an order of which every beginning is spread over the ladder.

    s_i = rank of frac(i phi) among i = 0..k-1, phi the golden section: each multiple of phi falls
    into one of the largest gaps between the multiples before it (three-distance theorem).
    """
    golden = (math.sqrt(5) - 1) / 2
    order = sorted(range(k), key=lambda i: i * golden % 1)
    return [order.index(i) for i in range(k)]


def pairing_order(k: int) -> list[int]:
    """The pairing s -> m s mod k that is least correlated with s, over m coprime to k."""
    options = [[s * m % k for s in range(k)] for m in range(1, k) if math.gcd(m, k) == 1]
    return min(options, key=lambda pairing: abs(_correlation(pairing)))


def _correlation(pairing: Sequence[int]) -> float:
    middle = (len(pairing) - 1) / 2
    variance = sum((s - middle) ** 2 for s in range(len(pairing)))
    return sum((s - middle) * (t - middle) for s, t in enumerate(pairing)) / variance
