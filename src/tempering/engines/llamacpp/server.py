"""An OpenAI-compatible server on llama.cpp: completions and chats, policies per request.

    GET  /v1/models, /health
    POST /v1/completions, /v1/chat/completions     n, seed, stop, stream, echo, logprobs

Requests are carried out one after another, the samples of each side by side.
"""

from __future__ import annotations

import hmac
import json
import select
import socket
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tempering.engines.llamacpp.model import LlamaCpp
from tempering.engines.llamacpp.replies import TextPiece, WrittenReply
from tempering.engines.llamacpp.requests import ServedRequest, read_request
from tempering.errors import InputError, TemperingError

_LARGEST = 16 * 2**20  # bytes of a request


def make_server(
    model: LlamaCpp, name: str, *, host: str = "127.0.0.1", port: int = 8000, key: str | None = None
) -> ThreadingHTTPServer:
    """A server that is ready to `serve_forever`; port 0 takes a free one.

    name: of the model, for clients. key: that requests have to send, if any.
    Raises InputError for an address that can't be had.
    """
    handler = type(
        "Handler",
        (_Handler,),
        {"model": model, "name": name, "key": key, "turn": threading.Lock()},
    )
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise InputError(f"can't listen at {host}:{port}: {error.strerror or error}") from error


class _Handler(BaseHTTPRequestHandler):
    model: LlamaCpp
    name: str
    key: str | None
    turn: threading.Lock
    protocol_version = "HTTP/1.1"
    timeout = 600

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""

    def do_GET(self) -> None:
        """The model's name, and whether the server lives."""
        if self.path == "/health":
            self._json(200, {"status": "ok"})
        elif not self._allowed():
            self._error(401, "this server wants its key: Authorization: Bearer KEY")
        elif self.path == "/v1/models":
            entry = {
                "id": self.name,
                "object": "model",
                "created": 0,
                "owned_by": "tempering",
                "max_model_len": self.model.length,
            }
            self._json(200, {"object": "list", "data": [entry]})
        else:
            self._error(404, f"there is no {self.path:.80}")

    def do_POST(self) -> None:
        """A completion or a chat."""
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= _LARGEST:
            self.close_connection = True
            self._error(413 if length > 0 else 411, "send a body of at most 16 MiB, with its size")
            return
        data = self.rfile.read(length)
        if not self._allowed():
            self._error(401, "this server wants its key: Authorization: Bearer KEY")
            return
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            self._error(404, f"there is no {self.path:.80}")
            return
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            self._error(400, f"the body is no JSON: {error}")
            return
        chat = self.path == "/v1/chat/completions"
        try:
            with self.turn:
                self._waits()
                request = read_request(body, self.model, self.name, chat=chat)
                if request.stream:
                    self._streamed(request)
                else:
                    self._whole(request)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client has gone; its samples end with it
        except InputError as error:
            self._error(400, str(error))
        except TemperingError as error:
            self._error(500, str(error))
        except Exception as error:
            self._error(500, _told(error))

    def _waits(self) -> None:
        """ConnectionAbortedError where the client has hung up: its request ends with it."""
        look = select.poll()
        look.register(self.connection, select.POLLIN)
        # What can be read is the end of the connection, or a next request sent ahead.
        if look.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("the client has hung up")

    def _allowed(self) -> bool:
        if self.key is None:
            return True
        given = self.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode())

    def _whole(self, request: ServedRequest) -> None:
        done = WrittenReply(self.model, request, self._waits)
        for _ in done.pieces():
            pass
        choices = []
        said = self.model.logprobs([request.prompt], self._waits)[0] if request.echo else []
        for row, text in enumerate(done.texts):
            tokens: list[tuple[int, float | None]] = [*done.tokens[row]]
            if request.echo:
                text = self._decoded(request.prompt) + text
                tokens = [*zip(request.prompt, said, strict=True), *tokens]
            choice = self._choice(request, row, text, done.finish[row], tokens)
            choices.append({**choice, **_trace_field(request, done.traces[row])})
        body = self._head(request)
        self._json(200, {**body, "choices": choices, "usage": self._usage(request, done)})

    def _choice(
        self, request: ServedRequest, row: int, text: str, finish: str | None, tokens: list[Any]
    ) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if request.logprobs:
            shown = [self._decoded([token]) for token, _ in tokens]
            values = [value for _, value in tokens]
            logprobs = {"tokens": shown, "token_logprobs": values}
            if request.chat:
                entries = zip(shown, values, strict=True)
                logprobs = {"content": [{"token": a, "logprob": b} for a, b in entries]}
        body: dict[str, Any] = {"index": row, "logprobs": logprobs, "finish_reason": finish}
        if request.chat:
            return {**body, "message": {"role": "assistant", "content": text}}
        return {**body, "text": text}

    def _streamed(self, request: ServedRequest) -> None:
        done = WrittenReply(self.model, request, self._waits)
        head = self._head(request, part=True)
        pieces = done.pieces()
        # The first piece before the headers, so that an error is still an error.
        first = next(pieces)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            if request.chat:
                for row in range(len(request.samples)):
                    opening = {"index": row, "delta": {"role": "assistant", "content": ""}}
                    self._event({**head, "choices": [{**opening, "finish_reason": None}]})
            self._event({**head, "choices": [self._part(request, first)]})
            for piece in pieces:
                self._event({**head, "choices": [self._part(request, piece)]})
            if request.usage:
                self._event({**head, "choices": [], "usage": self._usage(request, done)})
            self._chunk(b"data: [DONE]\n\n")
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # also a bug in a policy: the answer has begun
            message = str(error) if isinstance(error, TemperingError) else _told(error)
            self._event({"error": {"message": message, "type": "server_error", "code": 500}})
        finally:
            pieces.close()
        self._chunk(b"")

    @staticmethod
    def _part(request: ServedRequest, piece: TextPiece) -> dict[str, Any]:
        body: dict[str, Any] = {"index": piece.row, "finish_reason": piece.finish}
        body |= _trace_field(request, piece.trace)
        if request.chat:
            return {**body, "delta": {"content": piece.text} if piece.text else {}}
        return {**body, "text": piece.text}

    def _head(self, request: ServedRequest, part: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if request.chat:
            kind = "chat.completion.chunk" if part else "chat.completion"
        start = "chatcmpl-" if request.chat else "cmpl-"
        return {
            "id": start + uuid.uuid4().hex,
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }

    @staticmethod
    def _usage(request: ServedRequest, done: WrittenReply) -> dict[str, int]:
        written = sum(map(len, done.tokens))
        read = len(request.prompt)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def _decoded(self, ids: list[int]) -> str:
        return str(self.model.tokenizer.decode(ids))

    def _event(self, body: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(body).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _error(self, status: int, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._json(status, {"error": {"message": message, "type": kind, "code": status}})

    def _json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # nobody waits for the answer any more


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _trace_field(request: ServedRequest, trace: list[dict[str, Any]]) -> dict[str, Any]:
    """The field of a choice beside OpenAI's, where it is asked for."""
    return {"tempering_trace": trace} if request.trace else {}
