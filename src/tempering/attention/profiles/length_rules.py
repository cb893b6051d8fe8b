"""Rules of length: the temperature of a query from the number n of keys that it sees.

    power(b, n0)                T = (n / n0)^b, that is log T = b log(n / n0)
    log_length(n0)              1/T = max(1, log n / log n0)
    root_log_length(n0)         1/T = sqrt(log n / log n0)
    ssmax(s)                    1/T = s log n
    affine(a, b)                1/T = a log n + b
    log_steps(a, step, shift)   1/T = 1 + a log(1 + floor((n - shift) / step))
    x|instead_of(y)             T of x, and the layer's own law y is undone: 1/T = x / y

The profile's T stands in front: with `power`, T[l, h] is the temperature at n0 keys, and b says how
it changes, log T[l, h](n) = log T[l, h] + b log(n / n0). Numbers are those of all heads of a layer,
or one for each: power(heads(0.1,0.2,0.3), 2048). Bounds of T may follow `power`, `ssmax` and
`affine`. A query that sees one key has nothing to choose from, so `ssmax` and `affine` take n = 1
for n = 2.

Sources: Su Jianlin, "Attention's scale from entropy invariance" (2021), and Nakanishi,
"Scalable-softmax is superior for attention" (arXiv 2501.19399): log n. Karakida and Hayase (arXiv
2605.12697): powers of log n, by head. `log_steps` is the law of Llama 4 and of Ministral 3. The
scale-invariant attention of Anson et al. (arXiv 2505.17083) scales the logit of each key by the
key's distance, which no temperature of a query does; `affine` has its form in log n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.profiles.length_base import Bounded, Law, LengthRule, Number
from tempering.attention.profiles.rule_base import KNOWN, PerHead
from tempering.calls import Argument, piped_text
from tempering.errors import ProfileError


@dataclass(frozen=True)
class Power(Bounded):
    """T = (n/length)^slope: log T rises by `slope` with every factor e of the keys.

    slope: 0 is a constant; negative is sharper in longer contexts.
    length: keys at which T is the profile's.
    """

    name, signature = "power", "power(slope, length, coldest, hottest)"

    slope: float | PerHead
    length: float | PerHead
    coldest: float = COLDEST
    hottest: float = HOTTEST

    def _check_numbers(self) -> None:
        self._check(length=(1, math.inf, "a number of keys, at least 1"))

    @staticmethod
    def law(n: Tensor, *numbers: Any) -> Tensor:
        slope, length, coldest, hottest = numbers
        log_length = length.log() if isinstance(length, Tensor) else math.log(length)
        return Bounded.held((-slope * (n.log() - log_length)).exp(), coldest, hottest)


@dataclass(frozen=True)
class LogLength(Law):
    """beta = max(1, log(keys seen) / log(trained)): sharper beyond the length of training.

    trained: tokens, at least 2. Source: Su Jianlin, "Attention's scale from entropy invariance"
    (2021); Nakanishi, "Scalable-softmax is superior for attention" (2025). Here relative to the
    model's own temperature, and never hotter than that.
    """

    name, signature = "log_length", "log_length(trained)"

    trained: int

    def __post_init__(self) -> None:
        if not self.trained >= 2:
            raise ProfileError(f"log_length({self.trained}): the trained length is at least 2")

    @staticmethod
    def law(n: Tensor, *numbers: Any) -> Tensor:
        (trained,) = numbers
        log_trained = trained.log() if isinstance(trained, Tensor) else math.log(trained)
        return (n.log() / log_trained).clamp(min=1.0)


@dataclass(frozen=True)
class RootLogLength(Law):
    """beta = sqrt(log(keys seen) / log(trained)): entropy kept at another resolution of an image.

    trained: keys of the layer at the resolution of training, at least 2. Sharper above it and
    hotter below; a query with one key has nothing to divide, and beta 1. Source: Jin et al.,
    "Training-free diffusion model adaptation for variable-sized text-to-image synthesis" (NeurIPS
    2023), section 3.2, who use it in self-attention. Here relative to the model's own temperature.
    """

    name, signature = "root_log_length", "root_log_length(trained)"

    trained: int

    def __post_init__(self) -> None:
        if not self.trained >= 2:
            raise ProfileError(f"root_log_length({self.trained}): the trained number is at least 2")

    @staticmethod
    def law(n: Tensor, *numbers: Any) -> Tensor:
        (trained,) = numbers
        log_trained = trained.log() if isinstance(trained, Tensor) else math.log(trained)
        return torch.where(n > 1, (n.log() / log_trained).sqrt(), 1.0)


@dataclass(frozen=True)
class Affine(Bounded):
    """beta = a log n + b."""

    name, signature = "affine", "affine(a, b, coldest, hottest)"

    a: float | PerHead
    b: float | PerHead
    coldest: float = COLDEST
    hottest: float = HOTTEST

    def _check_numbers(self) -> None:
        self._check()

    @staticmethod
    def law(n: Tensor, *numbers: Any) -> Tensor:
        a, b, coldest, hottest = numbers
        return Bounded.held(a * n.clamp(min=2).log() + b, coldest, hottest)


@dataclass(frozen=True)
class SSMax(Bounded):
    """beta = s log n (Nakanishi, arXiv 2501.19399). s: above 0."""

    name, signature = "ssmax", "ssmax(s, coldest, hottest)"

    s: float | PerHead
    coldest: float = COLDEST
    hottest: float = HOTTEST

    def _check_numbers(self) -> None:
        self._check(s=(math.ulp(0), math.inf, "a number above 0"))

    @staticmethod
    def law(n: Tensor, *numbers: Any) -> Tensor:
        s, coldest, hottest = numbers
        return Bounded.held(s * n.clamp(min=2).log(), coldest, hottest)


@dataclass(frozen=True)
class LogSteps(Law):
    """beta = 1 + scale log(1 + floor((n - shift)/step)), as Llama 4 and Ministral 3 have it.

    Llama 4 counts n from 1, padding included (shift 0). Ministral 3 reads position ids, which
    begin at 0 (shift 1).
    """

    name, signature = "log_steps", "log_steps(scale, step, shift)"

    scale: float | PerHead
    step: float | PerHead
    shift: float | PerHead = 0.0

    def __post_init__(self) -> None:
        least = (0, 1, "0 or 1")
        self._check(step=(1, math.inf, "a number of keys, at least 1"), shift=least)

    def _shown(self) -> tuple[Number, ...]:
        return self.numbers if self.shift else self.numbers[:-1]

    @staticmethod
    def law(n: Tensor, *numbers: Any) -> Tensor:
        scale, step, shift = numbers
        return 1 + scale * (1 + ((n - shift) / step).floor()).log()


@dataclass(frozen=True)
class InsteadOf(LengthRule):
    """T of one rule, on a layer that has a law of its own, which is undone.

    inner: the rule. own: the layer's law, as the layout shows it.
    """

    name, signature = "instead_of", "instead_of(x, own)"
    readers: ClassVar[Any] = {
        "LengthRule": lambda argument, what: _length_rule(argument, what),
    }

    inner: LengthRule
    own: LengthRule

    def __post_init__(self) -> None:
        for item in (self.inner, self.own):
            if isinstance(item, InsteadOf):
                raise ProfileError(f"{self}: one law can be replaced, and by one rule")

    @property
    def numbers(self) -> tuple[Number, ...]:
        return (*self.inner.numbers, *self.own.numbers)

    @property
    def label(self) -> str:
        return f"{self.inner.label}|instead_of({self.own.label})"

    def __str__(self) -> str:
        return piped_text(self.inner, self.name, self.own)

    def of_counts(
        self, seen: Int[Tensor, "rows heads_or_1 q_seq"], places: Tensor | None = None
    ) -> Float[Tensor, "rows heads q_seq"]:
        own = self.own.of_counts(seen if places is None else places)
        return self.inner.of_counts(seen) / own


def _length_rule(argument: Argument, what: str) -> LengthRule:
    call = argument.call(what, "rule of length")
    kind = KNOWN.get(call.name)
    if kind is None or not issubclass(kind, LengthRule):
        lengths = [name for name, item in KNOWN.items() if issubclass(item, LengthRule)]
        raise call.unknown(lengths, "rule of length")
    made = kind.of(call)
    assert isinstance(made, LengthRule)
    return made
