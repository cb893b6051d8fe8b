"""The law of length that some models have of their own, read off a layer of attention.

Llama 4 multiplies the queries of its layers without rotary embedding, and Ministral 3 and Mistral 4
those of all layers, by 1 + a log(1 + floor(n / step)).
"""

from __future__ import annotations

from typing import Any

from torch import nn

# The function by which the modelling files of Ministral 3 and Mistral 4 scale their queries.
_SCALE = "get_llama_4_attn_scale"


def own_law(module: nn.Module) -> str | None:
    """The law of a layer as the text of a rule, `log_steps(a, step)`; None where it has none.

    Llama 4 counts tokens from 1, padding included; the others read position ids, which begin at 0
    (`log_steps(a, step, 1)`).
    """
    layer: Any = module
    if getattr(layer, "attn_temperature_tuning", False) and not getattr(layer, "use_rope", True):
        return f"log_steps({float(layer.attn_scale)!r},{float(layer.floor_scale)!r})"
    code = getattr(type(module).forward, "__code__", None)
    if code is None or _SCALE not in code.co_names:
        return None
    rope = layer.config.rope_parameters
    scale, step = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return f"log_steps({float(scale)!r},{float(step)!r},1)"
