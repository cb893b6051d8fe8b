"""`audit` of vLLM: right as it is, and with wrong scales put into it, each named first.

Into the checkpoint's config.json, through vLLM's own option `hf_overrides`, and into the running
model, as faults of vLLM's own code would be: https://github.com/vllm-project/vllm/issues/48351.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering.audit import Audit, ask, audit
from tempering.engines.loading.hub import load_model
from tempering.engines.vllm.scoring import VllmScorer
from tests.tiny import save_tiny_llama

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
}
LENGTH = 96


def written(directory: Path, rope: dict[str, Any]) -> Path:
    """The checkpoint with these positions."""
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("rope_scaling", None)
    path.write_text(json.dumps({**settings, "rope_parameters": rope}))
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = save_tiny_llama(tmp_path_factory.mktemp("yarn"), layers=2, width=128, spread=0.2)
    return written(directory, YARN)


def started(directory: Path, **settings: Any) -> VllmScorer:
    return VllmScorer(str(directory), LENGTH, enforce_eager=True, **settings)


def audited(checkpoint: Path, scorer: VllmScorer) -> Audit:
    """The verdict, on 4 prompts of random tokens."""
    reference, _ = load_model(str(checkpoint))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 290, (4, LENGTH), generator=draw).tolist()
    return audit(reference, ask(scorer, ids), name="vLLM", layers=False)


def rescale(model: Any, factor: float) -> int:
    """Every attention's scale times a factor; how many there are."""
    attentions = [m.impl for m in model.modules() if hasattr(getattr(m, "impl", None), "scale")]
    for attention in attentions:
        attention.scale *= factor
    return len(attentions)


def restretch(model: Any, factor: float) -> int:
    """Cosines and sines times a factor; how many tables there are."""
    tables = {id(m.cos_sin_cache): m.cos_sin_cache for m in model.modules()
              if hasattr(m, "cos_sin_cache")}  # fmt: skip
    for table in tables.values():
        table.mul_(factor)
    return len(tables)


def test_right_and_with_faults_in_its_own_code(checkpoint, monkeypatch):
    # Functions reach the worker pickled, by name.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    factor = 1 + 0.1 * torch.tensor(4.0).log().item()
    with started(checkpoint) as scorer:

        def change(function: Any, value: float) -> None:
            counts = scorer.llm.apply_model(partial(function, factor=value))
            assert counts and all(count > 0 for count in counts)

        right = audited(checkpoint, scorer)
        assert right.right is True, right.verdict
        assert right.verdict.startswith("vLLM runs at T = 1.000")
        for function, value, says in (
            (restretch, factor, f"YaRN's factor {factor:.4f} were applied twice"),
            (restretch, 1 / factor, f"YaRN's factor {factor:.4f} were missing"),
            (rescale, (32 / 64) ** 0.5, "heads padded to 64"),
            (rescale, 32**-0.5, "its scale were applied twice"),
        ):
            change(function, value)
            found = audited(checkpoint, scorer)
            assert found.right is False and says in found.verdict, found.verdict
            assert says in found.candidates[0].name
            change(function, 1 / value)
        change(rescale, 1 / 1.01)
        found = audited(checkpoint, scorer)
        assert found.verdict.startswith("vLLM is wrong: it runs at T = 1.010"), found.verdict
        change(rescale, 1.01)
        again = audited(checkpoint, scorer)
        assert again.right is True, again.verdict


@pytest.mark.parametrize(
    "rope, says",
    [
        ({**YARN, "rope_theta": 500000.0}, "base of its rotation were 500000 in place of 10000"),
        ({**YARN, "attention_factor": 1.0}, "YaRN's factor 1.1386 were missing"),
    ],
)
def test_a_checkpoint_that_says_otherwise(checkpoint, tmp_path, rope, says):
    other = written(shutil.copytree(checkpoint, tmp_path / "other"), rope)
    with started(other) as scorer:
        found = audited(checkpoint, scorer)
    assert found.right is False and says in found.verdict, found.verdict
    assert says in found.candidates[0].name


def test_an_option_of_vllms_own(checkpoint):
    """--hf-overrides puts another stretch of positions in the place of the checkpoint's."""
    squared = {**YARN, "factor": 16.0, "attention_factor": 1 + 0.1 * torch.tensor(4.0).log().item()}
    with started(checkpoint, hf_overrides={"rope_parameters": squared}) as scorer:
        found = audited(checkpoint, scorer)
    assert "YaRN's factor 4 of positions were squared" in found.verdict, found.verdict
    assert found.candidates[0].kind == "mistake"
