"""Sample texts that come with the package; `SOURCES.md` beside this file states their origin."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources

from tempering.errors import DataError


@dataclass(frozen=True)
class Text:
    """A sample text.

    Attributes
    ----------
    name: what `sample_text` takes.
    kind: fiction, reference, play or code.
    description: author, title, part.
    licence: SPDX identifier, or "public domain".
    """

    name: str
    kind: str
    description: str
    licence: str


_TEXTS = (
    Text("demo", "fiction", "Jane Austen, Persuasion (1818), chapters 1-4", "public domain"),
    Text(
        "fiction", "fiction", "Jane Austen, Northanger Abbey (1818), chapters 1-7", "public domain"
    ),
    Text("reference", "reference", "The World Factbook (2015), 22 countries", "public domain"),
    Text("play", "play", "Shakespeare, Much Ado About Nothing, acts I-III", "public domain"),
    Text("code", "code", "Python 3.11 standard library, six modules", "PSF-2.0"),
)


def texts() -> dict[str, Text]:
    """The sample texts by name."""
    return {text.name: text for text in _TEXTS}


def sample_text(name: str) -> str:
    """The sample text called `name`, 50 to 100 KB of English; DataError for an unknown name."""
    known = texts()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"no sample text {name!r}; {hint}there are: {', '.join(known)}")
    return resources.files(__package__).joinpath(f"{name}.txt").read_text(encoding="utf-8")
