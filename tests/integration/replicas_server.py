"""A server like that of `tempering serve`: chats, log probabilities, profiles; and it dies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tempering import Profile


def loss(ids: list[int], profile: dict[str, Any] | None) -> float:
    """Mean -log q of the tokens after the first, as the server makes it up."""
    heat = 0.0
    if profile is not None:
        heat = float(Profile.from_json(profile, "test").temperature.log().abs().mean())
    values = [((7 * t + i) % 13) / 13 + heat * (1 + t % 3) for i, t in enumerate(ids) if i]
    return sum(values) / len(values)


class Fake:
    """One replica. dies_at: the number of the request that it no longer answers. refuses: the HTTP
    status of every generation. spoils: makes another body of a reply, by its number. worse: nats of
    loss more than others have, as of other weights."""

    def __init__(
        self,
        models: tuple[str, ...] = ("m",),
        *,
        profiles: bool = True,
        dies_at: int | None = None,
        slow: float = 0.0,
        refuses: int = 200,
        spoils: Callable[[bytes, int], bytes] | None = None,
        meddle: Callable[[Fake, int], None] | None = None,
        worse: float = 0.0,
    ) -> None:
        self.models, self.profiles, self.dies_at, self.slow = models, profiles, dies_at, slow
        self.refuses, self.spoils, self.worse = refuses, spoils, worse
        self.meddle, self.depth = meddle, 4
        self.profile: dict[str, Any] | None = None
        self.digest = "untempered"
        self.answered: list[dict[str, Any]] = []  # the bodies of generations
        self.most = self.now = self.requests = 0
        self.lock = threading.Lock()
        self.dead = False
        self.server: Any = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def die(self) -> None:
        self.dead = True
        threading.Thread(target=self.server.shutdown, daemon=True).start()
        with contextlib.suppress(OSError):
            self.server.socket.close()

    def swap(self, profile: dict[str, Any] | None) -> None:
        self.profile = profile
        text = json.dumps(profile, sort_keys=True)
        self.digest = "untempered" if profile is None else hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def running(*replicas: Fake) -> Iterator[None]:
    """Serve the replicas, each on a free port."""
    for fake in replicas:
        fake.server = Server(("127.0.0.1", 0), handler_of(fake))
        fake.port = fake.server.server_port
        threading.Thread(target=fake.server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield
    finally:
        for fake in replicas:
            fake.server.shutdown()
            fake.server.server_close()


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        pass


def handler_of(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def gone(self) -> bool:
            if fake.dead:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
            return fake.dead

        def send(self, status: int, body: Any, number: int | None = None) -> None:
            data = json.dumps(body).encode()
            if fake.spoils is not None and number is not None:
                data = fake.spoils(data, number)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.gone():
                return
            if self.path == "/v1/models":
                self.send(200, {"data": [{"id": name} for name in fake.models]})
            elif self.path == "/v1/tempering/profile" and fake.profiles:
                self.send(200, {"active": fake.digest})
            elif self.path == "/v1/tempering/layers" and fake.profiles:
                rows = [[f"model.layers.{i}.self_attn.attn", 4, 2] for i in range(fake.depth)]
                self.send(200, {"layers": rows[::-1], "depth": fake.depth})
            else:
                self.send(404, {"error": {"message": "no such path"}})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.gone():
                return
            if self.path == "/v1/tempering/profile":
                fake.swap(body["profile"])
                self.send(200, {"active": fake.digest})
                return
            asked = body.get("vllm_xargs", {}).get("tempering_profile")
            if asked is not None and asked.startswith("no pattern"):
                self.send(400, {"error": {"message": "no such profile"}})
                return
            with fake.lock:
                number = fake.requests
                fake.requests += 1
                fake.now += 1
                fake.most = max(fake.most, fake.now)
            time.sleep(fake.slow)
            with fake.lock:
                fake.now -= 1
            if fake.dies_at is not None and number >= fake.dies_at:
                fake.die()
            if fake.meddle is not None:
                fake.meddle(fake, number)
            if self.gone():
                return
            if fake.refuses != 200:
                self.send(fake.refuses, {"error": {"message": "the engine is gone"}})
                return
            fake.answered.append(body)
            self.send(200, self.reply(body), number)

        def reply(self, body: dict[str, Any]) -> dict[str, Any]:
            if self.path.endswith("/chat/completions"):
                text = "echo: " + body["messages"][-1]["content"]
                choice = {"message": {"content": text}, "finish_reason": "stop"}
                return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
            ids = body["prompt"]
            each = -loss(ids, fake.profile) - fake.worse
            rows = [None, *({str(t): {"logprob": each, "rank": 1}} for t in ids[1:])]
            return {"choices": [{"text": "", "prompt_logprobs": rows}]}

    return Handler
