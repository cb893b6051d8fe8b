"""Which delimiters of a phase a tokenizer uses, and whether it can produce them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from tempering.errors import InputError, TemperingWarning
from tempering.tokens.known import KNOWN, Header, Known, Mark
from tempering.tokens.pieces import Pieces

__all__ = ["KNOWN", "Delimiters", "Header", "Mark", "check_producible", "chosen", "named"]


class Delimiters(NamedTuple):
    """Openers and closers of one phase. named: by the tokenizer, rather than assumed."""

    opens: tuple[Mark, ...]
    closes: tuple[Mark, ...]
    named: bool = True


def texts_of(mark: Mark) -> tuple[str, ...]:
    """The texts that a delimiter is made of."""
    if isinstance(mark, Header):
        return mark.parts
    return (mark,) if isinstance(mark, str) else ()


def named(phase: str, pieces: Pieces, tokenizer: Any) -> Delimiters:
    """The known delimiters that the tokenizer's vocabulary or chat template names; perhaps none."""
    template = str(getattr(tokenizer, "chat_template", None) or "")

    def says(text: str) -> bool:
        return text in template or pieces.has_token(text)

    found = [k for k in KNOWN[phase] if any(all(map(says, group)) for group in k.named_by)]
    return _joined(found)


def chosen(phase: str, pieces: Pieces, tokenizer: Any) -> Delimiters:
    """The delimiters of a known phase for this tokenizer.

    Where it names none, the first known pair is looked for as text, with a warning: a model that
    writes another would never be in the phase, and nobody would be told.
    """
    found = named(phase, pieces, tokenizer)
    if found.opens:
        return found
    assumed = _joined(KNOWN[phase][:1])._replace(named=False)
    if phase != "code":  # fences are the same for all models
        opener, closer = assumed.opens[0], assumed.closes[0]
        warnings.warn(
            f"neither the vocabulary nor the chat template of this tokenizer names delimiters of "
            f"{phase}: {opener!r} and {closer!r} are looked for as text, and a model that writes "
            f"others is never in {phase}; state them, e.g. "
            f'{phase}=between(0.7, "{opener}", "{closer}")',
            TemperingWarning,
            stacklevel=2,
        )
    return assumed


def _joined(entries: Iterable[Known]) -> Delimiters:
    entries = list(entries)
    return Delimiters(
        tuple(dict.fromkeys(mark for entry in entries for mark in entry.opens)),
        tuple(dict.fromkeys(mark for entry in entries for mark in entry.closes)),
    )


def check_producible(mark: Mark, pieces: Pieces) -> None:
    """Refuse a delimiter that this tokenizer can't produce."""
    for text in texts_of(mark):
        if text in pieces.tags:
            continue
        ids = pieces.tokenizer.encode(text, add_special_tokens=False)
        made = pieces.join(ids)
        if text.encode() not in made:
            raise InputError(
                f"this tokenizer can't produce the delimiter {text!r}: encoding it gives "
                f"{made.decode(errors='replace')!r}; give the delimiter as the model writes it, "
                "or as ids(...)"
            )
    for token in mark if isinstance(mark, tuple) else ():
        if not 0 <= token < pieces.size:
            raise InputError(
                f"this tokenizer can't produce the delimiter ids{mark}: it has ids "
                f"0..{pieces.size - 1}, not {token}; ids differ between model versions, so "
                "prefer the text"
            )
