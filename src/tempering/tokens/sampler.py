"""A whole sampler as a policy, and the order in which truncation and temperature act."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from tempering.calls import number_text
from tempering.errors import InputError
from tempering.tokens.policy import (
    Policy,
    PolicyOperation,
    check_depth,
    every_part,
    value_text,
)
from tempering.tokens.settings import SETTINGS, TRUNCATIONS, RequestSettings, checked_setting
from tempering.tokens.temper import one_per_row
from tempering.tokens.token_state import NOTHING_GIVEN, TokenState
from tempering.tokens.truncation import ORDER, Cut


@dataclass(frozen=True, repr=False)
class SamplerPolicy(Policy):
    """A temperature and a truncation; what is left out is the request's own.

    T may be any policy. See `truncation` for what top_p, top_k and min_p keep, and at which ranges:
    0 < top_p <= 1, whole top_k (0 and -1: off), 0 <= min_p <= 1. A value that turns one off, such
    as top_p = 1, is stated all the same. Without an `order` they act after the temperature, in
    vLLM's order: min_p, top_k, top_p.
    """

    name, signature = "sampler", "sampler(T=x, top_p=1, top_k=0, min_p=0)"
    summary = "temperature and truncation together; what is left out is the request's own"
    example = "sampler(T=0.7, top_p=0.95, top_k=20, min_p=0.05)"

    T: Policy | None = None
    top_p: float | int | None = None
    top_k: int | None = None
    min_p: float | int | None = None

    def __post_init__(self) -> None:
        for name in TRUNCATIONS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checked_setting(name, value, "sampler: "))
        inner = [part for own in self.parts for part in every_part(own)]
        if within := [part for part in inner if isinstance(part, SamplerPolicy | OrderPolicy)]:
            raise InputError(
                f"a sampler's T is a temperature or a policy of temperatures alone, not "
                f"{within[0]}; put samplers side by side, in phases(...)"
            )
        check_depth(self)

    @property
    def parts(self) -> tuple[Policy, ...]:
        return () if self.T is None else (self.T,)

    @property
    def truncates(self) -> bool:
        return True

    def start(
        self, prompt: Sequence[int], *, sample: int = 0, given: RequestSettings = NOTHING_GIVEN
    ) -> TokenState:
        if self.T is None:
            return super().start(prompt, sample=sample, given=given)
        return self.T.start(prompt, sample=sample, given=given)

    def advance(self, state: TokenState, token: int) -> TokenState:
        return super().advance(state, token) if self.T is None else self.T.advance(state, token)

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        if self.T is None:
            return one_per_row((state.given.temperature for state in states), energies)
        return self.T.temperatures(energies, states)

    def cut(self, state: TokenState) -> Cut:
        given = state.given
        return Cut(
            given.top_p if self.top_p is None else self.top_p,
            given.top_k if self.top_k is None else self.top_k,
            given.min_p if self.min_p is None else self.min_p,
        )

    def forced(self, state: TokenState) -> int | None:
        return None if self.T is None else self.T.forced(state)

    def stated(self) -> tuple[str, ...]:
        """Which settings this sampler states itself, other than its temperature."""
        return tuple(name for name in TRUNCATIONS if getattr(self, name) is not None)

    def __str__(self) -> str:
        values = {name: getattr(self, name) for name in self.stated()}
        own = [] if self.T is None else [f"T={value_text(self.T)}"]
        own += [f"{name}={number_text(value)}" for name, value in values.items()]
        return f"{self.name}({', '.join(own)})"


@dataclass(frozen=True, repr=False)
class OrderPolicy(PolicyOperation):
    """The order in which temperature, top_p, top_k and min_p act, each on what the last one left.

    With the temperature last, truncation is of the untempered posterior, as in llama.cpp and
    text-generation-webui, and a policy that reads the logits reads what truncation left.
    """

    name, signature = "order", "x|order(min_p, top_k, top_p, temperature)"
    summary = "when temperature and truncations act; without it: temperature, min_p, top_k, top_p"
    example = "sampler(T=1.5, min_p=0.1)|order(min_p, top_k, top_p, temperature)"

    order: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.order:
            if name not in SETTINGS:
                raise InputError(f"order has no {name!r:.40}; it has {', '.join(SETTINGS)}")
        if twice := [name for name in SETTINGS if self.order.count(name) > 1]:
            raise InputError(f"order names {twice[0]} twice; name each once")
        if "temperature" not in self.order:
            raise InputError(
                "order leaves temperature out; say where it acts, such as "
                f"order({', '.join((*self.order, 'temperature'))})"
            )
        for part in every_part(self.inner):
            if isinstance(part, OrderPolicy):
                raise InputError(f"two orders of one policy: {part} inside {self}; give one")
            if isinstance(part, SamplerPolicy):
                self._check_named(part.stated(), str(part))

    def check_given(self, given: RequestSettings, where: str) -> None:
        """Refuse a request's settings that this order leaves out."""
        if len(self.order) < len(SETTINGS):
            self._check_named(given.active(), where)

    def _check_named(self, names: Iterable[str], where: str) -> None:
        for name in names:
            if name not in self.order:
                raise InputError(
                    f"{self._order_text()} leaves out {name}, which {where} gives; say when it acts"
                )

    @property
    def truncates(self) -> bool:
        return True

    def temperatures(
        self, energies: Float[Tensor, "batch vocab"], states: Sequence[TokenState]
    ) -> Float64[Tensor, " batch"]:
        return self.inner.temperatures(energies, states)

    def cut(self, state: TokenState) -> Cut:
        self.check_given(state.given, "the request")
        return self.inner.cut(state)._replace(order=self.order)

    def _order_text(self) -> str:
        return f"{self.name}({', '.join(self.order)})"

    def __str__(self) -> str:
        return f"{self.inner}|{self._order_text()}"


def orders_of(policy: Policy) -> set[tuple[str, ...]]:
    """The orders in which a policy that truncates does so."""
    if isinstance(policy, OrderPolicy):
        return {policy.order}
    return set().union(*map(orders_of, policy.parts)) or {ORDER}


def stated_settings(policy: Policy) -> dict[str, Policy]:
    """The settings that a policy states somewhere, each with the first part that does."""
    found: dict[str, Policy] = {}
    for part in _stating(policy):
        names = part.stated() if isinstance(part, SamplerPolicy) else ("temperature",)
        for name in names:
            found.setdefault(name, part)
    return found


def _stating(policy: Policy) -> Iterator[Policy]:
    """The parts that state a setting: samplers, and whatever has no parts."""
    if isinstance(policy, SamplerPolicy) or not policy.parts:
        yield policy
    for part in policy.parts:
        yield from _stating(part)


def check_given(policy: Policy, given: RequestSettings, where: str) -> None:
    """Refuse settings that both a policy and its request give, and those that its order leaves out.

    where: whose settings these are, such as "the request".

    Raises InputError; names the setting, the part of the policy and both values.
    """
    stated = stated_settings(policy)
    for name, value in given.active().items():
        if name == "temperature" and name in stated:
            raise InputError(
                f"two temperatures: the policy {policy!s:.200}, and temperature="
                f"{number_text(value)} of {where}; send temperature=1"
            )
        if name in stated and policy.truncates:
            raise InputError(
                f"{name} is given twice: by {stated[name]!s:.200} and as {name}="
                f"{number_text(value)} of {where}; give it in one of them"
            )
    for part in every_part(policy):
        if isinstance(part, OrderPolicy):
            part.check_given(given, where)
