"""vLLM's own attention layers, built under a configuration: tempered, refused, or left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tempering.attention.profiles.profile import Profile
from tempering.engines.vllm.layer_betas import RankLayer
from tempering.engines.vllm.layers import layers_of, prepared_betas, temper_layers, write_betas
from tempering.engines.vllm.settings import EngineSettings, settings_of
from tempering.errors import ArchitectureError


def configuration(directory: Any, tempering: Any) -> Any:
    """vLLM's own, for a model."""
    from vllm.engine.arg_utils import EngineArgs

    given = {} if tempering is None else {"tempering": tempering}
    arguments = EngineArgs(str(directory), dtype="float32", additional_config=given)
    return arguments.create_engine_config()


@pytest.fixture
def build(tiny, monkeypatch):
    """build(tempering, **arguments) -> (configuration, layer)"""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    # What a test wraps is taken back.
    for owner, name in (
        (Attention, "__init__"),
        (Attention, "forward"),
        (MLAAttention, "__init__"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(Attention, "_tempering", False, raising=False)

    def build(tempering: Any, **arguments: Any) -> tuple[Any, Any]:
        config = configuration(tiny[0], tempering)
        temper_layers(config, settings_of(config) or EngineSettings())
        with set_current_vllm_config(config):
            layer = Attention(4, 32, 32**-0.5, prefix="model.layers.0.self_attn.attn", **arguments)
        return config, layer

    return build


def profile(tmp_path, temperature) -> str:
    return str(Profile.from_matrix(temperature).save(tmp_path / f"{len(list(tmp_path.iterdir()))}"))


def seen(layer: Any, query: torch.Tensor, monkeypatch) -> torch.Tensor:
    """The queries that reach vLLM's attention."""
    from vllm.model_executor.layers.attention import attention

    caught = []
    layer.use_direct_call = True
    monkeypatch.setattr(attention, "unified_kv_cache_update", lambda *args: None)
    monkeypatch.setattr(
        attention,
        "unified_attention_with_output",
        lambda query, *args, **more: caught.append(query),
    )
    layer(query, None, None)
    return caught[0]


def test_queries_are_scaled_by_head(build, tmp_path, monkeypatch):
    T = torch.tensor([[0.5, 1.0, 2.0, 4.0]])
    config, layer = build({"profile": profile(tmp_path, T)})
    slots = [RankLayer(layer.layer_name, 4)]
    monkeypatch.setattr("tempering.engines.vllm.layers.rank_layers", lambda layers: slots)
    settings = settings_of(config)
    write_betas(
        config, layers_of(config), prepared_betas(config, layers_of(config), settings.profile)
    )
    query = torch.randn(5, 128)
    got = seen(layer, query, monkeypatch)
    assert torch.equal(got, query.view(5, 4, 32) / T[0, :, None])
    # Rounded once, to the queries' own dtype; T = 1 bit for bit.
    low = seen(layer, query.bfloat16(), monkeypatch)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low[:, 1], query.bfloat16().view(5, 4, 32)[:, 1])


def test_tokens_of_named_profiles(build, tmp_path, monkeypatch):
    paths = {"hot": profile(tmp_path, [[2.0] * 4]), "cold": profile(tmp_path, [[0.5] * 4])}
    config, layer = build({"profiles": paths})
    for row, beta in enumerate((1.0, 0.5, 2.0)):
        write_betas(config, [layer], [torch.full((4,), beta)], row)
    layer.tempering_rows[:5] = torch.tensor([2, 0, 1, 1, 0])
    query = torch.randn(5, 128)
    scales = torch.tensor([2.0, 1.0, 0.5, 0.5, 1.0])[:, None, None]
    assert torch.equal(seen(layer, query, monkeypatch), query.view(5, 4, 32) * scales)


def test_nothing_is_added_where_nothing_is_configured(build, monkeypatch):
    config, layer = build(None)
    assert not hasattr(layer, "tempering_beta")
    query = torch.randn(5, 128)
    assert torch.equal(seen(layer, query, monkeypatch), query.view(5, 4, 32))
    with pytest.raises(ArchitectureError, match="built before the plugin"):
        layers_of(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits_soft_cap": 30.0}, "model.layers.0.self_attn.attn caps its logits"),
        ({"alibi_slopes": [0.5, 0.25, 0.125, 0.06]}, "adds ALiBi's position bias"),
        ({"sinks": torch.zeros(4)}, "adds a sink logit"),
        ({"attn_type": "encoder_only"}, "is encoder_only attention"),
    ],
)
def test_what_is_not_exact_is_refused_at_the_start(build, arguments, message):
    build(None, **arguments)
    with pytest.raises(ArchitectureError, match=message):
        build({"profile": None}, **arguments)


def test_latent_attention_is_refused(build, tiny, monkeypatch):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import MLAAttention

    monkeypatch.setattr(MLAAttention, "__init__", lambda self: None)
    config = configuration(tiny[0], {"profile": None})
    temper_layers(config, EngineSettings())
    with set_current_vllm_config(config), pytest.raises(ArchitectureError, match="latent"):
        MLAAttention()
    with set_current_vllm_config(configuration(tiny[0], None)):
        MLAAttention()
