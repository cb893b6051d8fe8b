"""Tiny random models of every way in which a temperature folds, or doesn't."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, HEADS = 2, 4
_COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": HEADS,
    "first_k_dense_replace": LAYERS,
}
_GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128, "n_inner": 48}
# Of Qwen3-Next: layer 0 has linear attention, layer 1 a softmax.
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

# name -> settings beyond the common ones, verdict, what folds in its first layer
FOLDS: dict[str, tuple[dict[str, Any], str, dict[str, tuple[int, str]]]] = {
    "llama": ({}, "per head", {"self_attn.q_proj.weight": (0, "w")}),
    "qwen2": (
        {},
        "per head",
        {"self_attn.q_proj.weight": (0, "w"), "self_attn.q_proj.bias": (0, "w")},
    ),
    # the weight of a Conv1D is transposed: heads lie along its columns
    "gpt2": (_GPT2, "per head", {"attn.c_attn.weight": (1, "w"), "attn.c_attn.bias": (0, "w")}),
    # q, k, v interleaved head by head
    "gpt_neox": (
        {},
        "per head",
        {
            "attention.query_key_value.weight": (0, "w"),
            "attention.query_key_value.bias": (0, "w"),
        },
    ),
    # q heads of a group, then its k and its v
    "falcon": (
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False},
        "per head",
        {"self_attention.query_key_value.weight": (0, "w")},
    ),
    "phi3": ({}, "per head", {"self_attn.qkv_proj.weight": (0, "w")}),
    "opt": (
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.25},
        "per head",
        {"self_attn.q_proj.weight": (0, "w"), "self_attn.q_proj.bias": (0, "w")},
    ),
    # attention code of its own
    "gpt_neo": (
        {"num_layers": LAYERS, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]]},
        "per head",
        {"attn.attention.q_proj.weight": (0, "w")},
    ),
    "codegen": ({**_GPT2, "rotary_dim": 4}, "per head", {"attn.qkv_proj.weight": (0, "w")}),
    "deepseek_v3": (_MLA, "per head", {"self_attn.q_b_proj.weight": (0, "w")}),
    "gpt_oss": (
        {**_EXPERTS, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        "per head",
        {
            "self_attn.q_proj.weight": (0, "w"),
            "self_attn.q_proj.bias": (0, "w"),
            "self_attn.sinks": (0, "w"),
        },
    ),
    # a norm over all heads at once undoes q_proj; its own weight is per head
    "olmo2": ({}, "per head", {"self_attn.q_norm.weight": (0, "w")}),
    "qwen3": ({}, "per layer", {"self_attn.q_norm.weight": (0, "w")}),
    "gemma3_text": (
        {"layer_types": ["sliding_attention", "full_attention"]},
        "per layer",
        {"self_attn.q_norm.weight": (0, "1+w")},
    ),
}

# name -> settings beyond the common ones, part of the reason
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({}, "soft cap"),
    "bloom": ({"n_layer": LAYERS, "n_head": HEADS}, "added part (a position bias"),
    "mpt": (
        {"d_model": 32, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64},
        "added part (a position bias",
    ),
    "olmo": ({"clip_qkv": 50.0}, "clamped"),
    "llama4_text": (
        {
            **_EXPERTS,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 1],
            "layer_types": ["full_attention"] * 2,
        },
        "no weight comes after the norm",
    ),
    "mamba": ({"state_size": 4}, "no softmax attention"),
}


def tiny(name: str, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    """A random causal model in eager attention, every parameter off its initial constant."""
    given = {**FOLDS, **REFUSED}.get(name, ({},))[0] if settings is None else settings
    values = {**_COMMON, **given, **more}
    if name == "falcon":  # reads head_dim off its sizes
        del values["head_dim"]
    if name == "xlnet":  # has no limit
        del values["max_position_embeddings"]
    config = AutoConfig.for_model(name, **values)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(seed: int = 0, rows: int = 2, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 61, (rows, length), generator=generator)


def temperatures(verdict: str, seed: int = 1) -> torch.Tensor:
    """Log-uniform in 1/3..3 per head, or per layer, as a verdict allows; [layers, heads]."""
    generator = torch.Generator().manual_seed(seed)
    columns = HEADS if verdict == "per head" else 1
    share = torch.rand(LAYERS, columns, generator=generator, dtype=torch.float64)
    return torch.exp((share * 2 - 1) * 1.1).expand(LAYERS, HEADS).contiguous()
