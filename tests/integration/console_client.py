"""A console over a tiny model, asked without a socket."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from tempering.console.routes import Console
from tempering.console.subject import Subject
from tempering.engines.loading.hub import load_model
from tests.tiny import save_tiny_llama

TOKEN = "secret"
HOST = "127.0.0.1:7861"
LAYERS, HEADS = 8, 4
ONES: list[list[float]] = [[1.0] * HEADS for _ in range(LAYERS)]


def tiny_subject(folder: Path) -> Subject:
    """A llama of 8 layers and 4 heads."""
    return Subject.of("tiny", *load_model(save_tiny_llama(folder / "tiny")))


class Asked:
    """A client that knows the token."""

    def __init__(self, client: TestClient, console: Console) -> None:
        self.client, self.console = client, console
        self.headers = {"authorization": f"token {TOKEN}"}

    def get(self, path: str, **headers: str) -> Any:
        return self.client.get(path, headers={**self.headers, **headers})

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self.client.post(f"/api/{path}", json=body, headers={**self.headers, **headers})

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """All events of a stream, without those about turns."""
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        found = [json.loads(line) for line in answer.text.splitlines()]
        return [event for event in found if event["type"] not in ("turn", "waiting")]

    def refused(self, path: str, body: Any, status: int = 200) -> dict[str, Any]:
        """The refusal of a request."""
        answer = self.post(path, body)
        assert answer.status_code == status, answer.text
        told = answer.json()
        assert told["type"] == "error"
        return told


@contextlib.contextmanager
def asked(subject: Subject, out: Path, host: str = "127.0.0.1") -> Iterator[Asked]:
    """A console until the block ends."""
    console = Console(subject, out)
    app: Any = console.app(host=host, port=7861, token=TOKEN)
    with TestClient(app, base_url=f"http://{HOST}") as client:
        yield Asked(client, console)
    assert not console.turns._thread.is_alive()
