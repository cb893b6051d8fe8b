"""Temperatures that depend on the query: support or entropy held, and the rules of two papers.

A rule reads the logits of one query, as the profile's temperature left them, and answers with
one more inverse temperature beta for that query; its softmax becomes softmax(beta * logits):

    support(N)         the T with exp(S) = N: N keys stay alive for every query
    entropy(S)         the same in nats
    polynomial(c..)    beta = max(1, c_k S^k + .. + c_0) where the entropy S > 0.5, else 1
    log_length(n)      beta = max(1, log(keys seen) / log n)

A held level that no temperature reaches (three keys can't have a support of 12) is held at the
nearest that the rule's bounds allow: T goes to the bound, and such queries are counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.limits import COLDEST, HOTTEST
from tempering.errors import ProfileError
from tempering.posterior import entropy, temperature_for

# Velickovic et al., "Softmax is not enough (for sharp size generalisation)", 2024, figure 4:
# fitted by them to a head that finds a maximum; entropies up to 0.5 nats are left alone.
PAPER = (-0.037, 0.481, -2.3, 4.917, -1.791)
PAPER_FLOOR = 0.5


@dataclass(frozen=True)
class Held:
    """Support or entropy held at a level, by temperatures within bounds.

    kind: "support" (level in keys) or "entropy" (level in nats). coldest, hottest: bounds of T.
    """

    kind: str
    level: float
    coldest: float = COLDEST
    hottest: float = HOTTEST

    def __post_init__(self) -> None:
        lowest = 1.0 if self.kind == "support" else 0.0
        if not (math.isfinite(self.level) and self.level >= lowest):
            raise ProfileError(
                f"{self.kind}({self.level:g}): a held {self.kind} is at least {lowest:g}"
            )
        if not COLDEST <= self.coldest <= self.hottest <= HOTTEST:
            raise ProfileError(
                f"{self.kind}({self.level:g}): bounds of T lie in {COLDEST:g} to {HOTTEST:g}, the "
                f"colder one first; not {self.coldest:g}, {self.hottest:g}"
            )

    def __str__(self) -> str:
        level = _number(self.level)
        if (self.coldest, self.hottest) == (COLDEST, HOTTEST):
            return f"{self.kind}({level})"
        return f"{self.kind}({level},{_number(self.coldest)},{_number(self.hottest)})"

    @property
    def entropy(self) -> float:
        """The level in nats."""
        return math.log(self.level) if self.kind == "support" else self.level

    def beta(self, logits: Float[Tensor, "rows keys"]) -> tuple[Tensor, Tensor, Tensor]:
        """beta of each row, and which rows stand at the cold and at the hot bound.

        Hidden logits are -inf. Where no temperature changes anything (one key, or equal logits),
        beta is 1.
        """
        seen = torch.isfinite(logits)
        top = logits.detach().amax(-1)
        bottom = logits.detach().masked_fill(~seen, math.inf).amin(-1)
        free = (seen.any(-1) & (top > bottom)).nonzero().flatten()
        energies = -logits[free]
        with torch.no_grad():
            cold = entropy(energies, self.coldest) >= self.entropy
            hot = (entropy(energies, self.hottest) <= self.entropy) & ~cold
        temperature = energies.new_full((len(free),), self.coldest)
        temperature[hot] = self.hottest
        inner = (~cold & ~hot).nonzero().flatten()
        if len(inner):
            solved = temperature_for(energies[inner], math.exp(self.entropy))
            temperature = temperature.index_put(
                (inner,), solved.clamp(self.coldest, self.hottest).to(temperature)
            )
        beta = logits.new_ones(len(logits)).index_put((free,), temperature.reciprocal())
        ends = [logits.new_zeros(len(logits), dtype=torch.bool) for _ in range(2)]
        ends[0][free], ends[1][free] = cold, hot
        return beta, ends[0], ends[1]


@dataclass(frozen=True)
class Polynomial:
    """beta = max(1, polynomial in the query's entropy) where that exceeds 0.5 nats, else 1.

    coefficients: of the highest power first. Source: Velickovic et al., 2024, figure 4.
    """

    coefficients: tuple[float, ...] = PAPER

    def __post_init__(self) -> None:
        if not self.coefficients or not all(math.isfinite(c) for c in self.coefficients):
            raise ProfileError("polynomial(..): give finite coefficients, the highest power first")

    def __str__(self) -> str:
        return f"polynomial({','.join(map(_number, self.coefficients))})"

    def beta(self, logits: Float[Tensor, "rows keys"]) -> tuple[Tensor, Tensor, Tensor]:
        """beta of each row, and which rows stand at the cold and at the hot bound."""
        alive = torch.isfinite(logits).any(-1, keepdim=True)
        found = entropy(-torch.where(alive, logits, torch.zeros_like(logits)))
        value = torch.zeros_like(found)
        for coefficient in self.coefficients:
            value = value * found + coefficient
        value = torch.where(found > PAPER_FLOOR, value.clamp(min=1.0), torch.ones_like(value))
        cold = value > 1 / COLDEST
        return value.clamp(max=1 / COLDEST), cold, torch.zeros_like(cold)


@dataclass(frozen=True)
class LogLength:
    """beta = max(1, log(keys seen) / log(trained)): sharper beyond the length of training.

    trained: tokens, at least 2. Source: Su Jianlin, "Attention's scale from entropy invariance"
    (2021); Nakanishi, "Scalable-softmax is superior for attention" (2025). Here relative to the
    model's own temperature, and never hotter than that.
    """

    trained: int

    def __post_init__(self) -> None:
        if not self.trained >= 2:
            raise ProfileError(f"log_length({self.trained}): the trained length is at least 2")

    def __str__(self) -> str:
        return f"log_length({self.trained})"

    def of_counts(self, seen: Int[Tensor, "*queries"]) -> Float[Tensor, "*queries"]:
        """beta for queries that see so many keys."""
        return (seen.clamp(min=1).double().log() / math.log(self.trained)).clamp(min=1.0)


Rule = Held | Polynomial | LogLength


def rule(text: str) -> Rule:
    """Parse one rule, e.g. "support(8)", "entropy(2,0.5,2)", "polynomial()", "log_length(2048)".

    Raises ProfileError that says what was expected.
    """
    name, arguments = split(text)
    return _BUILD[name](name, [_value(item, text) for item in arguments])


def is_rule(text: str) -> bool:
    """Whether a text names a rule rather than a pattern of temperatures."""
    found = re.match(r"\s*(\w+)\s*\(", text)
    return found is not None and found[1] in _BUILD


def split(text: str) -> tuple[str, list[str]]:
    """Name and arguments of a rule's text, split at the outermost commas."""
    found = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, flags=re.DOTALL)
    if found is None or found[1] not in _BUILD:
        raise ProfileError(f"'{text}' is no rule; rules are {', '.join(FORMS)}")
    parts, depth = [""], 0
    for letter in found[2]:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0:
        raise ProfileError(f"'{text}': its brackets don't match")
    return found[1], [part.strip() for part in parts] if found[2].strip() else []


FORMS = (
    "support(keys)",
    "support(keys,coldest,hottest)",
    "entropy(nats)",
    "entropy(nats,coldest,hottest)",
    "polynomial()",
    "polynomial(c4,c3,c2,c1,c0)",
    "log_length(tokens)",
)


def _held(name: str, values: list[float]) -> Rule:
    if len(values) not in (1, 3):
        raise ProfileError(f"{name}(..) takes a level, or a level and two bounds of T")
    return Held(name, *values)


def _polynomial(name: str, values: list[float]) -> Rule:
    return Polynomial(tuple(values)) if values else Polynomial()


def _log_length(name: str, values: list[float]) -> Rule:
    if len(values) != 1 or values[0] != int(values[0]):
        raise ProfileError(
            "log_length(..) takes one whole number, the length of training in tokens"
        )
    return LogLength(int(values[0]))


_BUILD: dict[str, Callable[[str, list[float]], Rule]] = {
    "support": _held,
    "entropy": _held,
    "polynomial": _polynomial,
    "log_length": _log_length,
}


def _value(item: str, text: str) -> float:
    try:
        value = float(item)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ProfileError(f"'{text}': '{item}' is no number; rules are {', '.join(FORMS)}")
    return value


def _number(value: float) -> str:
    """The shortest text that reads back as the same number."""
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def check_rules(rules: Sequence[str | None], rows: int) -> None:
    """ProfileError unless there is a rule, or None, for each of so many rows."""
    if len(rules) != rows:
        raise ProfileError(
            f"{len(rules)} rules were given for {rows} layers; give one, or None, each"
        )
    for text in rules:
        if text is not None:
            rule(text)
