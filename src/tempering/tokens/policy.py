"""The class of all policies, the policies that read no logits, and the operations on policies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tempering.calls import DEEPEST, call_text, number_text, piped_text
from tempering.errors import InputError, TemperatureError
from tempering.schedules import Schedule
from tempering.tokens.clock import LONGEST, Clock
from tempering.tokens.settings import RequestSettings
from tempering.tokens.temper import one_per_row
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState
from tempering.tokens.truncation import Cut

# Name in the text form -> class, in order of definition.
POLICY_CLASSES: dict[str, type[Policy]] = {}


class Policy(ABC):
    """The temperature of the next token, from what is known when it is sampled.

    A policy is immutable and holds no state of any request: `state` and `advance` make a
    `TokenState` from token ids, `temperatures` reads it beside the logits. Engines apply a policy
    through `temper_logits`. A policy with a `sampler` or an `order` in it also truncates: it is
    then given the request's own settings, and `cut` says what is kept of each row.
    """

    name: ClassVar[str]
    signature: ClassVar[str]
    summary: ClassVar[str]
    example: ClassVar[str]
    follows_phases: ClassVar[bool] = False  # whether it tells phases of the whole reply apart

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "name" in cls.__dict__:
            POLICY_CLASSES[cls.name] = cls

    @abstractmethod
    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        """T of each row by the policy's formula, 0..inf, in float64.

        Parameters
        ----------
        energies: `token_energies(logits)`: 0 at each row's maximiser, +inf where masked; no row is
            `certain`.
        states: one for each row.
        """

    def start(
        self, prompt: Sequence[int], *, sample: int = 0, given: RequestSettings = NOTHING_GIVEN
    ) -> TokenState:
        """The state of a request that has generated nothing yet."""
        return TokenState(sample=sample, given=given)

    def advance(self, state: TokenState, token: int) -> TokenState:
        """The state after one more generated token."""
        return replace(state, position=state.position + 1)

    def state(
        self,
        prompt: Sequence[int],
        generated: Sequence[int] = (),
        *,
        sample: int = 0,
        given: RequestSettings = NOTHING_GIVEN,
    ) -> TokenState:
        """The state of a request, rebuilt from its token ids.

        Parameters
        ----------
        prompt, generated: token ids; the policy's clocks count generated tokens only.
        sample: which of the n samples of this prompt the request is, for `ladder`.
        given: the request's own settings, for a policy that `truncates`.
        """
        state = self.start(prompt, sample=sample, given=given)
        for token in generated:
            state = self.advance(state, int(token))
        return state

    def cut(self, state: TokenState) -> Cut:
        """What is kept of the posterior that the next token is drawn from."""
        given = state.given
        return Cut(given.top_p, given.top_k, given.min_p)

    def forced(self, state: TokenState) -> int | None:
        """The token that the policy forces next, if any."""
        return None

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies that this one is made of."""
        return ()

    @property
    def truncates(self) -> bool:
        """Whether top_p, top_k and min_p are the policy's, the request's own among them."""
        return any(part.truncates for part in self.parts)

    @property
    def forces(self) -> bool:
        """Whether it may force a token."""
        return any(part.forces for part in self.parts)

    @property
    def samples(self) -> int | None:
        """n, when each of n samples of a prompt has a temperature of its own; else None."""
        return next((n for part in self.parts if (n := part.samples) is not None), None)

    @property
    def reads_tokens(self) -> bool:
        """Whether the state depends on which tokens there are, not only on how many."""
        return any(part.reads_tokens for part in self.parts)

    @property
    def most_bytes(self) -> int:
        """Bytes that the patterns of the policy may hold, at most."""
        return sum(part.most_bytes for part in self.parts)

    def room(self, f: float | int) -> Policy:
        """T ** f: deviations from the model's own temperature 1 times f in logs."""
        return RoomPolicy(self, f)

    def clip(self, lo: float | int, hi: float | int) -> Policy:
        """T below lo becomes lo, above hi becomes hi."""
        return ClipPolicy(self, lo, hi)

    @abstractmethod
    def __str__(self) -> str:
        """The text form; `parse_policy` reads it back as an equal policy."""

    def __repr__(self) -> str:
        return f"parse_policy({str(self)!r})"


@dataclass(frozen=True, repr=False)
class ConstantPolicy(Policy):
    """The same temperature for every token."""

    name, signature = "constant", "constant(T)"
    summary = "one temperature, 0..inf; 0 and inf are exact limits"
    example = "constant(0.7)"

    T: float | int

    def __post_init__(self) -> None:
        if not self.T >= 0:
            raise TemperatureError(f"constant takes T in 0..inf, got {number_text(self.T)}")
        object.__setattr__(self, "T", 0.0 + float(self.T))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return one_per_row([float(self.T)] * len(states), energies)

    def __str__(self) -> str:
        return call_text(self.name, self.T)


@dataclass(frozen=True, repr=False)
class SchedulePolicy(Policy):
    """T = schedule(u) at u = l/(length - 1) for generated token l; the last value after the end."""

    name, signature = "schedule", "schedule(pattern, length=N)"
    summary = "any pattern over the first N generated tokens; its last value after them"
    example = "schedule(throb(1.5,1,0.5,1.5), length=256)"

    schedule: Schedule
    length: int

    def __post_init__(self) -> None:
        _ = self.clock

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.schedule, self.length)

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return one_per_row((self.clock.at(state.position) for state in states), energies)

    @property
    def most_bytes(self) -> int:
        return self.clock.most_bytes

    def __str__(self) -> str:
        return call_text(self.name, self.schedule, length=self.length)


@dataclass(frozen=True, repr=False)
class LadderPolicy(Policy):
    """A temperature for each of n samples: T_i = a (b/a)^(i/(n-1)), i = 0..n-1."""

    name, signature = "ladder", "ladder(a, b, n=N)"
    summary = "sample i of n at a (b/a)^(i/(n-1)): the samples of one prompt from a to b"
    example = "ladder(0.5,1.5, n=12)"

    a: float | int
    b: float | int
    n: int

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("b", self.b)):
            if not 0 < value < math.inf:
                raise TemperatureError(f"ladder takes {name} > 0, finite; got {number_text(value)}")
            object.__setattr__(self, name, float(value))
        if not 2 <= self.n <= LONGEST:
            raise InputError(f"ladder takes n = 2 samples or more, got {self.n}")

    @property
    def samples(self) -> int | None:
        return self.n

    def rung(self, sample: int) -> float:
        """T of one sample."""
        if not 0 <= sample < self.n:
            raise InputError(f"{self} has samples 0..{self.n - 1}, got sample {sample}")
        t = sample / (self.n - 1)
        return math.exp((1 - t) * math.log(self.a) + t * math.log(self.b))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return one_per_row((self.rung(state.sample) for state in states), energies)

    def __str__(self) -> str:
        return call_text(self.name, self.a, self.b, n=self.n)


@dataclass(frozen=True, repr=False)
class PolicyOperation(Policy):
    """A policy that maps the temperatures of another, the inner one, whose states it uses."""

    inner: Policy

    def __post_init__(self) -> None:
        check_depth(self)

    def start(
        self, prompt: Sequence[int], *, sample: int = 0, given: RequestSettings = NOTHING_GIVEN
    ) -> TokenState:
        return self.inner.start(prompt, sample=sample, given=given)

    def advance(self, state: TokenState, token: int) -> TokenState:
        return self.inner.advance(state, token)

    def cut(self, state: TokenState) -> Cut:
        return self.inner.cut(state)

    def forced(self, state: TokenState) -> int | None:
        return self.inner.forced(state)

    @property
    def parts(self) -> tuple[Policy, ...]:
        return (self.inner,)


def every_part(policy: Policy) -> Iterator[Policy]:
    """A policy, the policies that it is made of, theirs, and so on."""
    yield policy
    for part in policy.parts:
        yield from every_part(part)


def value_text(policy: Policy) -> str:
    """The text of a policy where a number means `constant` of it."""
    return number_text(policy.T) if isinstance(policy, ConstantPolicy) else str(policy)


def check_ladders(parts: Sequence[Policy]) -> None:
    """InputError where ladders of one policy have different numbers of samples."""
    rungs = {n for part in parts if (n := part.samples) is not None}
    if len(rungs) > 1:
        raise InputError(f"the ladders of one policy have one n, got {sorted(rungs)}")


def dispatched(
    policies: Sequence[Policy],
    energies: Float[Tensor, "batch vocab"],
    states: Sequence[TokenState],
) -> Float64[Tensor, " batch"]:
    """T of each row by a policy of its own; rows of one policy are done together."""
    rows_of: dict[int, list[int]] = {}
    for row, policy in enumerate(policies):
        rows_of.setdefault(id(policy), []).append(row)
    if len(rows_of) == 1:
        return policies[0].temperatures(energies, states)
    result = energies.new_empty(len(states), dtype=torch.float64)
    for rows in rows_of.values():
        own = [states[row] for row in rows]
        result[rows] = policies[rows[0]].temperatures(energies[rows], own)
    return result


def check_depth(policy: Policy) -> None:
    """InputError when policies stand too deep inside each other for Python's stack."""
    depth, level = 0, [policy]
    while level:
        depth, level = depth + 1, [part for each in level for part in each.parts]
        if depth > DEEPEST:
            raise InputError(f"more than {DEEPEST} policies inside each other; merge some")


@dataclass(frozen=True, repr=False)
class RoomPolicy(PolicyOperation):
    """T ** f, as the `room` of schedules: f = 0 gives 1 (the model's own), f = 1 the policy."""

    name, signature = "room", "x|room(f)"
    summary = "T^f: deviations from 1 times f in logs; 0 gives 1 everywhere, 1 gives x"
    example = "entropy(T0=1.2, theta=0.5)|room(0.5)"

    f: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.f < math.inf:
            raise InputError(f"room takes f >= 0, finite; got {number_text(self.f)}")
        object.__setattr__(self, "f", 0.0 + float(self.f))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return self.inner.temperatures(energies, states) ** self.f

    def __str__(self) -> str:
        return piped_text(self.inner, self.name, self.f)


@dataclass(frozen=True, repr=False)
class ClipPolicy(PolicyOperation):
    """T below lo becomes lo, above hi becomes hi."""

    name, signature = "clip", "x|clip(lo, hi)"
    summary = "T below lo becomes lo, above hi becomes hi"
    example = "support(12)|clip(0.3,2)"

    lo: float | int
    hi: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lo <= self.hi:
            raise InputError(
                f"clip takes 0 <= lo <= hi, got lo = {number_text(self.lo)} "
                f"and hi = {number_text(self.hi)}"
            )
        object.__setattr__(self, "lo", 0.0 + float(self.lo))
        object.__setattr__(self, "hi", 0.0 + float(self.hi))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return self.inner.temperatures(energies, states).clamp(self.lo, self.hi)

    def __str__(self) -> str:
        return piped_text(self.inner, self.name, self.lo, self.hi)
