"""Tiny models for audits, and engines that are wrong by their configuration, not by our changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from tempering.audit import Scored, scored

WORDS = 96
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 10000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(16)],
    "long_factor": [1.5 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}


def _common(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }


def _random(kind: Any, config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "sinks" in name or name.endswith("bias"):
                # All ones, as they are made, would hide what is done to them.
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        model.lm_head.weight.mul_(0.5)
    return model


def llama(seed: int = 0, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = _common(**{"rope_parameters": dict(YARN), **more})
    return _random(LlamaForCausalLM, LlamaConfig(**settings), seed)


def qwen2(seed: int = 0, **more: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings = _common(**{"rope_parameters": dict(YARN), **more})
    return _random(Qwen2ForCausalLM, Qwen2Config(**settings), seed)


_CAPPED: dict[str, Any] = {
    "query_pre_attn_scalar": 20,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 5.0,
    "attn_implementation": "eager",
}


def gemma2(seed: int = 0, **more: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = _common(**_CAPPED, **more)
    return _random(Gemma2ForCausalLM, Gemma2Config(**settings), seed)


def gemma3(seed: int = 0, **more: Any) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    settings = _common(
        query_pre_attn_scalar=20,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=5.0,
        **more,
    )
    return _random(Gemma3ForCausalLM, Gemma3TextConfig(**settings), seed)


def vaultgemma(seed: int = 0, **more: Any) -> Any:
    from transformers import VaultGemmaConfig, VaultGemmaForCausalLM

    settings = _common(**_CAPPED, **more)
    return _random(VaultGemmaForCausalLM, VaultGemmaConfig(**settings), seed)


def phi3(seed: int = 0, **more: Any) -> Any:
    """Prompts of more than 64 tokens are long for longrope."""
    from transformers import Phi3Config, Phi3ForCausalLM

    # Its heads have hidden_size / heads dimensions, and the configuration its own limit.
    own = {"hidden_size": 128, "original_max_position_embeddings": 64, "sliding_window": None}
    settings = _common(**{"rope_parameters": dict(LONGROPE), **own, **more})
    return _random(Phi3ForCausalLM, Phi3Config(**settings), seed)


def mistral(seed: int = 0, **more: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return _random(MistralForCausalLM, MistralConfig(**_common(sliding_window=24, **more)), seed)


def qwen3(seed: int = 0, **more: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _random(Qwen3ForCausalLM, Qwen3Config(**_common(**more)), seed)


def gpt_oss(seed: int = 0, **more: Any) -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    settings = _common(
        sliding_window=24,
        num_local_experts=2,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=dict(YARN),
        **more,
    )
    return _random(GptOssForCausalLM, GptOssConfig(**settings), seed)


def granite_swa(seed: int = 0, **more: Any) -> Any:
    from transformers import GraniteSWAConfig, GraniteSWAForCausalLM

    settings = _common(
        attention_multiplier=0.3,
        logits_scaling=2.0,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        attn_implementation="eager",
        **more,
    )
    return _random(GraniteSWAForCausalLM, GraniteSWAConfig(**settings), seed)


def granite(seed: int = 0, **more: Any) -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    settings = _common(attention_multiplier=0.3, logits_scaling=2.0, **more)
    return _random(GraniteForCausalLM, GraniteConfig(**settings), seed)


def cohere(seed: int = 0, **more: Any) -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    settings = _common(logit_scale=0.5, **more)
    settings["tie_word_embeddings"] = True
    return _random(CohereForCausalLM, CohereConfig(**settings), seed)


def reconfigured(model: Any, change: Callable[[Any], None]) -> Any:
    """Another model with the same weights, made from a changed configuration."""
    config = copy.deepcopy(model.config)
    change(config)
    config._attn_implementation = model.config._attn_implementation
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def prompts(count: int = 2, length: int = 80, seed: int = 0) -> torch.Tensor:
    """Random tokens behind the BOS."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (count, length), generator=generator)
    ids[:, 0] = 1
    return ids


@torch.no_grad()
def said_by(model: Any, ids: torch.Tensor) -> list[Scored]:
    """What an engine that runs this model says, as a server would."""
    found = []
    for place, row in enumerate(ids):
        logits = model(input_ids=row[None]).logits[0].float()
        values = logits.log_softmax(-1)[:-1].gather(1, row[1:, None])[:, 0]
        found.append(scored(row.tolist(), [None, *values.tolist()], f"prompt {place}"))
    return found
