"""Log probabilities that an engine gave of the tokens of prompts: data, checks, and their file.

A file holds JSON lines, one a prompt:

    {"tokens": [464, 2068, 7586], "logprobs": [null, -8.71, -4.02]}

logprobs[i] is log q(tokens[i] | tokens[:i]) in nats; null where the engine gives none, as for the
first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tempering.errors import DataError
from tempering.files import read_json, read_text

# The first token has no log probability, and that of the second is left out: what an engine adds
# before a prompt, or loses there, changes the second token's most.
FIRST = 2
# Engines write -9999 or so for what they have no number for (vLLM does for -inf).
_LOWEST = -1000.0


@dataclass(frozen=True)
class Scored:
    """A prompt and what an engine says of it.

    tokens: ids. logprobs: one for each token, nats; None where there is none. origin: names it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    origin: str

    @property
    def places(self) -> list[int]:
        """The tokens that count: from the third on, with a log probability."""
        return [i for i in range(FIRST, len(self.tokens)) if self.logprobs[i] is not None]

    @property
    def values(self) -> list[float]:
        """Log probabilities at `places`, nats."""
        return [value for value in self.logprobs[FIRST:] if value is not None]


def scored(
    tokens: Sequence[Any], logprobs: Sequence[Any], origin: str, vocabulary: int | None = None
) -> Scored:
    """A checked `Scored`; DataError says which prompt and token are not what they should be."""
    if len(tokens) != len(logprobs):
        raise DataError(
            f"{origin}: {len(tokens)} tokens and {len(logprobs)} log probabilities; give one for "
            "each token, null for the first"
        )
    values: list[float | None] = []
    for place, (token, value) in enumerate(zip(tokens, logprobs, strict=True)):
        where = f"{origin}, token {place}"
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise DataError(f"{where}: expected a token id, got {_shown(token)}")
        if vocabulary is not None and token >= vocabulary:
            raise DataError(
                f"{where}: id {_shown(token)}, and the reference has {vocabulary} tokens: its "
                "tokenizer is another one; name the model that the engine serves"
            )
        if value is None:
            values.append(None)
            continue
        # Whole numbers have no largest one: they are compared before they become float64.
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise DataError(f"{where}: expected a log probability or null, got {_shown(value)}")
        if value > 0:
            raise DataError(
                f"{where}: a log probability is at most 0, got {_shown(value)}; are these "
                "probabilities? Give their natural logarithms"
            )
        if value < _LOWEST:
            raise DataError(
                f"{where}: the log probability {_shown(value)} stands for none at all; does the "
                "engine mask this token, or give only the top ones? Leave the prompt out"
            )
        values.append(float(value))
    missing = [i for i, value in enumerate(values) if i >= FIRST and value is None]
    if 2 * len(missing) > len(values) - FIRST > 0:
        raise DataError(
            f"{origin}: {len(missing)} of {len(values)} tokens have no log probability, the first "
            f"at {missing[0]}: the engine gives those of its top tokens only, or cut the prompt; "
            "ask for the log probability of every token of the prompt"
        )
    return Scored(tuple(tokens), tuple(values), origin)


def once(prompts: Sequence[Scored]) -> list[Scored]:
    """The prompts, with None for each token that another prompt has after the same tokens.

    Its log probability is the same number again, so that a second one would make intervals
    narrower and tell nothing: of a prompt given twice, or of a beginning that prompts share, the
    first counts.
    """
    nodes: dict[tuple[int, int], int] = {}  # the tree of prompts' beginnings
    found = []
    for item in prompts:
        node, values = 0, list(item.logprobs)
        for place, token in enumerate(item.tokens):
            if (node, token) in nodes:
                values[place] = None
            node = nodes.setdefault((node, token), len(nodes) + 1)
        found.append(replace(item, logprobs=tuple(values)))
    return found


def read_scores(path: str | Path, vocabulary: int | None = None) -> list[Scored]:
    """The prompts of a file of JSON lines, with what the engine said of them.

    vocabulary: the number of the reference's tokens. DataError names the line that is wrong.
    """
    rows: list[Scored] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        item = read_json(line, where)
        lists = [item.get(key) if isinstance(item, dict) else None for key in _KEYS]
        tokens, logprobs = lists
        if not isinstance(tokens, list) or not isinstance(logprobs, list):
            raise DataError(
                f'{where}: expected {{"tokens": [464, ...], "logprobs": [null, -8.7, ...]}}, '
                f"got {line.strip()[:60]}"
            )
        rows.append(scored(tokens, logprobs, where, vocabulary))
    if not rows:
        raise DataError(f"{path} is empty; give one JSON line for each prompt")
    return rows


_KEYS = ("tokens", "logprobs")


def _shown(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
