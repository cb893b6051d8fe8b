"""An engine whose workers don't all have the plugin isn't started, and the message names them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tempering.engines.vllm import presence
from tempering.errors import RefusedError


class Executor:
    """As much of vLLM's as the check needs."""

    uses_ray = False

    def __init__(self, answers: list[Any], rank: int = 0) -> None:
        self.answers, self.ended, self.asked = answers, False, 0
        self.config = SimpleNamespace(parallel_config=SimpleNamespace(node_rank_within_dp=rank))

    def collective_rpc(self, method: Any) -> list[Any]:
        self.asked += 1
        return self.answers

    def shutdown(self) -> None:
        self.ended = True

    def start(self) -> list[str]:
        begun: list[str] = []
        presence.start_executor(lambda self, config: begun.append("original"), self, self.config)
        return begun


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_an_engine_starts_where_every_worker_has_the_plugin(ranks):
    executor = Executor([("here", True)] * ranks)
    assert executor.start() == ["original"]
    assert not executor.ended


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        ([("here", True), ("there", False)], "rank 1 on there;"),
        ([("here", False), ("there", True)], "rank 0 on here;"),  # its own host too
        ([("a", False), ("a", True), ("b", False)], "rank 0 on a, rank 2 on b;"),
    ],
)
def test_workers_without_the_plugin_are_named_and_all_are_ended(answers, named):
    executor = Executor(answers)
    with pytest.raises(RefusedError, match="would serve untempered") as told:
        executor.start()
    assert named in str(told.value)
    assert executor.ended


def test_only_the_first_host_of_an_engine_asks():
    """vLLM's own executor on another host may not call the workers."""
    executor = Executor([("there", False)], rank=1)
    assert executor.start() == ["original"]
    assert executor.asked == 0


def test_errors_of_vllm_stay_its_own():
    executor = Executor([("there", False)])

    def fails(self: Any, config: Any) -> None:
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        presence.start_executor(fails, executor, executor.config)
    assert executor.asked == 0


def test_nodes_of_other_releases_are_named():
    own = version("tempering")
    presence.refuse_other({"10.0.0.1, node a": own, "10.0.0.2, node b": own})
    presence.refuse_other({})
    with pytest.raises(RefusedError) as told:
        presence.refuse_other({"10.0.0.1, node a": own, "10.0.0.2, node b": None, "c": "0.0.1"})
    assert "10.0.0.2, node b (no tempering); c (tempering 0.0.1)" in str(told.value)
    assert "10.0.0.1" not in str(told.value)


# In processes of their own, as it happens: these tests wrap functions for their checks of types.
SEND = """
import sys
from pathlib import Path
import cloudpickle
from tempering.engines.vllm import presence

for name in sys.argv[2:]:
    Path(sys.argv[1], name).write_bytes(cloudpickle.dumps(getattr(presence, name)))
"""
RUN = """
import json, pickle, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
worker, node = (pickle.loads(Path(path).read_bytes()) for path in sys.argv[2:])
print(json.dumps([worker(None), node()]))
assert not any("tempering" in name for name in sys.modules)
"""


@pytest.mark.parametrize("loaded", [True, False])
def test_the_questions_are_answered_where_tempering_is_not_installed(tmp_path, loaded):
    """They travel by value: by name, the answer would be an ImportError."""
    cloudpickle = pytest.importorskip("cloudpickle")
    site = tmp_path / "site"  # the only packages of the Python that answers
    package = site / "vllm" / "v1" / "worker"
    package.mkdir(parents=True)
    mark = "WorkerBase.__init__._tempering = True" if loaded else ""
    (package / "worker_base.py").write_text(
        f"class WorkerBase:\n    def __init__(self): pass\n{mark}\n"
    )
    (site / "cloudpickle").symlink_to(Path(cloudpickle.__file__).parent)
    if loaded:
        metadata = site / "tempering-9.9.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tempering\nVersion: 9.9\n")
        (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\ntempering = a:b\n")
    names = ("_of_worker", "_of_node")
    subprocess.run([sys.executable, "-c", SEND, str(tmp_path), *names], timeout=120, check=True)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, str(site), *(str(tmp_path / n) for n in names)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (host, found), release = json.loads(done.stdout)
    assert host and found is loaded
    assert release == ("9.9" if loaded else None)
