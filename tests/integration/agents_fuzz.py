"""Replies and errors drawn to break a reader: what a server sends, and what is to be left of it."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from typing import Any

NOISE = ["", " ", "\ud83d", "\udc00x", "\x00", "\x1b[31m", "\u202e", "\u2028", "é", "\U0001f600",
         "\ufffe", "<script>", "{{7*7}}", "[bold]", "\r\n", "%s", "\\", '"', "```", "|", "\x7f",
         "\ud83d\ude00", "a" * 3000]  # fmt: skip
JUNK = [None, True, -1, 0.5, float("nan"), float("inf"), 10**300, "", "x", [], {}, [[]],
        {"a": None}, [None], {"text": 3}, "\ud83d", 2**63, [{"b": [{}]}]]  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """status, headers, body: of the answer. kind: "text" where the marker is in a reply that was
    paid for, "reason" where it is in an error, "nothing" where the body says nothing."""

    status: int
    headers: dict[str, str]
    body: bytes
    kind: str


def draw(rng: random.Random, provider: str, marker: str) -> Drawn:
    """One answer."""
    share = rng.random()
    if share < 0.55:
        return _reply(rng, provider, marker)
    if share < 0.9:
        return _error(rng, marker)
    return _nothing(rng)


def _around(rng: random.Random, marker: str) -> str:
    return rng.choice(NOISE) + marker + rng.choice(NOISE)


def _reply(rng: random.Random, provider: str, marker: str) -> Drawn:
    text = _around(rng, marker)
    if provider == "server":
        parts: list[Any] = [
            text,
            [{"type": "text", "text": text}],
            [{"type": "thinking", "thinking": [{"type": "text", "text": "no"}]},
             {"type": "text", "text": text}],
            [text[: len(text) // 2], text[len(text) // 2 :]] if len(text) < 99 else [text],
            [None, 3, {"type": "output_text", "text": text}],
            {"type": "text", "text": {"value": text}},
        ]  # fmt: skip
        message = {"role": "assistant", "content": rng.choice(parts)}
        choice: dict[str, Any] = {"index": 0, "message": message}
        if rng.random() < 0.1:
            choice = {"text": text}
        if rng.random() < 0.8:
            finishes = ["stop", "length", "eos", 3, None, "\ud83d", {"a": 1}, "content_filter"]
            choice["finish_reason"] = rng.choice(finishes)
        body: dict[str, Any] = {"id": "x", "choices": [choice]}
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        used = "usage"
    elif provider == "anthropic":
        blocks: Any = [{"type": "thinking", "thinking": "no"}, {"type": "text", "text": text}]
        body = {"type": "message", "content": rng.choice([blocks, text, blocks[1:], blocks[1]])}
        body["stop_reason"] = rng.choice(["end_turn", "max_tokens", None, 3, "\ud83d"])
        names, used = ("input_tokens", "output_tokens"), "usage"
    else:
        inner = rng.choice([[{"text": text}], [{"text": "no", "thought": True}, {"text": text}]])
        candidate = {"content": {"role": "model", "parts": inner}}
        candidate["finishReason"] = rng.choice(["STOP", "NEW", None, 3])  # type: ignore[assignment]
        body = {"candidates": [candidate]}
        names, used = ("promptTokenCount", "candidatesTokenCount"), "usageMetadata"
    if rng.random() < 0.6:
        counts = {name: rng.choice([*JUNK, 5, 7, 20, "9", 5.0]) for name in names
                  if rng.random() < 0.8}  # fmt: skip
        body[used] = rng.choice([counts, counts, rng.choice(JUNK)])
    for _ in range(rng.randrange(3)):
        body[f"junk{rng.randrange(9)}"] = rng.choice(JUNK)
    if rng.random() < 0.1:
        body["error"] = rng.choice(JUNK)
    return Drawn(200, *_wired(rng, body), "text")


def _error(rng: random.Random, marker: str) -> Drawn:
    said = rng.choice(NOISE[:-1]) + marker + rng.choice(NOISE)
    shapes: list[Any] = [
        {"error": {"message": said}}, {"error": said}, {"detail": said}, {"message": said},
        {"error": {"message": said, "code": rng.choice(JUNK), "type": rng.choice(JUNK)}},
        {"detail": [{"loc": ["body", rng.choice(JUNK)], "msg": said, "type": "t"}]},
        [{"error": {"message": said, "details": rng.choice(JUNK)}}], [said], said,
        {"errors": [{"message": said}]}, {"error": {"message": {"detail": [said]}}},
        {"error": {"message": "upstream", "metadata": {"raw": said}}},
        {"error": rng.choice([None, True, {}]), "detail": said},
    ]  # fmt: skip
    headers, body = _wired(rng, rng.choice(shapes))
    if rng.random() < 0.25:
        plain = f"<!doctype html><title>t</title><p>{marker}</p>" if rng.random() < 0.5 else marker
        headers, body = {}, plain.encode()
    if rng.random() < 0.3:
        headers["Retry-After"] = rng.choice(["0.01", "600", "-1", "nan", "soon", "10ms", "1e400"])
    inside = {"error": {"message": marker, "code": rng.choice([402, 503, "429", None, "x"])}}
    status = rng.choice([400, 401, 403, 404, 405, 409, 413, 418, 422, 429, 500, 501, 503, 529, 200])
    if status == 200:
        headers, body = {}, json.dumps(inside).encode()
    return Drawn(status, headers, body, "reason")


def _nothing(rng: random.Random) -> Drawn:
    body = rng.choice([
        b"", b"null", b"[]", b"{}", b"3", b'"x"', b"[[[[", b"[" * 5000, b'{"choices": [{"mess',
        rng.randbytes(60), b"\x00" * 50, b'{"choices": {"a": 1}}', b'{"choices": [null]}',
        b'{"choices": "x"}', b'{"choices": [{"message": [1]}]}', b"9" * 6000, b"data: [DONE]\n\n",
        b'{"choices": [{"message": {"content": 3}}]}', b'{"content": null, "candidates": null}',
        b'{"candidates": [{"content": {"parts": [{"text": null}]}}]}',
    ])  # fmt: skip
    return Drawn(200, {}, body, "nothing")


def _wired(rng: random.Random, body: Any) -> tuple[dict[str, str], bytes]:
    """A JSON value in one of the forms in which servers send it."""
    text = json.dumps(body)
    share = rng.random()
    if share < 0.1:
        data = json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass")
    elif share < 0.15:
        data = b"\xef\xbb\xbf\n " + text.encode()
    elif share < 0.2 and text.startswith("{"):
        data = b'{"big": ' + b"9" * 5000 + b", " + text.encode()[1:]
    elif share < 0.25:
        return {"Content-Encoding": "gzip"}, gzip.compress(text.encode())
    elif share < 0.28:
        data = text.encode("utf-16")
    else:
        data = text.encode()
    return {}, data
