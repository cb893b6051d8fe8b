"""A Ray cluster on this machine: `ray start` once for each node, what its Python has, its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Seconds for a node to start.
_PATIENCE = 3 * float(os.environ.get("TEMPERING_PATIENCE", 60))
_ROOT = Path(__file__).parents[2]
_STARTED = "Ray runtime started"


class Node(NamedTuple):
    """A node: `ray start --block`, whose processes are those of its session."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End all processes of the node at once, its workers too, as a machine that is cut off."""
        self.signal(signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> None:
        """End the node, at first kindly."""
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.kill()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the node."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(ValueError, ProcessLookupError):
                if os.getsid(int(entry.name)) == self.process.pid:
                    os.kill(int(entry.name), number)

    def wait(self) -> None:
        """AssertionError unless the node has joined its cluster in time."""
        for _ in range(int(_PATIENCE)):
            if _STARTED in self.log.read_text():
                return
            if self.process.poll() is not None:
                break
            time.sleep(1)
        raise AssertionError(f"the Ray node did not start: {self.log.read_text()[-3000:]}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_node(
    log: Path, resources: Sequence[str], environment: Mapping[str, str], *arguments: str
) -> Node:
    """`ray start` with one of each resource; arguments say whether it is the head or joins one."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", *arguments),
        *("--resources", json.dumps(dict.fromkeys(resources, 1)), "--num-cpus", "0", "--block"),
        *("--object-store-memory", str(80 * 2**20), "--disable-usage-stats"),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    return Node(process, log)


class Cluster(NamedTuple):
    """A head, beside which each test starts a node of its own.

    environment: of an engine, but for RAY_CPU_RESOURCE, which says beside which node the head runs
        it: both have a resource of that name. hidden: of a node without tempering.
    """

    home: Path
    environment: dict[str, str]
    hidden: dict[str, str]

    @contextlib.contextmanager
    def joined_by(self, resource: str, environment: Mapping[str, str]) -> Iterator[Node]:
        node = start_node(
            self.home / f"{resource}.log",
            [resource],
            {**self.environment, **environment},
            *("--address", self.environment["RAY_ADDRESS"]),
        )
        try:
            node.wait()
            yield node
        finally:
            node.stop()


@contextlib.contextmanager
def ray_cluster(home: Path, resources: Sequence[str]) -> Iterator[Cluster]:
    """A head with one of each resource; its logs lie in `home`."""
    path = os.pathsep.join((str(_plugin(home / "plugin")), str(_ROOT), *filter(None, sys.path)))
    port = str(free_port())
    environment = {
        "PYTHONPATH": path,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_worker_niceness": "0",
        # Else Ray ends workers when 95 % of the machine's memory is in use, whoever uses it.
        "RAY_memory_monitor_refresh_ms": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # How long vLLM waits for a worker on another host, also for one that was lost.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "60",
    }
    hidden = {"PYTHONPATH": os.pathsep.join((str(_hiding(home / "hiding")), path))}
    with tempfile.TemporaryDirectory(prefix="ray-") as sockets:  # whose paths must be short
        head = start_node(
            home / "head.log",
            resources,
            environment,
            *("--head", "--port", port, "--ray-client-server-port", str(free_port())),
            *("--temp-dir", sockets, "--include-dashboard", "false"),
        )
        try:
            head.wait()
            yield Cluster(home, environment, hidden)
        finally:
            head.stop()


def _plugin(folder: Path) -> Path:
    """A distribution that is nothing but the plugin's entry point; the folder goes on sys.path."""
    metadata = folder / "ray_cpu-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nray_cpu = tests.vllm.ray_cpu:accept_ray\n"
    )
    return folder


def _hiding(folder: Path) -> Path:
    """A folder that makes a Python whose sys.path begins with it have no tempering installed."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(_HIDING)
    return folder


_HIDING = """\
import importlib.metadata as metadata
import sys


class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tempering":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hiding())
found = metadata.distributions
metadata.distributions = lambda **given: (
    each for each in found(**given) if each.metadata["Name"] != "tempering"
)
known = metadata.Distribution.discover
metadata.Distribution.discover = classmethod(
    lambda kind, **given: (
        each for each in known(**given) if each.metadata["Name"] != "tempering"
    )
)
"""
