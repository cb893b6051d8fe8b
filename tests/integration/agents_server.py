"""A local HTTP server that speaks three providers' interfaces, and fails as it is told to."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str | tuple[int, dict[str, str], str | bytes]


class Log:
    """What the server was asked, in order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []

    def add(self, entry: dict[str, Any]) -> int:
        with self.lock:
            self.requests.append(entry)
            return len(self.requests) - 1

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [entry["body"] for entry in self.requests]


def content(body: dict[str, Any]) -> str:
    """What a provider says to a prompt: the prompt, so that a test knows whose reply it is."""
    if "contents" in body:
        return "echo: " + body["contents"][0]["parts"][0]["text"]
    return "echo: " + body["messages"][-1]["content"]


def reply(path: str, body: dict[str, Any], text: str) -> dict[str, Any]:
    """A whole reply of the provider whose path this is."""
    if path.endswith("/chat/completions"):
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                }
            ],
            "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
        }
    if path.endswith("/messages"):
        return {
            "id": "1",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": 5},
        }
    return {
        "candidates": [
            {
                "content": {"role": "model", "parts": [{"text": text}]},
                "finishReason": "STOP",
                "index": 0,
            }
        ],
        "usageMetadata": {
            "promptTokenCount": 7,
            "candidatesTokenCount": 5,
            "totalTokenCount": 12,
        },
    }


@contextmanager
def serving(
    fault: Callable[[dict[str, Any]], Fault | None] | None = None, slow: float = 1.0
) -> Iterator[tuple[str, Log]]:
    """Serve on a free port: (address, log).

    fault: asked at each request; None for a good reply, "slow", "cut", "malformed", "shape", or
    (status, headers, body). slow: seconds that a slow reply takes.
    """
    log = Log()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            entry = {"path": self.path, "headers": headers, "body": body}
            entry["n"] = log.add(entry)
            entry["fault"] = wanted = None if fault is None else fault(entry)
            if wanted == "slow":
                time.sleep(slow)
            if wanted == "cut":
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "500")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            data = json.dumps(reply(self.path, body, content(body))).encode()
            status, extra = 200, {}
            if wanted == "malformed":
                data = data[: len(data) // 2]
            elif wanted == "shape":
                data = b'{"unexpected": true}'
            elif isinstance(wanted, tuple):
                status, extra, text = wanted
                data = text.encode() if isinstance(text, str) else text
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            for name, value in extra.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def handle(self) -> None:
            with suppress(ConnectionError, TimeoutError):  # a client that timed out has gone
                super().handle()

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def at_random(seed: int, share: float) -> Callable[[dict[str, Any]], Fault | None]:
    """All kinds of faults, in a share of the requests."""
    rng = random.Random(seed)
    lock = threading.Lock()
    kinds: list[Fault] = [
        (429, {"Retry-After": "0.01"}, '{"error": {"message": "too many"}}'),
        (429, {}, '{"error": {"message": "too many"}}'),
        (500, {}, '{"error": {"message": "broken"}}'),
        (503, {}, "no JSON at all"),
        "cut",
        "malformed",
        "shape",
    ]

    def fault(entry: dict[str, Any]) -> Fault | None:
        with lock:
            if rng.random() >= share:
                return None
            return "slow" if rng.random() < 0.03 else rng.choice(kinds)

    return fault
