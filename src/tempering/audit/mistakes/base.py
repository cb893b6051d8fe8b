"""What a mistake is: a function of the model that yields cases, each a change that is undone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tempering.attention.examining.layout_of import layout
from tempering.errors import InputError


@dataclass(frozen=True)
class MistakeCase:
    """One way of being wrong.

    name: what the engine does, as the end of "as if ...". change: makes a context manager in which
    the reference does the same. least: tokens that a prompt needs to show it.
    """

    name: str
    change: Callable[[], AbstractContextManager[Any]]
    least: int = 0


Mistake = Callable[[Any], Iterable[MistakeCase]]
KNOWN: list[Mistake] = []


def mistake(function: Mistake) -> Mistake:
    """Add a mistake to the catalogue."""
    KNOWN.append(function)
    return function


def cases(model: nn.Module, mistakes: Sequence[Mistake] | None = None) -> list[MistakeCase]:
    """Every case that a model allows; InputError for two of one name."""
    found: dict[str, MistakeCase] = {}
    for item in KNOWN if mistakes is None else mistakes:
        for case in item(model):
            if case.name in found:
                raise InputError(f"two mistakes are called '{case.name}'; rename one")
            found[case.name] = case
    return list(found.values())


def attention_modules(model: nn.Module) -> list[Any]:
    """The modules that attend, in order of depth."""
    return [model.get_submodule(layer.name) for layer in layout(model).layers]


def text_config(model: Any) -> Any:
    """The configuration of the language model."""
    return model.config.get_text_config()


def attributes(targets: Sequence[Any], **values: Any) -> Callable[[], AbstractContextManager[None]]:
    """A change: attributes of objects have these values, functions of the object's own value, or
    one for each object in a list."""

    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        before = [(item, {name: getattr(item, name) for name in values}) for item in targets]
        try:
            for place, item in enumerate(targets):
                for name, value in values.items():
                    own = getattr(item, name)
                    if isinstance(value, list):
                        setattr(item, name, value[place])
                    else:
                        setattr(item, name, value(own) if callable(value) else value)
            yield
        finally:
            for item, own in before:
                for name, value in own.items():
                    setattr(item, name, value)

    return changed


def everywhere(function: Mistake) -> Mistake:
    """A mistake whose cases of one name are one case that makes all of their changes.

    For mistakes that go through modules: a model may have one for all of its layers, or one each.
    """

    @functools.wraps(function)
    def joined(model: Any) -> list[MistakeCase]:
        groups: dict[str, list[MistakeCase]] = {}
        for case in function(model):
            groups.setdefault(case.name, []).append(case)
        return [
            MistakeCase(name, together(*(item.change for item in group)), group[0].least)
            for name, group in groups.items()
        ]

    return joined


def together(
    *changes: Callable[[], AbstractContextManager[Any]],
) -> Callable[[], AbstractContextManager[None]]:
    """Several changes as one."""

    @contextlib.contextmanager
    def changed() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(change())
            yield

    return changed
