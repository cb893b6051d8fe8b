"""OpenAI, and servers that speak its chat interface: vLLM, llama.cpp, Ollama and others."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from tempering.agents.contract import Call
from tempering.agents.temperatures import Sent
from tempering.engines.providers import reasons
from tempering.engines.providers.addresses import address_of, checked
from tempering.engines.providers.bodies import count, first, load, mapping, text_of, word
from tempering.engines.providers.keys import key_of
from tempering.engines.providers.replies import Completion, MalformedError, opened
from tempering.engines.providers.transport import HTTPResponse, HTTPStatusError

# `tempering serve` has profiles by name (--named); a call names one of them by its attention. It
# takes the text of a policy by token as it is.
ATTENTION_ARGUMENT = "tempering_profile"
POLICY_ARGUMENT = "tempering"
LIMITS = ("max_tokens", "max_completion_tokens")
_UNKNOWN = re.compile(r"support|recogni|unknown|unexpected|extra|permitted|allowed", re.IGNORECASE)


class OpenAICompatible:
    """A client of OpenAI, or of the server at `url`.

    url: e.g. http://localhost:8000/v1. attention: the server has tempering's plugin.
    """

    def __init__(self, url: str | None = None, *, attention: bool = False) -> None:
        self.provider = "openai" if url is None else "server"
        self.has_attention = attention
        self.has_policies = url is not None
        if url is None:
            self.spec = "openai"
            self.address = address_of("OPENAI_BASE_URL", "https://api.openai.com/v1")
        else:
            self.address = checked(url)
            self.spec = ("vllm:" if attention else "") + self.address
        self.key = key_of(self.provider)
        # OpenAI's reasoning models refuse max_tokens; older servers know only max_tokens.
        self.limit = LIMITS[1] if url is None else LIMITS[0]
        self.takes_stop = True

    def url(self, model: str) -> str:
        """The address of calls."""
        return f"{self.address}/chat/completions"

    def headers(self) -> dict[str, str]:
        """The key; for OpenAI, and no other server, also organisation and project."""
        found = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        if self.provider == "openai":
            names = {"openai-organization": "OPENAI_ORG_ID", "openai-project": "OPENAI_PROJECT_ID"}
            for header, variable in names.items():
                if value := os.environ.get(variable, "").strip():
                    found[header] = value
        return found

    def body(self, call: Call, sent: Sent, model: str, seed: bool) -> dict[str, Any]:
        """The request."""
        messages = [{"role": "user", "content": call.prompt}]
        if call.system is not None:
            messages.insert(0, {"role": "system", "content": call.system})
        body: dict[str, Any] = {"model": model, "messages": messages, self.limit: call.tokens}
        body |= sent.extra
        for field, value in (
            ("temperature", sent.temperature),
            ("top_p", sent.top_p),
            ("seed", call.seed if seed else None),
            ("stop", call.stop if self.takes_stop else None),
        ):
            if value is not None:
                body[field] = value
        own = {ATTENTION_ARGUMENT: call.attention, POLICY_ARGUMENT: call.token_policy}
        if arguments := {name: text for name, text in own.items() if text is not None}:
            body["vllm_xargs"] = arguments
        return body

    def amend(self, body: dict[str, Any], reason: str) -> bool:
        """Whether a refused request has another form; later requests then have it from the start.

        The limit of tokens has two names, of which a server may know only one. A stop text that a
        server refuses can be left out, since the output is cut at it here anyway.
        """
        used = next(name for name in LIMITS if name in body)
        other = LIMITS[used == LIMITS[0]]
        if re.search(rf"\b{used}\b", reason) and (other in reason or _UNKNOWN.search(reason)):
            self.limit = other
            return True
        if "stop" in body and re.search(r"['\"`]stop['\"`]|\bbody\.stop\b", reason):
            self.takes_stop = False
            return True
        return False

    def read(self, response: HTTPResponse) -> Completion:
        """The content of a reply, of which any part may be missing."""
        payload = _streamed(response.content) or opened(response)
        choice = first(payload.get("choices"))
        message = mapping(choice.get("message"))
        delta = mapping(choice.get("delta"))  # of a streamed piece that is the whole reply
        text = text_of([message.get("content") or delta.get("content")]) or text_of(
            choice.get("text")
        )
        usage = mapping(payload.get("usage"))
        read = count(usage.get("prompt_tokens", usage.get("input_tokens")))
        written = count(usage.get("completion_tokens", usage.get("output_tokens")))
        total = count(usage.get("total_tokens"))
        if written is None and None not in (total, read):
            written = max(0, (total or 0) - (read or 0)) or None
        finish, refused = word(choice.get("finish_reason")), None
        error = choice.get("error") or (None if text else payload.get("error"))
        if error:
            if not text and read is None and written is None:
                raise HTTPStatusError(response)
            refused = reasons.reason_of(json.dumps({"error": error}).encode())
        elif not text and (said := _refusal(message)):
            refused, finish = f"the model refused: {said}", "refusal"
        elif not text and "choices" not in payload:
            said = reasons.reason_of(response.content)
            if read is None and written is None:
                raise MalformedError(f"no choices in the reply: {said}")
            refused = f"no choices in the reply: {said}"
        elif not text and not choice:
            refused = "the reply has no choices"
        elif not text and (message.get("reasoning_content") or message.get("reasoning")):
            refused = "the reply holds reasoning and no answer"
        return Completion(text, read, written, finish, refused)


def _refusal(message: dict[str, Any]) -> str:
    """What a model that refuses says, in a field of its message or in a part of its content."""
    content = message.get("content")
    parts = [mapping(part).get("refusal") for part in content] if isinstance(content, list) else []
    return " ".join(said for said in (message.get("refusal"), *parts) if isinstance(said, str))


def _streamed(data: bytes) -> dict[str, Any] | None:
    """A reply that was streamed in pieces ("data: {..}") unasked; None for any other reply.

    One that ends without its end mark was cut off, and says so as an error of its choice.
    """
    if not data.lstrip().startswith((b"data:", b"event:", b": ")):
        return None
    text, finish = "", None
    choice: dict[str, Any]
    whole: dict[str, Any] = {}
    for line in data.splitlines():
        if not line.startswith(b"data:"):
            continue
        try:
            piece = mapping(load(line[5:].strip()))
        except ValueError:
            continue
        choice = first(piece.get("choices"))
        text += text_of(mapping(choice.get("delta") or choice.get("message")).get("content"))
        finish = choice.get("finish_reason") or finish
        whole |= {name: piece[name] for name in ("usage", "error") if piece.get(name)}
    if finish is None and not text and not whole:
        return None
    choice = {"message": {"content": text}, "finish_reason": finish}
    if text and finish is None and not whole and b"[DONE]" not in data:
        choice["error"] = "the streamed reply was cut off"
    return {**whole, "choices": [choice]}
