"""The policies that read the logits: support, entropy (EDT), dynatemp (llama.cpp)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tempering.calls import call_text, number_text
from tempering.errors import InputError, SupportError, TemperatureError
from tempering.posterior import entropy, temperature_for
from tempering.posterior.wide import WIDE, wide_temperature
from tempering.schedules import Schedule
from tempering.schedules.patterns import Constant
from tempering.tokens.clock import Clock
from tempering.tokens.policy import Policy
from tempering.tokens.temper import count, live, one_per_row
from tempering.tokens.token_state import TokenState


@dataclass(frozen=True, repr=False)
class SupportPolicy(Policy):
    """T such that N tokens stay alive: exp(S(T)) = N, solved for each token.

    Where no T gives N, T is the limit that comes closest: 0 where more than N tokens tie for the
    maximum, inf where no more than N tokens are unmasked. Where all unmasked tokens tie (as when a
    constraint leaves one token), every T gives the same posterior, and T is reported as 1.
    """

    name, signature = "support", "support(N or pattern, length=L)"
    summary = "the T that keeps N tokens alive; with a pattern, N over the first L tokens"
    example = "support(throb(12,3,1,12), length=256)"

    pattern: Schedule
    length: int | None = None

    def __post_init__(self) -> None:
        if self.length is None and self.pattern.stages > 1:
            raise InputError(
                f"support({self.pattern}) needs the number of tokens it spans: "
                f"support({self.pattern}, length=N)"
            )
        if (least := self.clock.range[0]) < 1:
            raise SupportError(
                f"support is a number of live tokens, 1 or more; {self.pattern} has "
                f"{number_text(least)}"
            )

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.pattern, self.length or 1)

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        target = one_per_row((self.clock.at(state.position) for state in states), energies)
        ties, unmasked = count(torch.eq, energies, 0.0), live(energies)
        limit = torch.where(target <= ties, 0.0, math.inf)
        result = torch.where(ties == unmasked, 1.0, limit).double()
        # In the dtype of the solver, where a target may round to one of the ends.
        target = target.to(energies.dtype)
        solvable = (target > ties) & (target < unmasked)
        if bool(solvable.all()):
            return _solved(energies, target, ties, unmasked)
        if bool(solvable.any()):
            known = (each[solvable] for each in (energies, target, ties, unmasked))
            result[solvable] = _solved(*known)
        return result

    @property
    def most_bytes(self) -> int:
        return self.clock.most_bytes

    def __str__(self) -> str:
        if self.length is not None:
            return call_text(self.name, self.pattern, length=self.length)
        if isinstance(self.pattern, Constant):
            return call_text(self.name, self.pattern.values[0])
        return call_text(self.name, self.pattern)


def _solved(
    energies: Float[Tensor, "batch vocab"],
    target: Float[Tensor, " batch"],
    ties: Float[Tensor, " batch"],
    unmasked: Float[Tensor, " batch"],
) -> Float64[Tensor, " batch"]:
    """T of each row's target; solved in float64 where the energies' dtype can't reach a target."""
    try:
        if energies.shape[-1] >= WIDE:
            return wide_temperature(energies.detach(), target, ties, unmasked).double()
        return temperature_for(energies, target).double()
    except SupportError:
        return temperature_for(energies.double(), target.double())


@dataclass(frozen=True, repr=False)
class EntropyPolicy(Policy):
    """Entropy-based dynamic temperature: T = T0 * 0.8^(theta/S), S the entropy at T = 1 in nats.

    Confident tokens (small S) are sampled colder. Masked tokens are left out of S. theta = 0 or
    S = inf gives T0; S = 0 gives T = 0.
    Source: Zhang, Bao and Huang 2024, arXiv 2403.14541, equation of T with their N = 0.8.
    """

    name, signature = "entropy", "entropy(T0=1, theta=0.1)"
    summary = "EDT: T = T0 * 0.8^(theta/S), S the entropy in nats: confident tokens colder"
    example = "entropy(T0=1, theta=0.1)"

    T0: float | int
    theta: float | int

    def __post_init__(self) -> None:
        if not 0 <= self.T0 < math.inf:
            raise TemperatureError(f"entropy takes T0 >= 0, finite; got {number_text(self.T0)}")
        if not 0 <= self.theta < math.inf:
            raise InputError(f"entropy takes theta >= 0, finite; got {number_text(self.theta)}")
        object.__setattr__(self, "T0", float(self.T0))
        object.__setattr__(self, "theta", float(self.theta))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        if self.theta == 0:  # theta/S is 0/0 where one token is alive
            return one_per_row([float(self.T0)] * len(states), energies)
        return self.T0 * torch.exp(math.log(0.8) * self.theta / entropy(energies).double())

    def __str__(self) -> str:
        return call_text(self.name, T0=self.T0, theta=self.theta)


@dataclass(frozen=True, repr=False)
class DynaTempPolicy(Policy):
    """The dynamic temperature of llama.cpp: between T - range and T + range by the entropy.

        T = lo + (hi - lo) (S / log n)^exponent,  lo = max(0, T - range),  hi = T + range

    S is the entropy at T = 1 over the n unmasked tokens. One unmasked token has S = 0.
    Departure: llama.cpp measures S after its top-k and top-p; here n counts what the engine
    left unmasked before the policy, which in transformers is before top-k and top-p.
    Source: llama.cpp, sampler `temp_ext` (dynatemp_range, dynatemp_exponent).
    """

    name, signature = "dynatemp", "dynatemp(range, exponent=1, temperature=1)"
    summary = "llama.cpp: temperature -/+ range by (S/log n)^exponent: confident tokens colder"
    example = "dynatemp(0.5, exponent=1, temperature=0.8)"

    range: float | int
    exponent: float | int = 1.0
    temperature: float | int = 1.0

    def __post_init__(self) -> None:
        for name in ("range", "exponent", "temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"dynatemp takes {name} >= 0, finite; got {number_text(getattr(self, name))}"
                )
            object.__setattr__(self, name, float(getattr(self, name)))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        lo = max(0.0, self.temperature - self.range)
        width = min(self.temperature + self.range, sys.float_info.max) - lo
        unmasked = (energies < math.inf).sum(-1)
        most = torch.log(unmasked.clamp(min=2).double())  # S = 0 where unmasked = 1
        share = (entropy(energies).double() / most).clamp(0, 1)
        return lo + width * share**self.exponent

    def __str__(self) -> str:
        return call_text(
            self.name, self.range, exponent=self.exponent, temperature=self.temperature
        )
