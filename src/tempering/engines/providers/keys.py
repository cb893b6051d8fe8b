"""API keys: read from the environment, checked to fit into a header, redacted from errors."""

from __future__ import annotations

import html
import json
import os
import re
from urllib.parse import quote, quote_plus

from tempering.errors import InputError

VARIABLES = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "server": ("TEMPERING_SERVER_KEY",),
}

SHORTEST = 8  # characters; shorter ones occur in ordinary text
# What people write where a server asks for a key and reads none.
_PLACEHOLDER = re.compile(
    r"(?:sk|no|not|none|null|empty|dummy|test|fake|key|api|token|required|needed|placeholder|"
    r"change|me|your|my|here|local|localhost|ollama|lm|studio|vllm|llama|cpp|x|\*|password|"
    r"secret|anything|unused|undefined|default|example|server|[\s._<>-])+",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Z]?[a-z]{,11}|[A-Z]{,11}")
# A prefix such as "sk-ant-api03-" names the vendor, is printed in every manual, and is no secret.
_VENDOR = re.compile(r"(?:[a-z]{2,6}[-_](?:(?:ant|proj|or|svcacct|admin|api\d+|v\d+)[-_])*|AIza)?")


def key_of(provider: str) -> str | None:
    """The key of a provider.

    Raises InputError, which names the variable, where a key is needed and none is set, and where
    the variable holds a character that no key has: a line break, a typographic quote. A user's own
    server may need no key, and is never given a provider's.
    """
    for name in VARIABLES[provider]:
        if value := os.environ.get(name, "").strip():
            return _checked(name, value)
    if provider == "server":
        return None
    raise InputError(
        f"the engine {provider} needs a key in the environment variable "
        f"{' or '.join(VARIABLES[provider])}"
    )


def _checked(name: str, key: str) -> str:
    """A key that a header can hold; InputError shows the one wrong character, never the key."""
    for place, character in enumerate(key, 1):
        if "!" <= character <= "~":
            continue
        known = {"\n": "a line break", "\r": "a line break", "\t": "a tab", " ": "a space"}
        known |= dict.fromkeys("“”„‘’«»", "a typographic quote")
        what = known.get(character, "a character that no key has")
        raise InputError(
            f"the key in {name} holds {what} (U+{ord(character):04X}) at character {place} of "
            f"{len(key)}; set the variable to the key alone, as the provider shows it"
        )
    if len(key) > 1 and key[0] == key[-1] and key[0] in "\"'`":
        raise InputError(
            f"the key in {name} stands between quotes that belong to it; set it without them"
        )
    return key


def redacted(text: str) -> str:
    """`text` with the environment's keys, and recognisable pieces of them, replaced by their names.

    It is for errors, before they are cut, and never for a model's output. A key is looked for as it
    is, percent-encoded, and escaped as JSON and HTML escape it. A short key, a word or a
    placeholder such as "none" is no secret, and stays.
    """
    for names in VARIABLES.values():
        for name in names:
            value = os.environ.get(name, "").strip()
            if _secret(value):
                forms = {value, quote(value, safe=""), quote_plus(value), html.escape(value)}
                forms |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
                for form in sorted(forms, key=len, reverse=True):
                    text = _without(text, form, f"[{name}]")
    return text


def _secret(key: str) -> bool:
    return (
        len(key) >= SHORTEST
        and _PLACEHOLDER.fullmatch(key) is None
        and _WORD.fullmatch(key) is None
    )


def _without(text: str, key: str, name: str) -> str:
    """`text` without the key, and without its pieces of 8 characters or more."""
    text = text.replace(key, name)
    match = _VENDOR.match(key)
    own = key[match.end() :] if match else key
    pieces = {own[i : i + SHORTEST] for i in range(len(own) - SHORTEST + 1)}
    # Eight small letters may be a word of the message; sixteen in a row are the key's.
    pieces = {piece for piece in pieces if not re.fullmatch(r"[a-z _-]+", piece)}
    pieces |= {own[i : i + 2 * SHORTEST] for i in range(len(own) - 2 * SHORTEST + 1)}
    if not pieces:
        return text
    kept, last, place = [], 0, 0
    while place < len(text):
        sizes = [n for n in (SHORTEST, 2 * SHORTEST) if text[place : place + n] in pieces]
        if not sizes:
            place += 1
            continue
        end = place + max(sizes)
        while end < len(text) and text[end - SHORTEST + 1 : end + 1] in key:
            end += 1
        kept += [text[last:place], name]
        last = place = end
    return "".join([*kept, text[last:]])
