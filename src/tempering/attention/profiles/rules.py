"""Temperatures that depend on the query: support or entropy held, and the rules of two papers.

A rule reads the logits of one query, as the profile's temperature left them, and answers with
one more inverse temperature beta for that query; its softmax becomes softmax(beta * logits):

    support(N)         the T with exp(S) = N: N keys stay alive for every query
    entropy(S)         the same in nats
    polynomial(c..)    beta = max(1, c_k S^k + .. + c_0) where the entropy S > 0.5, else 1
    log_length(n)      beta = max(1, log(keys seen) / log n)
    root_log_length(n) beta = sqrt(log(keys seen) / log n)

A held level that no temperature reaches (three keys can't have a support of 12) is held at the
nearest that the rule's bounds allow: T goes to the bound, and such queries are counted.

A new rule is a class of this file: its `name`, its fields and what it answers are all that the
text form, profiles and attention need.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.limits import COLDEST, HOTTEST
from tempering.binding import bind, number_arguments
from tempering.calls import Argument, CallNode, Grammar, call_text, number_text
from tempering.errors import ProfileError
from tempering.posterior import entropy, temperature_for

# Velickovic et al., "Softmax is not enough (for sharp size generalisation)", 2024, figure 4:
# fitted by them to a head that finds a maximum; entropies up to 0.5 nats are left alone.
PAPER = (-0.037, 0.481, -2.3, 4.917, -1.791)
PAPER_FLOOR = 0.5


GRAMMAR = Grammar("rule", ProfileError)
KNOWN: dict[str, type[Rule]] = {}  # name in the text form -> class, in order of definition
_READERS = {"float": Argument.number, "int": Argument.whole}


class Rule(ABC):
    """One more inverse temperature for every query. Immutable; rules of equal text are equal.

    A rule reads the logits of a query (`beta`), or how many keys it sees (`of_counts`) where it
    `counts_keys`.
    """

    name: ClassVar[str]
    signature: ClassVar[str]
    counts_keys: ClassVar[bool] = False

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "name" in cls.__dict__:
            KNOWN[cls.name] = cls

    @classmethod
    def of(cls, call: CallNode) -> Rule:
        """The rule of this kind that a call makes."""
        bound = bind(call, cls, _READERS)
        return call.made(lambda: cls(*bound))

    def beta(self, logits: Float[Tensor, "rows keys"]) -> tuple[Tensor, Tensor, Tensor]:
        """beta of each row, and which rows stand at the cold and at the hot bound.

        Hidden logits are -inf.
        """
        raise NotImplementedError(f"{self} reads no logits")

    def of_counts(self, seen: Int[Tensor, "*queries"]) -> Float[Tensor, "*queries"]:
        """beta for queries that see so many keys."""
        raise NotImplementedError(f"{self} counts no keys")

    @abstractmethod
    def __str__(self) -> str:
        """The text form; `rule` reads it back as an equal rule."""


@dataclass(frozen=True)
class Held(Rule):
    """Support or entropy held at a level, by temperatures within bounds.

    level: in keys or in nats. coldest, hottest: bounds of T.
    """

    least: ClassVar[float]

    level: float
    coldest: float = COLDEST
    hottest: float = HOTTEST

    def __post_init__(self) -> None:
        if not self.least <= self.level < math.inf:
            raise ProfileError(
                f"{self.name}({number_text(self.level)}): a held {self.name} is finite and "
                f"at least {number_text(self.least)}"
            )
        if not COLDEST <= self.coldest <= self.hottest <= HOTTEST:
            raise ProfileError(
                f"{self.name}({number_text(self.level)}): bounds of T lie in {COLDEST:g} to "
                f"{HOTTEST:g}, the colder one first; not {self.coldest:g}, {self.hottest:g}"
            )

    @classmethod
    def of(cls, call: CallNode) -> Rule:
        if len(call.arguments) == 2 and call.arguments[1].keyword is None:
            raise call.arguments[1].complaint(
                f"{cls.signature} takes a level, or a level and two bounds of T; a bound alone is "
                "named: hottest=2"
            )
        return super().of(call)

    def __str__(self) -> str:
        if (self.coldest, self.hottest) == (COLDEST, HOTTEST):
            return call_text(self.name, self.level)
        return call_text(self.name, self.level, self.coldest, self.hottest)

    @property
    @abstractmethod
    def entropy(self) -> float:
        """The level in nats."""

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


class Support(Held):
    """`Held` at a number of live keys, 1 or more."""

    name, signature, least = "support", "support(level, coldest, hottest)", 1.0

    @property
    def entropy(self) -> float:
        return math.log(self.level)


class Entropy(Held):
    """`Held` at an entropy in nats, 0 or more."""

    name, signature, least = "entropy", "entropy(level, coldest, hottest)", 0.0

    @property
    def entropy(self) -> float:
        return self.level


@dataclass(frozen=True)
class Polynomial(Rule):
    """beta = max(1, polynomial in the query's entropy) where that exceeds 0.5 nats, else 1.

    coefficients: of the highest power first. Source: Velickovic et al., 2024, figure 4.
    """

    name, signature = "polynomial", "polynomial(c4, c3, c2, c1, c0)"

    coefficients: tuple[float, ...] = PAPER

    def __post_init__(self) -> None:
        if not self.coefficients or not all(math.isfinite(c) for c in self.coefficients):
            raise ProfileError("polynomial(..): give finite coefficients, the highest power first")

    @classmethod
    def of(cls, call: CallNode) -> Rule:
        given = number_arguments(call, cls.signature)
        return call.made(lambda: cls(given) if given else cls())

    def __str__(self) -> str:
        return call_text(self.name, *self.coefficients)

    def beta(self, logits: Float[Tensor, "rows keys"]) -> tuple[Tensor, Tensor, Tensor]:
        alive = torch.isfinite(logits).any(-1, keepdim=True)
        found = entropy(-torch.where(alive, logits, torch.zeros_like(logits)))
        value = torch.zeros_like(found)
        for coefficient in self.coefficients:
            value = value * found + coefficient
        value = torch.where(found > PAPER_FLOOR, value.clamp(min=1.0), torch.ones_like(value))
        cold = value > 1 / COLDEST
        return value.clamp(max=1 / COLDEST), cold, torch.zeros_like(cold)


@dataclass(frozen=True)
class LogLength(Rule):
    """beta = max(1, log(keys seen) / log(trained)): sharper beyond the length of training.

    trained: tokens, at least 2. Source: Su Jianlin, "Attention's scale from entropy invariance"
    (2021); Nakanishi, "Scalable-softmax is superior for attention" (2025). Here relative to the
    model's own temperature, and never hotter than that.
    """

    name, signature, counts_keys = "log_length", "log_length(trained)", True

    trained: int

    def __post_init__(self) -> None:
        if not self.trained >= 2:
            raise ProfileError(f"log_length({self.trained}): the trained length is at least 2")

    def __str__(self) -> str:
        return call_text(self.name, self.trained)

    def of_counts(self, seen: Int[Tensor, "*queries"]) -> Float[Tensor, "*queries"]:
        return (seen.clamp(min=1).double().log() / math.log(self.trained)).clamp(min=1.0)


@dataclass(frozen=True)
class RootLogLength(Rule):
    """beta = sqrt(log(keys seen) / log(trained)): entropy kept at another resolution of an image.

    trained: keys of the layer at the resolution of training, at least 2. Sharper above it and
    hotter below; a query with one key has nothing to divide, and beta 1. Source: Jin et al.,
    "Training-free diffusion model adaptation for variable-sized text-to-image synthesis" (NeurIPS
    2023), section 3.2, who use it in self-attention. Here relative to the model's own temperature.
    """

    name, signature, counts_keys = "root_log_length", "root_log_length(trained)", True

    trained: int

    def __post_init__(self) -> None:
        if not self.trained >= 2:
            raise ProfileError(f"root_log_length({self.trained}): the trained number is at least 2")

    def __str__(self) -> str:
        return call_text(self.name, self.trained)

    def of_counts(self, seen: Int[Tensor, "*queries"]) -> Float[Tensor, "*queries"]:
        beta = (seen.clamp(min=1).double().log() / math.log(self.trained)).sqrt()
        return torch.where(seen > 1, beta, 1.0)


def rule(text: str) -> Rule:
    """Read one rule, e.g. "support(8)", "entropy(2,0.5,2)", "polynomial()", "log_length(2048)".

    Raises ProfileError: names the column, with a caret under it, and says what was expected.
    """
    return rule_of(GRAMMAR.read(text))


def rule_of(call: CallNode) -> Rule:
    """The rule that a call of a text makes; `rule` is for whole texts."""
    kind = KNOWN.get(call.name)
    if kind is None:
        raise call.unknown(KNOWN, "rule")
    return kind.of(call)


def is_rule(text: str) -> bool:
    """Whether a text names a rule rather than a pattern of temperatures."""
    found = re.match(r"\s*(\w+)\s*\(", text)
    return found is not None and found[1] in KNOWN


def check_rules(rules: Sequence[Rule | None], rows: int) -> None:
    """ProfileError unless there is a rule, or None, for each of so many rows."""
    if len(rules) != rows:
        raise ProfileError(
            f"{len(rules)} rules were given for {rows} layers; give one, or None, each"
        )
    for item in rules:
        if not isinstance(item, Rule | None):
            raise ProfileError(
                f"a profile's rules are rules or None, not {item!r:.60}; "
                "adaptive_profile(text, model) reads their text"
            )
