"""The arguments of a call, bound to the fields of what it makes as Python binds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from tempering.calls import Argument, CallNode

Readers = Mapping[str, Callable[[Argument, str], Any]]
_IN_SIGNATURES = {"inner": "x", "within": "y"}  # field -> the name that signatures give it


def bind(call: CallNode, kind: Any, readers: Readers) -> list[Any]:
    """The arguments of a call in the order of a dataclass's fields, bound as Python binds them.

    Parameters
    ----------
    kind: the dataclass that the call names; its `signature` begins messages.
    readers: a field's type, as it is written in the class -> what reads its argument.

    Raises the grammar's error at the column of an argument that is unknown, given twice, missing,
    or not what its field takes.
    """
    by_name = {_IN_SIGNATURES.get(each.name, each.name): each for each in fields(kind)}
    values: dict[str, Any] = {}
    names = list(by_name)
    for index, argument in enumerate(call.arguments):
        if argument.keyword is not None:
            name = argument.keyword
        elif index < len(names):
            name = names[index]
        else:
            most = f"{len(names)} argument{'' if len(names) == 1 else 's'}"
            raise argument.complaint(f"{kind.signature} takes {most} at most")
        if name not in by_name:
            raise argument.complaint(
                f"{kind.signature} has no argument {name!r}; it has {', '.join(names)}"
            )
        if name in values:
            raise argument.complaint(f"{kind.signature}: {name} is given twice")
        what = by_name[name].type
        read = readers[what.__name__ if isinstance(what, type) else str(what)]
        values[name] = read(argument, f"{kind.signature}: {name}")
    for name, each in by_name.items():
        if name not in values and each.default is MISSING:
            raise call.complaint(f"{kind.signature} needs {name}")
    return [values.get(name, each.default) for name, each in by_name.items()]


def number_arguments(call: CallNode, signature: str) -> tuple[float, ...]:
    """The arguments of a call that takes any number of numbers and nothing else."""
    for argument in call.arguments:
        if argument.keyword is not None:
            raise argument.complaint(
                f"{signature} has no argument {argument.keyword!r}; write its numbers alone"
            )
    return tuple(argument.number(signature) for argument in call.arguments)
