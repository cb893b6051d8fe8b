"""A console that runs in this process, for tests and for pictures of the page."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from tempering.console.remote import Remote
from tempering.console.routes import Console
from tempering.console.subject import Subject
from tests.e2e.browser import PATIENCE

TOKEN = "the-token-of-a-test"


class Served:
    """A running console. url: with its token."""

    def __init__(self, console: Console, port: int, server: Any) -> None:
        self.console, self.port, self.server = console, port, server
        self.base = f"http://127.0.0.1:{port}"
        self.url = f"{self.base}/?token={TOKEN}"

    def idle(self, patience: float = PATIENCE) -> bool:
        """Wait until nothing runs on the model; whether that came."""
        end = time.monotonic() + patience
        turns = self.console.turns
        while turns._running is not None or turns._waiting:
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True


@contextlib.contextmanager
def served(
    subject: Subject,
    out: Path,
    start: dict[str, Any] | None = None,
    remote: Remote | None = None,
) -> Iterator[Served]:
    """A console on a free port, until the block ends."""
    console = Console(subject, out, start, remote)
    found = socket.socket()
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
    app: Any = console.app(host="127.0.0.1", port=port, token=TOKEN)
    config = uvicorn.Config(
        app, log_level="error", lifespan="on", timeout_graceful_shutdown=2, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [found]}, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not server.started:
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.01)
    try:
        yield Served(console, port, server)
    finally:
        server.should_exit = True
        console.turns.stop_all()
        thread.join(PATIENCE)
        found.close()
        assert not thread.is_alive()
