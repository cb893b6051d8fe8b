"""The suite of the vLLM engine: `make test-vllm`, in a virtual environment of its own.

Each engine takes a minute or two to start, so the tests of one file share theirs.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before vllm is imported: fresh worker processes, without this process's import hooks.
os.environ |= {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without vllm nothing here runs, and the summary says so."""
    own = [item for item in items if HERE in item.path.parents]
    for item in own:
        # Warnings of vllm and its libraries are theirs.
        item.add_marker(pytest.mark.filterwarnings("default"))
        if not INSTALLED:
            item.add_marker(pytest.mark.skip(reason="vllm is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def embedded() -> tuple[Path, Any, Any]:
    """(checkpoint, model, tokenizer) of the embedded model, float32."""
    from tempering.engines.loading.catalogue import MODELS
    from tempering.engines.loading.embedded import embedded_directory
    from tempering.engines.loading.hub import load_model

    model, tokenizer = load_model("smollm2")
    return embedded_directory(MODELS["smollm2"]), model, tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(checkpoint, model, tokenizer) of a random model with heads of 32 dimensions."""
    from tempering.engines.loading.hub import load_model
    from tests.tiny import save_tiny_llama

    directory = save_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=4, width=128, spread=0.12)
    model, tokenizer = load_model(str(directory))
    return directory, model, tokenizer


@pytest.fixture(scope="module")
def engines() -> Iterator[Any]:
    """start(directory, **settings) -> LLM; the one before is shut down, and the last one too."""
    from vllm import LLM

    running: list[Any] = []

    def stop() -> None:
        for llm in running:
            llm.llm_engine.engine_core.shutdown()
        running.clear()

    def start(directory: Path, **settings: Any) -> Any:
        stop()
        given = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "seed": 0}
        running.append(LLM(str(directory), **{**given, **settings}))
        return running[-1]

    yield start
    stop()
