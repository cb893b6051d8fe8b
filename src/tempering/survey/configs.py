"""Small random configurations of every architecture, made by shrinking its default one.

Sizes are chosen so that what sets architectures apart is exercised: four layers (patterns of
layer types), fewer key-value heads than heads, windows and top-k of sparse indexers below the
length of the probe, several experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tempering.survey.overrides import OVERRIDES, REPLACED

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 4
HIDDEN, VOCABULARY, EXPERTS = HEADS * HEAD_DIM, 128, 4

# Field of a configuration -> its small value. Fields that an architecture lacks are left out.
_SIZES: dict[str, int] = {}


def _rule(names: str, value: int) -> None:
    _SIZES.update(dict.fromkeys(names.split(), value))


_rule("hidden_size d_model n_embd emb_dim dim embed_dim attention_hidden_size", HIDDEN)
_rule("decoder_embed_dim encoder_embed_dim output_proj_dim d_embed lru_width", HIDDEN)
_rule("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff", 96)
_rule("moe_intermediate_size intermediate_size_mlp ffn_hidden_size dense_intermediate_size", 96)
_rule("shared_expert_intermediate_size expert_ffn_hidden_size feed_forward_size d_ff", 96)
_rule("moe_shared_expert_intermediate_size shared_experts_intermediate_size dim_ff", 96)
_rule("hidden_dim ffn_intermediate_size", 96)
_rule("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers", LAYERS)
_rule("num_decoder_layers num_encoder_layers", LAYERS)
_rule("num_attention_heads n_head n_heads num_heads attention_heads", HEADS)
_rule("decoder_attention_heads encoder_attention_heads swa_num_attention_heads", HEADS)
_rule("num_decoder_attention_heads num_encoder_attention_heads", HEADS)
_rule("head_dim swa_head_dim attention_head_size dim_head kv_channels d_kv", HEAD_DIM)
_rule("global_head_dim attention_head_dim qk_nope_head_dim v_head_dim", HEAD_DIM)
_rule("swa_v_head_dim", HEAD_DIM)
_rule("qk_rope_head_dim rotary_dim", 8)
_rule("q_lora_rank kv_lora_rank o_lora_rank", 32)
_rule("vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input", VOCABULARY)
_rule("hidden_size_per_layer_input embedding_size input_embedding_size word_embed_proj_dim", 32)
_rule("output_embedding_size altup_lauruel_rank laurel_rank hc_lowrank gated_norm_rank", 32)
_rule("num_experts num_local_experts n_routed_experts moe_num_experts", EXPERTS)
_rule("num_experts_per_tok moe_topk moe_k top_k_experts", 2)
_rule("zero_expert_num router_hidden_size", 8)
_rule("n_group topk_group", 1)
_rule("first_k_dense_replace num_dense_layers", 1)
_rule("sliding_window window_size local_attention attention_window_size sliding_window_size", 4)
_rule("attention_chunk_size", 4)
_rule("index_topk indexer_budget", 4)
_rule("index_n_heads indexer_n_heads", 2)
_rule("index_head_dim indexer_head_dim", 16)
_rule("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions", 64)
_rule("linear_num_key_heads linear_num_value_heads linear_num_heads", 4)
_rule("linear_key_head_dim linear_value_head_dim linear_head_dim", 16)
_rule("mamba_n_heads mamba_num_heads n_mamba_heads", 4)
_rule("mamba_d_head mamba_head_dim mamba_headdim", 32)
_rule("mamba_d_state ssm_state_size state_size", 16)
_rule("mamba_n_groups mamba_ngroups n_groups", 1)
_rule("mamba_chunk_size chunk_size", 4)
_rule("adapter_rank image_size", 16)


def small_config(model_type: str, decoder: bool = True) -> Any:
    """A configuration with small sizes; `decoder` where the architecture is both or either."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    values = _small(config_class, model_type)
    if decoder and any(field.name == "is_decoder" for field in dataclasses.fields(config_class)):
        values["is_decoder"] = True
    return config_class(**values)


def _small(config_class: Any, model_type: str) -> dict[str, Any]:
    if model_type in REPLACED:
        return dict(REPLACED[model_type])
    values: dict[str, Any] = {}
    defaults = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config_class)
    }
    for name, small in _SIZES.items():
        default = defaults.get(name)
        if isinstance(default, int) and not isinstance(default, bool) and default > small:
            values[name] = small
    _small_special(defaults, values)
    for name, sub in _sub_configs(config_class).items():
        values[name] = {"model_type": sub.model_type, **_small(sub, sub.model_type)}
    values.update(OVERRIDES.get(model_type, {}))
    return values


def _sub_configs(config_class: Any) -> dict[str, Any]:
    """The classes of a configuration's parts (text, vision, ...), as its defaults make them."""
    names: dict[str, Any] = getattr(config_class, "sub_configs", None) or {}
    if not names:
        return {}
    default = config_class()
    parts = {name: getattr(default, name, None) for name in names}
    return {name: type(part) for name, part in parts.items() if part is not None}


def _small_special(defaults: dict[str, Any], values: dict[str, Any]) -> None:
    """Fields whose small value depends on the default of another."""
    heads = defaults.get("num_attention_heads")
    for name in ("num_key_value_heads", "swa_num_key_value_heads"):
        if name in defaults:
            # Multi-head by design (latent attention) stays so; else grouped heads.
            same = defaults[name] is not None and defaults[name] == heads
            same = same or "kv_lora_rank" in defaults
            multi_query = defaults[name] == 1
            values[name] = HEADS if same else 1 if multi_query else KV_HEADS
    if defaults.get("attn_logit_softcapping") is not None:
        # The default would never be felt by logits as small as these.
        values["attn_logit_softcapping"] = 2.0
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = defaults.get(name)
        if isinstance(token, int) and token >= VOCABULARY:
            values[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}[name]
