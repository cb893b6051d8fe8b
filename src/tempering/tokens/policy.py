"""What every policy is, the ones that look at no logits, and the operations on any of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from tempering.calls import DEEPEST, number, piped, written
from tempering.errors import InputError, TemperatureError
from tempering.schedules import Schedule
from tempering.tokens.clock import LONGEST, Clock
from tempering.tokens.state import TokenState
from tempering.tokens.temper import certain, held_by, per_row, tempered, token_energies

KNOWN: dict[str, type[Policy]] = {}  # name in the text form -> class, in order of definition


class Policy(ABC):
    """The temperature of the next token, from what is known when it is sampled.

    A policy is immutable and holds no state of any request: `state` and `advance` make a
    `TokenState` from token ids, `temperatures` reads it beside the logits. Engines adapt it, by
    way of `token_temperatures`.
    """

    name: ClassVar[str]
    signature: ClassVar[str]
    summary: ClassVar[str]
    example: ClassVar[str]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "name" in cls.__dict__:
            KNOWN[cls.name] = cls

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

    def start(self, prompt: Sequence[int], *, sample: int = 0) -> TokenState:
        """The state of a request that has generated nothing yet."""
        return TokenState(sample=sample)

    def advance(self, state: TokenState, token: int) -> TokenState:
        """The state after one more generated token."""
        return replace(state, position=state.position + 1)

    def state(
        self, prompt: Sequence[int], generated: Sequence[int] = (), *, sample: int = 0
    ) -> TokenState:
        """The state of a request, rebuilt from its token ids.

        Parameters
        ----------
        prompt, generated: token ids; the policy's clocks count generated tokens only.
        sample: which of the n samples of this prompt the request is, for `ladder`.
        """
        state = self.start(prompt, sample=sample)
        for token in generated:
            state = self.advance(state, int(token))
        return state

    @property
    def samples(self) -> int | None:
        """n, when each of n samples of a prompt has a temperature of its own; else None."""
        return None

    @property
    def reads_tokens(self) -> bool:
        """Whether the state depends on which tokens there are, not only on how many."""
        return False

    @property
    def most_bytes(self) -> int:
        """How much memory the patterns of the policy may come to hold, at most."""
        return 0

    def room(self, f: float | int) -> Policy:
        """T ** f: deviations from the model's own temperature 1 times f in logs."""
        return Room(self, f)

    def clip(self, lo: float | int, hi: float | int) -> Policy:
        """T below lo becomes lo, above hi becomes hi."""
        return Clip(self, lo, hi)

    @abstractmethod
    def __str__(self) -> str:
        """The text form; `parse_policy` reads it back as an equal policy."""

    def __repr__(self) -> str:
        return f"parse_policy({str(self)!r})"


def token_temperatures(
    policy: Policy, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
) -> Float[Tensor, " batch"]:
    """T of each row, as engines apply it: the policy's, but 1 where one token has p = 1.

    p = 1 stays p = 1: a token that an engine forces, by a logit more than 104 nats above all
    others, keeps its certainty under every policy, those that would heat until N tokens live among
    them. A temperature beyond the dtype of the energies is the limit, 0 or inf.
    """
    forced = certain(energies)
    if not bool(forced.any()):
        return held_by(_of_each(policy, energies, states), energies)
    result = energies.new_ones(len(energies))
    free = (~forced).nonzero().squeeze(-1)
    if len(free):
        rows = energies[free]
        result[free] = held_by(_of_each(policy, rows, [states[i] for i in free.tolist()]), rows)
    return result


def _of_each(policy: Policy, energies: Tensor, states: Sequence[TokenState]) -> Tensor:
    temperature = policy.temperatures(energies, states)
    if temperature.shape != (len(states),):
        raise InputError(
            f"{policy} gives temperatures of shape {list(temperature.shape)} for {len(states)} "
            "rows; give one for each"
        )
    return temperature


def temper_logits(
    policy: Policy, logits: Shaped[Tensor, "batch vocab"], states: Sequence[TokenState]
) -> tuple[Float[Tensor, "batch vocab"], Float[Tensor, " batch"]]:
    """Temper one row of logits for each request: the whole contract between policy and engine.

    Parameters
    ----------
    policy: e.g. `parse_policy("support(12)")`.
    logits: raw, -inf where masked; any floating dtype.
    states: `policy.state(prompt_ids, generated_ids)` of each row.

    Returns
    -------
    (tempered logits, temperatures), at least float32. See `tempered` for the limits; a row with
    T = 1 comes back bit for bit.

    Raises
    ------
    EnergyError: NaN, +inf or an all-masked row. InputError: not one state for each row.
    """
    if len(states) != len(logits):
        raise InputError(f"{len(logits)} rows of logits but {len(states)} states; give one a row")
    energies = token_energies(logits)
    temperature = token_temperatures(policy, energies, states)
    return tempered(logits, energies, temperature), temperature


@dataclass(frozen=True, repr=False)
class Constant(Policy):
    """The same temperature for every token."""

    name, signature = "constant", "constant(T)"
    summary = "one temperature, 0..inf; 0 and inf are exact limits"
    example = "constant(0.7)"

    T: float | int

    def __post_init__(self) -> None:
        if not self.T >= 0:
            raise TemperatureError(f"constant takes T in 0..inf, got {number(self.T)}")
        object.__setattr__(self, "T", 0.0 + float(self.T))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return per_row([float(self.T)] * len(states), energies)

    def __str__(self) -> str:
        return written(self.name, self.T)


@dataclass(frozen=True, repr=False)
class Scheduled(Policy):
    """A schedule over the position: T = schedule(u), u = l/(length - 1), held after the end."""

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
        return per_row((self.clock.at(state.position) for state in states), energies)

    @property
    def most_bytes(self) -> int:
        return self.clock.most_bytes

    def __str__(self) -> str:
        return written(self.name, self.schedule, length=self.length)


@dataclass(frozen=True, repr=False)
class Ladder(Policy):
    """Another temperature for each of n samples: T_i = a (b/a)^(i/(n-1)), i = 0..n-1."""

    name, signature = "ladder", "ladder(a, b, n=N)"
    summary = "sample i of n at a (b/a)^(i/(n-1)): the samples of one prompt from a to b"
    example = "ladder(0.5,1.5, n=12)"

    a: float | int
    b: float | int
    n: int

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("b", self.b)):
            if not 0 < value < math.inf:
                raise TemperatureError(f"ladder takes {name} > 0, finite; got {number(value)}")
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
        return per_row((self.rung(state.sample) for state in states), energies)

    def __str__(self) -> str:
        return written(self.name, self.a, self.b, n=self.n)


@dataclass(frozen=True, repr=False)
class Operation(Policy):
    """A policy whose temperatures are mapped; the requests' states are those of the inner one."""

    inner: Policy

    def __post_init__(self) -> None:
        depth, inner = 1, self.inner
        while isinstance(inner, Operation):
            depth, inner = depth + 1, inner.inner
        if depth >= DEEPEST:
            raise InputError(f"more than {DEEPEST} policies inside each other; merge some")

    def start(self, prompt: Sequence[int], *, sample: int = 0) -> TokenState:
        return self.inner.start(prompt, sample=sample)

    def advance(self, state: TokenState, token: int) -> TokenState:
        return self.inner.advance(state, token)

    @property
    def samples(self) -> int | None:
        return self.inner.samples

    @property
    def reads_tokens(self) -> bool:
        return self.inner.reads_tokens

    @property
    def most_bytes(self) -> int:
        return self.inner.most_bytes


@dataclass(frozen=True, repr=False)
class Room(Operation):
    """T ** f, as the `room` of schedules: f = 0 gives 1 (the model's own), f = 1 the policy."""

    name, signature = "room", "x|room(f)"
    summary = "T^f: deviations from 1 times f in logs; 0 gives 1 everywhere, 1 gives x"
    example = "entropy(T0=1.2, theta=0.5)|room(0.5)"

    f: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.f < math.inf:
            raise InputError(f"room takes f >= 0, finite; got {number(self.f)}")
        object.__setattr__(self, "f", 0.0 + float(self.f))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return self.inner.temperatures(energies, states) ** self.f

    def __str__(self) -> str:
        return piped(self.inner, self.name, self.f)


@dataclass(frozen=True, repr=False)
class Clip(Operation):
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
                f"clip takes 0 <= lo <= hi, got lo = {number(self.lo)} and hi = {number(self.hi)}"
            )
        object.__setattr__(self, "lo", 0.0 + float(self.lo))
        object.__setattr__(self, "hi", 0.0 + float(self.hi))

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return self.inner.temperatures(energies, states).clamp(self.lo, self.hi)

    def __str__(self) -> str:
        return piped(self.inner, self.name, self.lo, self.hi)
