"""Keys come from the environment, and nothing that is kept or shown may hold one."""

from __future__ import annotations

import os

from tempering.errors import InputError

VARIABLES = {
    "openai": ("OPENAI_API_KEY",),
    "anthropic": ("ANTHROPIC_API_KEY",),
    "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    "server": ("TEMPERING_SERVER_KEY",),
}
# Other variables that the SDKs read by themselves.
_ALSO = ("ANTHROPIC_AUTH_TOKEN", "OPENAI_ADMIN_KEY", "OPENAI_WEBHOOK_SECRET")


def key_of(provider: str) -> str | None:
    """The key of a provider; InputError names the variable where one is needed and none is set.

    A server of one's own may need none; it is never given another provider's.
    """
    for name in VARIABLES[provider]:
        if value := os.environ.get(name, "").strip():
            return value
    if provider == "server":
        return None
    raise InputError(
        f"the engine {provider} needs a key in the environment variable "
        f"{' or '.join(VARIABLES[provider])}"
    )


def redacted(text: str) -> str:
    """`text` with every key of the environment replaced."""
    names = [name for group in VARIABLES.values() for name in group]
    for name in (*names, *_ALSO):
        value = os.environ.get(name, "").strip()
        if value:
            text = text.replace(value, f"[{name}]")
    return text
