"""Small random configurations of every architecture, made by shrinking its default one.

Sizes are chosen so that what sets architectures apart is exercised: four layers (patterns of
layer types), fewer key-value heads than heads, windows and top-k of sparse indexers below the
length of the probe, several experts.
"""

from __future__ import annotations

import copy
import dataclasses
import re
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
_rule("cross_hidden_size upsample_groups reassemble_hidden_size", HIDDEN)
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
_rule("cross_num_attention_heads cross_num_key_value_heads", HEADS)
_rule("head_dim swa_head_dim attention_head_size dim_head kv_channels d_kv", HEAD_DIM)
_rule("global_head_dim attention_head_dim qk_nope_head_dim v_head_dim", HEAD_DIM)
_rule("swa_v_head_dim cross_head_dim", HEAD_DIM)
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
_rule("context_size", 8)
_rule("adapter_rank", 16)
_rule("out_hidden_size", HIDDEN)
_rule("image_size img_size", 32)
_rule("patch_size", 8)
_rule("max_source_positions projection_dim", 32)
_rule("num_queries num_query_tokens num_frames", 4)

# A configuration may be shrunk in all its sizes; in its lengths alone, where its widths depend on
# each other (stages of a pyramid); or not at all.
RUNGS = ("sizes", "lengths", "nothing")
_LENGTHS = frozenset(
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers vocab_size image_size img_size num_queries "
    "max_position_embeddings max_source_positions max_target_positions".split()
)


def small_config(model_type: str, decoder: bool = True, rung: str = "sizes") -> Any:
    """A configuration with small sizes; `decoder` where the architecture is both or either."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    values = _small(config_class, model_type, rung)
    if decoder and any(field.name == "is_decoder" for field in dataclasses.fields(config_class)):
        values["is_decoder"] = True
    # The tables of overrides are shared by types, and what is built may change what it was given.
    config = config_class(**copy.deepcopy(values))
    _fit_rotations(config)
    return config


def _fit_rotations(config: Any) -> None:
    """Sections of rotary embeddings (time, height, width) that together fit the small heads."""
    for part in (config, *vars(config).values()):
        rope = getattr(part, "rope_parameters", None)
        if not isinstance(rope, dict) or not rope.get("mrope_section"):
            continue
        heads = getattr(part, "num_attention_heads", HEADS)
        width = getattr(part, "head_dim", None) or part.hidden_size // heads
        half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        count = len(rope["mrope_section"])
        if sum(rope["mrope_section"]) != half:
            rest = [half // count] * (count - 1)
            rope["mrope_section"] = [half - sum(rest), *rest]


def _small(config_class: Any, model_type: str, rung: str) -> dict[str, Any]:
    if model_type in REPLACED:
        return dict(REPLACED[model_type])
    if rung == "nothing":
        return {}
    values: dict[str, Any] = {}
    defaults = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config_class)
    }
    for name, small in _SIZES.items():
        default = defaults.get(name)
        if rung == "lengths" and name not in _LENGTHS:
            continue
        if isinstance(default, int) and not isinstance(default, bool) and default > small:
            values[name] = small
        elif name in ("image_size", "patch_size") and isinstance(default, list | tuple):
            values[name] = type(default)(min(item, small) for item in default)
    if rung == "sizes":
        _small_special(defaults, values)
    _small_tokens(defaults, values)
    for name, (sub, given) in _sub_configs(config_class).items():
        values[name] = {"model_type": sub.model_type, **_small(sub, sub.model_type, rung), **given}
    if rung == "sizes":
        for name, given in OVERRIDES.get(model_type, {}).items():
            part = values.get(name)
            both = isinstance(part, dict) and isinstance(given, dict)
            values[name] = dict(part or {}, **given) if both else given
    return values


# Ids that stand for images, frames and the like get numbers of their own from here on.
FIRST_SPECIAL = 100


def _small_tokens(defaults: dict[str, Any], values: dict[str, Any]) -> None:
    """Ids of tokens, which must be known to the small vocabulary."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = defaults.get(name)
        if isinstance(token, int) and token >= VOCABULARY:
            values[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}[name]
    special = [
        name
        for name, token in defaults.items()
        if name.endswith(("token_id", "token_index")) and name not in values
        if isinstance(token, int) and token >= VOCABULARY
    ]
    values.update({name: FIRST_SPECIAL + place for place, name in enumerate(special)})


def _sub_configs(config_class: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The classes of a configuration's parts (text, vision, ...), as its defaults make them.

    With each, the fields that the defaults give it. In place of a backbone of timm, which may not
    be installed, stands the one that transformers has for it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names: dict[str, Any] = getattr(config_class, "sub_configs", None) or {}
    stated: dict[str, Any] = getattr(config_class, "sub_configs_defaults", None) or {}
    default = config_class() if names else None
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name in names:
        part = getattr(default, name, None)
        spec = stated.get(name)
        own = getattr(spec, "model_type", None)
        given = _outputs_of(getattr(spec, "init_kwargs", None) or {})
        if part is not None and part.model_type == "timm_backbone" and own is not None:
            found[name] = (CONFIG_MAPPING[own], given)
        elif part is not None:
            found[name] = (type(part), given)
    return found


def _outputs_of(given: dict[str, Any]) -> dict[str, Any]:
    """What makes a part a backbone or a decoder: flags, and the layers that give an output.

    Layers are those among the ones that the small part has.
    """
    kept: dict[str, Any] = {}
    for name, first in (("out_indices", ""), ("out_features", "stage")):
        chosen = given.get(name)
        if not chosen:
            continue
        kept[name] = chosen
        numbers = [int(digits) for item in chosen if (digits := re.sub(r"\D", "", str(item)))]
        if max(numbers, default=0) > LAYERS:
            last = range(LAYERS - len(chosen) + 1, LAYERS + 1)
            kept[name] = [f"{first}{n}" if first else n for n in last]
    flags = {name: value for name, value in given.items() if isinstance(value, bool)}
    return kept | flags if kept or "is_decoder" in flags else {}


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
    if "window_size" in values and "spatial_merge_size" in defaults:
        # In pixels: two by two of the patches that are merged.
        merged = int(defaults["spatial_merge_size"]) * int(values.get("patch_size", 8))
        values["window_size"] = 2 * merged
    if defaults.get("attn_logit_softcapping") is not None:
        # The default would never be felt by logits as small as these.
        values["attn_logit_softcapping"] = 2.0
