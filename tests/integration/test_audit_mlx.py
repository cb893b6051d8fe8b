"""Audits of MLX by a file of its log probabilities: right, wrong by its own code, and put wrong.

Needs MLX, which has wheels for Linux: pip install 'mlx[cpu]' mlx-lm. Skipped without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tempering.audit import Audit, audit, read_scores
from tempering.engines.loading.hub import load_model
from tests.tiny import save_tiny_llama

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'mlx[cpu]' mlx-lm")
mlx_lm = pytest.importorskip("mlx_lm", reason="needs MLX: pip install 'mlx[cpu]' mlx-lm")

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
}
# Warnings of MLX and what it brings along are theirs.
pytestmark = pytest.mark.filterwarnings("default")


def configured(directory: Path, **settings: Any) -> Path:
    path = directory / "config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **settings}))
    return directory


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Stretched by YaRN, as transformers 5 writes it, and as readers of older files know it."""
    directory = save_tiny_llama(tmp_path / "yarn", layers=2, spread=0.3)
    return configured(directory, rope_parameters=YARN, rope_scaling=YARN, rope_theta=1e4)


def audited(checkpoint: Path, network: Any, folder: Path) -> Audit:
    """By a file of log probabilities, as a user would hand them over."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 290, (3, 100), generator=draw).tolist()
    lines = []
    for ids in prompts:
        logits = network(mx.array([ids]))[0].astype(mx.float32)
        rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        values = [float(rows[place, token]) for place, token in enumerate(ids[1:])]
        lines.append(json.dumps({"tokens": ids, "logprobs": [None, *values]}))
    file = folder / "said.jsonl"
    file.write_text("\n".join(lines))
    reference, _ = load_model(checkpoint)
    return audit(reference, read_scores(file), name="MLX", layers=False)


def test_mlx_is_right_and_wrong_scales_in_it_are_named(checkpoint, tmp_path):
    network, _ = mlx_lm.load(str(checkpoint))
    right = audited(checkpoint, network, tmp_path)
    assert right.right is True and right.verdict.startswith("MLX runs at T = 1.000"), right.verdict
    attentions = [layer.self_attn for layer in network.model.layers]
    for attention in attentions:
        attention.scale /= 1.01
    assert "it runs at T = 1.01" in audited(checkpoint, network, tmp_path).verdict
    for attention in attentions:
        attention.scale = 64**-0.5
    assert "padded to 64" in audited(checkpoint, network, tmp_path).verdict
    for attention in attentions:
        attention.scale = 16**-0.5
        attention.rope.mscale **= 2
    found = audited(checkpoint, network, tmp_path)
    assert "YaRN's factor 1.1386 were applied twice" in found.verdict, found.verdict
    assert found.candidates[0].kind == "mistake"


def test_mlx_leaves_out_what_transformers_5_calls_otherwise(checkpoint, tmp_path):
    """No fault of ours: mlx-lm 0.32.2 reads rope_scaling, and rope_parameters not."""
    network, _ = mlx_lm.load(str(configured(checkpoint, rope_scaling=None)))
    found = audited(checkpoint, network, tmp_path)
    if hasattr(network.model.layers[0].self_attn.rope, "mscale"):
        pytest.skip("this mlx-lm reads rope_parameters")
    assert "MLX is wrong: it runs as if YaRN were left out" in found.verdict, found.verdict
