"""The reason for an error from a server's body, in any of these shapes, and what to try.

{"error": {"message": R}}  {"error": R}  {"detail": R}  {"detail": [{"loc": [..], "msg": R}]}
{"message": R}  {"errors": [..]}  [{"error": ..}]  "R"  R  <html>..R..</html>
"""

from __future__ import annotations

import contextlib
import html
import re
from http import HTTPStatus
from typing import Any

from tempering.engines.providers.bodies import load, text_of_bytes
from tempering.files import whole_characters

LONGEST = 400  # characters of a reason that are kept
READ = 8192  # characters of a body in which a reason is looked for
# Fields that may hold the reason, in the order in which they are looked at.
_NAMES = ("error", "message", "msg", "detail", "details", "errors", "error_message",
          "error_description", "reason", "title", "description", "fault")  # fmt: skip
# Fields that hold the kind of an error; quotaId is Gemini's.
_KINDS = ("code", "type", "status", "reason", "quotaId")


def reason_of(data: bytes) -> str:
    """A server's reason as one line of text; "" where its body holds none."""
    text = text_of_bytes(data[: 4 * READ]).strip()[:READ]
    try:
        said = _words(load(data))
    except ValueError:
        said = ""
    if not said and is_page(data):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        body = re.sub(r"<(script|style|head)\b.*?</\1\s*>|<[^>]*>", " ", text,
                      flags=re.IGNORECASE | re.DOTALL)  # fmt: skip
        parts = [plain(html.unescape(part)) for part in (title[1] if title else "", body)]
        said = "a web page" + "".join(f": {part}" for part in dict.fromkeys(parts) if part)
    return said or plain(text)


def is_page(data: bytes) -> bool:
    """Whether a body is a page for a browser."""
    return re.match(rb"\s*(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|head|body)\b", data[:400],
                    re.IGNORECASE) is not None  # fmt: skip


def plain(text: str) -> str:
    """Text for one line of a terminal: whole characters, no control characters."""
    text = "".join(c if c.isprintable() else " " for c in whole_characters(text[:READ]))
    return " ".join(text.split())


def cut(text: str) -> str:
    """The beginning of a long text. Redact first: a key that is cut is no longer recognised."""
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def codes_of(data: bytes) -> set[str]:
    """The kinds that an error gives itself, in its fields code, type, status and reason."""
    found: set[str] = set()

    def walk(value: Any, depth: int) -> None:
        if depth > 8:
            return
        if isinstance(value, list):
            for item in value[:20]:
                walk(item, depth + 1)
        elif isinstance(value, dict):
            for name, item in value.items():
                if name in _KINDS and isinstance(item, str):
                    found.add(item)
                walk(item, depth + 1)

    with contextlib.suppress(ValueError):
        walk(load(data), 0)
    return found


def advice(status: int, data: bytes, url: str) -> str:
    """What to try, where the address seems at fault rather than the request; "" elsewhere."""
    page = is_page(data)
    if not url or (not page and status not in (404, 405)):
        return ""
    path = re.sub(r"^https?://[^/]*", "", url)
    if not re.search(r"/v\d+(?:beta\d*)?/", path):
        base = url.removesuffix("/chat/completions")
        return f"; {url} was asked, the server's address may be {base}/v1"
    named = data.lstrip()[:1] == b"{" and reason_of(data).lower() != "not found"
    return "" if named else f"; {url} was asked, which may not be the server's address"


def phrase(status: int) -> str:
    """The standard meaning of a status, where the server gives no reason."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "no reason given"


def _words(value: Any, depth: int = 0) -> str:
    """The reason within a JSON value."""
    if depth > 8:
        return ""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, list):
        parts = (_words(item, depth + 1) for item in value[:5])
        return "; ".join(dict.fromkeys(part for part in parts if part))
    if not isinstance(value, dict):
        return ""
    said = next((words for name in _NAMES if (words := _words(value.get(name), depth + 1))), "")
    place = value.get("loc")
    if said and isinstance(place, list):  # FastAPI: which field of the request is off
        said = f"{'.'.join(plain(str(part)) for part in place[:8])}: {said}"
    code = next((item for name in ("code", "type", "status")
                 if isinstance(item := value.get(name), str)), "")  # fmt: skip
    if plain(code).lower() not in said.lower() and code != "invalid_request_error":
        said = f"{said} ({plain(code)})" if said else plain(code)
    more = value.get("metadata")  # what a router was told by the server behind it
    raw = _words(more.get("raw"), depth + 1) if isinstance(more, dict) else ""
    return f"{said}: {raw}" if raw and raw not in said else said
