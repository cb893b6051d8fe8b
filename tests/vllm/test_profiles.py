"""Profiles in vLLM equal those in transformers: eager, compiled, swapped, and baked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering.engines.checkpoints.bake import bake_checkpoint
from tempering.engines.vllm.swap import swap_profile
from tempering.errors import ProfileError
from tests.vllm.reference import (
    EXTENSION,
    TEXTS,
    ask,
    greedy,
    log_probabilities,
    per_head,
    per_layer,
    worst,
)

CLOSE = 1e-4  # nats; the two engines sum in another order


def _configured(profile: Any, tmp_path: Path) -> dict[str, Any]:
    path = profile.save(tmp_path / "profile.json")
    return {
        "additional_config": {"tempering": {"profile": str(path)}},
        "worker_extension_cls": EXTENSION,
    }


def _unlinking(folder: Path) -> Any:
    """vLLM's `create_engine_config`, after which the profile's file is gone."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    original = EngineArgs.create_engine_config

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        (folder / "profile.json").unlink()
        return config

    return create


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_profiles_equal_transformers(embedded, engines, tmp_path, monkeypatch, eager):
    from vllm.engine.arg_utils import EngineArgs

    directory, model, tokenizer = embedded
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    layers, heads = per_layer(model), per_head(model)
    configured = _configured(layers, tmp_path)
    monkeypatch.setattr(EngineArgs, "create_engine_config", _unlinking(tmp_path))
    llm = engines(directory, enforce_eager=eager, **configured)
    assert not (tmp_path / "profile.json").exists()  # it was read once, before the workers
    assert worst(llm, model, prompts, layers) < CLOSE
    assert worst(llm, model, prompts, None) > 0.05  # so the profile is no small matter
    for ids, output in zip(prompts, ask(llm, prompts, 12), strict=True):
        assert list(output.outputs[0].token_ids) == greedy(model, ids, layers, 12)
    # Another profile in the running engine, with the prompts of before in its prefix cache.
    name = swap_profile(llm, heads)
    assert [tuple(answer) for answer in llm.collective_rpc("tempering_active")] == [("", name)]
    assert worst(llm, model, prompts, heads) < CLOSE
    for ids, output in zip(prompts, ask(llm, prompts, 8, logprobs=0), strict=True):
        written = list(output.outputs[0].token_ids)
        assert written == greedy(model, ids, heads, 8)
        theirs = log_probabilities(model, [*ids, *written], heads)[len(ids) - 1 :]
        own = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, written)]
        assert float((theirs - torch.tensor(own)).abs().max()) < CLOSE
    # None of them fits another model, and then nothing changes.
    other = json.loads(json.dumps(heads.to_json()))
    other["model"]["fingerprint"] = "0" * 16
    with pytest.raises(ProfileError, match="fingerprint"):
        swap_profile(llm, type(heads).from_json(other))
    with pytest.raises(ProfileError, match="30 layers x 9 heads"):
        swap_profile(llm, type(heads).from_matrix(torch.ones(29, 9)))
    assert worst(llm, model, prompts[:1], heads) < CLOSE
    swap_profile(llm, None)
    assert worst(llm, model, prompts, None) < CLOSE


@pytest.mark.parametrize("kind", ["per layer, eager", "per head, compiled"])
def test_baked_checkpoints_equal_transformers(embedded, engines, tmp_path, kind):
    directory, model, tokenizer = embedded
    profile = per_layer(model) if "layer" in kind else per_head(model)
    baked = tmp_path / "baked"
    bake_checkpoint(directory, profile, baked)
    llm = engines(baked, enforce_eager="eager" in kind)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    assert worst(llm, model, prompts, profile) < CLOSE
    for ids, output in zip(prompts, ask(llm, prompts, 12), strict=True):
        assert list(output.outputs[0].token_ids) == greedy(model, ids, profile, 12)
