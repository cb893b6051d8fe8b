"""A server of `tempering serve` for tests: started on a free port of this machine, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KEY = "secret"
# Seconds for a server to start; ten times what tests of the browser wait, on a busy machine too.
_PATIENCE = 10 * float(os.environ.get("TEMPERING_PATIENCE", 60))
PROGRAM = "from tempering.cli import main; import sys; main(sys.argv[1:])"


class Running(NamedTuple):
    """A server: its address, an openai client, its process and its log."""

    url: str
    client: Any
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def serving(
    directory: Path, home: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """`tempering serve` of a checkpoint under the name "tiny"; its log lies in `home`."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: Sequence[str] = [
        *(sys.executable, "-c", PROGRAM, "serve", str(directory), *arguments),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--api-key", KEY, "--enforce-eager", "--dtype", "float32", "--max-model-len", "512"),
        *("--logprobs-mode", "processed_logprobs", "--disable-uvicorn-access-log"),
    ]
    path = home / "log.txt"
    with path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, path)
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
        yield Running(url, client, process, path)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(int(_PATIENCE)):
        if process.poll() is not None:
            raise AssertionError(f"the server ended: {log.read_text()[-3000:]}")
        if healthy(url):
            return
        time.sleep(1)
    raise AssertionError(f"the server did not start: {log.read_text()[-3000:]}")


def healthy(url: str) -> bool:
    """Whether the server and its engine answer."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            return int(answer.status) == 200
    except OSError:
        return False
