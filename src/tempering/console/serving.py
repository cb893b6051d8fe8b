"""The server's process: a socket, a browser, and an end that leaves nothing behind."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from tempering.console.routes import Console
from tempering.console.safety import is_loopback
from tempering.errors import InputError

_PORTS = 20  # tried one after the other
_GRACE = 3  # seconds for open streams, which are told to end at once


def bound(host: str, port: int) -> socket.socket:
    """A listening socket at the first free port from `port` on; 0 lets the system choose.

    Raises InputError for a host that isn't one of this machine's, or where no port is free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(port + _PORTS, 65536) if port else 1
    for tried in range(port, last):
        found = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere this option would share a port that is in use
            # So that a console that has just ended leaves its port free for the next.
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host.strip("[]"), tried))
            found.listen(128)
            return found
        except socket.gaierror as error:
            found.close()
            raise InputError(f"--host {host}: no such address on this machine ({error})") from error
        except OSError as error:
            found.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(f"--host {host} can't be bound: {error.strerror}") from error
    raise InputError(
        f"none of the ports {port} to {last - 1} is free; end another program, or give --port"
    )


class _Server(uvicorn.Server):
    """uvicorn's server, whose first Ctrl-C stops the model within a step."""

    def __init__(self, config: uvicorn.Config, console: Console) -> None:
        super().__init__(config)
        self.console = console

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.console.turns.stop_all()
        super().handle_exit(sig, frame)


def serve(
    console: Console, *, host: str, port: int, open_browser: bool, note: Callable[[str], None]
) -> None:
    """Serve until Ctrl-C."""
    found = bound(host, port)
    got = found.getsockname()[1]
    if port and got != port:
        note(f"port {port} is in use; this console has {got}")
    token = secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host and "[" not in host else host
    if shown in ("0.0.0.0", "[::]"):
        shown = "127.0.0.1"
    url = f"http://{shown}:{got}/?token={token}"
    if not is_loopback(host):
        note(
            f"--host {host}: other machines reach this console. Whoever has the address below runs "
            "the model and writes into the folder of results; it travels unencrypted"
        )
    note(f"console: {url}")
    note("Ctrl-C ends it")
    app: Any = console.app(host=host, port=got, token=token)
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,  # it would print the token
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        ws="none",
    )
    server = _Server(config, console)
    if open_browser:
        threading.Timer(0.3, _open, (url, note)).start()
    try:
        server.run(sockets=[found])
    except KeyboardInterrupt:
        pass  # uvicorn raises the signal again when it has ended
    finally:
        console.turns.close()
        found.close()


def _open(url: str, note: Callable[[str], None]) -> None:
    if not webbrowser.open(url):
        note("no browser could be opened; open the address above in one")
