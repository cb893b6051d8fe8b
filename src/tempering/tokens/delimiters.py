"""Which delimiters of a phase a tokenizer uses, and whether it can produce them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from tempering.errors import InputError, TemperingWarning
from tempering.tokens.known_delimiters import KNOWN_DELIMITERS, Delimiter, Header, KnownDelimiters
from tempering.tokens.token_bytes import TokenBytes


class PhaseDelimiters(NamedTuple):
    """Openers and closers of one phase.

    named: whether the tokenizer names them; otherwise they are assumed.
    """

    opens: tuple[Delimiter, ...]
    closes: tuple[Delimiter, ...]
    named: bool = True


def texts_of(delimiter: Delimiter) -> tuple[str, ...]:
    """The texts that a delimiter is made of."""
    if isinstance(delimiter, Header):
        return delimiter.parts
    return (delimiter,) if isinstance(delimiter, str) else ()


def named_delimiters(phase: str, token_bytes: TokenBytes, tokenizer: Any) -> PhaseDelimiters:
    """The known delimiters that the tokenizer's vocabulary or chat template names, or none."""
    template = str(getattr(tokenizer, "chat_template", None) or "")

    def says(text: str) -> bool:
        return text in template or token_bytes.has_token(text)

    return _joined(
        known
        for known in KNOWN_DELIMITERS[phase]
        if any(all(map(says, group)) for group in known.named_by)
    )


def delimiters_of(phase: str, token_bytes: TokenBytes, tokenizer: Any) -> PhaseDelimiters:
    """The delimiters of a known phase for this tokenizer.

    Where it names none, the first known pair is looked for as text. A warning says so, because a
    model that writes another pair is never in the phase.
    """
    known = named_delimiters(phase, token_bytes, tokenizer)
    if known.opens:
        return known
    assumed = _joined(KNOWN_DELIMITERS[phase][:1])._replace(named=False)
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


def _joined(entries: Iterable[KnownDelimiters]) -> PhaseDelimiters:
    entries = list(entries)
    return PhaseDelimiters(
        tuple(dict.fromkeys(delimiter for entry in entries for delimiter in entry.opens)),
        tuple(dict.fromkeys(delimiter for entry in entries for delimiter in entry.closes)),
    )


def delimiter_text(delimiter: Delimiter) -> str:
    """A delimiter as the text form of policies writes it."""
    if isinstance(delimiter, tuple):
        return f"ids({','.join(map(str, delimiter))})"
    return json.dumps(str(delimiter), ensure_ascii=False)


def check_producible(
    delimiter: Delimiter, token_bytes: TokenBytes, what: str = "delimiter"
) -> None:
    """Refuse a delimiter, or another text, that this tokenizer can't produce."""
    for text in texts_of(delimiter):
        if text in token_bytes.tags:
            continue
        ids = token_bytes.tokenizer.encode(text, add_special_tokens=False)
        made = token_bytes.join(ids)
        if text.encode() not in made:
            raise InputError(
                f"this tokenizer can't produce the {what} {text!r}: encoding it gives "
                f"{made.decode(errors='replace')!r}; give the {what} as the model writes it, "
                "or as ids(...)"
            )
    for token in delimiter if isinstance(delimiter, tuple) else ():
        if not 0 <= token < token_bytes.size:
            raise InputError(
                f"this tokenizer can't produce the {what} ids{delimiter}: it has ids "
                f"0..{token_bytes.size - 1}, not {token}; ids differ between model versions, so "
                "prefer the text"
            )
