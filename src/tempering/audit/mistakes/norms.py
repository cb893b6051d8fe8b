"""Mistakes with the norms of queries and keys: missing, or after the rotation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tempering.audit.mistakes.base import MistakeCase, attention_modules, mistake


def _normed(model: Any) -> list[Any]:
    """Attention modules with a norm over each head's queries and keys."""
    return [
        m
        for m in attention_modules(model)
        if all(
            getattr(getattr(m, name, None), "weight", None) is not None
            and getattr(m, name).weight.numel() == getattr(m, "head_dim", None)
            for name in ("q_norm", "k_norm")
        )
    ]


@mistake
def norms(model: Any) -> Iterator[MistakeCase]:
    """Norms of queries and keys missing, or done after the rotation."""
    modules = _normed(model)
    if not modules:
        return
    yield MistakeCase("its norms of queries and keys were missing", lambda: _skipped(modules))
    places = [sys.modules[type(m).__module__] for m in modules]
    if all(hasattr(place, "apply_rotary_pos_emb") for place in places):
        yield MistakeCase(
            "it normed queries and keys after the rotation", lambda: _after(modules, places)
        )


@contextlib.contextmanager
def _forwards(changes: list[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    try:
        for module, forward in changes:
            module.forward = forward
        yield
    finally:
        for module, _ in changes:
            module.__dict__.pop("forward", None)


def _skipped(modules: list[Any]) -> Any:
    return _forwards([(m, lambda x: x) for item in modules for m in (item.q_norm, item.k_norm)])


@contextlib.contextmanager
def _after(modules: list[Any], places: list[Any]) -> Iterator[None]:
    """Each norm lets its input pass and is applied to what the rotation hands back."""
    waiting: list[Callable[[Any], Any]] = []

    def held(norm: Any) -> Callable[[Any], Any]:
        own = norm.forward

        def forward(x: Any) -> Any:
            waiting.append(own)
            return x

        return forward

    before = {place: place.apply_rotary_pos_emb for place in places}

    def rotating(own: Callable[..., Any]) -> Callable[..., Any]:
        def apply(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
            q, k = own(q, k, *args, **kwargs)
            if len(waiting) == 2:
                k_norm, q_norm = waiting.pop(), waiting.pop()
                q, k = q_norm(q), k_norm(k)
            return q, k

        return apply

    changes = [(m, held(m)) for item in modules for m in (item.q_norm, item.k_norm)]
    with _forwards(changes):
        try:
            for place, own in before.items():
                place.apply_rotary_pos_emb = rotating(own)
            yield
        finally:
            for place, own in before.items():
                place.apply_rotary_pos_emb = own
