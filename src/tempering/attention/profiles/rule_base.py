"""What every rule is: one more inverse temperature for every query, with a text form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from tempering.binding import bind, number_arguments
from tempering.calls import Argument, CallNode, Grammar, call_text
from tempering.errors import ProfileError

GRAMMAR = Grammar("rule", ProfileError)
KNOWN: dict[str, type[Rule]] = {}  # name in the text form -> class


class PerHead(tuple[float, ...]):
    """A number for every head of a layer; heads(0.1,0.2,0.3) in the text form."""

    name, signature = "heads", "heads(a, b, ..)"

    def __new__(cls, values: Iterable[float | int]) -> PerHead:
        return super().__new__(cls, map(float, values))

    @classmethod
    def of(cls, call: CallNode) -> PerHead:
        """The numbers of a call heads(..); at least one."""
        values = number_arguments(call, cls.signature)
        if not values:
            raise call.complaint(f"{cls.signature} takes a number for every head of the layer")
        return cls(values)

    def __str__(self) -> str:
        return call_text(self.name, *self)


def _number_or_heads(argument: Argument, what: str) -> float | PerHead:
    value = argument.value
    if isinstance(value, CallNode) and value.name == PerHead.name:
        return PerHead.of(value)
    return argument.number(what)


class Rule(ABC):
    """One more inverse temperature for every query. Immutable; rules of equal text are equal.

    A `QueryRule` reads the logits of a query, a `LengthRule` how many keys it sees.
    """

    name: ClassVar[str]
    signature: ClassVar[str]
    readers: ClassVar[Mapping[str, Any]] = {
        "float": Argument.number,
        "int": Argument.whole,
        "float | PerHead": _number_or_heads,
    }

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "name" in cls.__dict__:
            KNOWN[cls.name] = cls

    @classmethod
    def of(cls, call: CallNode) -> Rule:
        """The rule of this kind that a call makes."""
        bound = bind(call, cls, cls.readers)
        return call.made(lambda: cls(*bound))

    @property
    def heads(self) -> int | None:
        """For how many heads the rule has numbers; None where one number serves all."""
        return None

    @property
    def label(self) -> str:
        """The text form without the numbers of single heads, for messages."""
        return str(self)

    @abstractmethod
    def __str__(self) -> str:
        """The text form; `rule` reads it back as an equal rule."""
