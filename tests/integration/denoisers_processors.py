"""A model around each attention processor of diffusers.models.attention_processor.

Imported where diffusers is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import attention_processor as shipped
from diffusers.models.modeling_utils import ModelMixin

from tests.integration import denoisers_tiny as tiny

BASE = {"query_dim": 16, "heads": 2, "dim_head": 8}
CROSS = {**BASE, "cross_attention_dim": tiny.TEXT_WIDTH}
JOINT = {**BASE, "added_kv_proj_dim": tiny.TEXT_WIDTH, "out_dim": 16, "context_pre_only": False}
ADDED = {**BASE, "added_kv_proj_dim": tiny.TEXT_WIDTH, "norm_num_groups": 4, "bias": True}


class Host(ModelMixin, ConfigMixin):
    """A model of one attention module, whose inputs are those of its processor."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, attention: dict[str, Any], kind: str = "Attention") -> None:
        super().__init__()
        settings = dict(attention)
        if kind == "MochiAttention":
            settings["processor"] = shipped.MochiAttnProcessor2_0()
        self.attn = getattr(shipped, kind)(**settings)

    def forward(self, return_dict: bool = True, **inputs: Any) -> tuple[Any, ...]:
        given = self.attn(**inputs)
        return given if isinstance(given, tuple) else (given,)


def tokens(rows=2, width=16, count=9):
    return {"hidden_states": tiny.draw(rows, count, width)}


def with_text(rows=2, width=tiny.TEXT_WIDTH, **more):
    return {**tokens(rows), "encoder_hidden_states": tiny.draw(rows, tiny.TEXT, width), **more}


def places():
    return {**with_text(), "hidden_states": tiny.draw(2, 16, 9)}


def custom(name):
    return lambda: getattr(shipped, name)(hidden_size=16, cross_attention_dim=tiny.TEXT_WIDTH)


def image_prompt(name):
    return lambda: getattr(shipped, name)(16, tiny.TEXT_WIDTH)


IMAGE_PROMPT = {
    **with_text(),
    "encoder_hidden_states": (tiny.text(), [tiny.draw(2, 1, 4, tiny.TEXT_WIDTH)]),
}
MASK = torch.ones(2, tiny.TEXT, dtype=torch.bool)
# name -> (arguments of Attention, inputs, and what makes the processor if its class alone doesn't)
HOSTS: dict[str, tuple[Any, ...]] = {
    "AttnProcessor": (CROSS, with_text()),
    "AttnProcessor2_0": (CROSS, with_text()),
    "XFormersAttnProcessor": (CROSS, with_text()),
    "SlicedAttnProcessor": (CROSS, with_text(), lambda: shipped.SlicedAttnProcessor(1)),
    "SlicedAttnAddedKVProcessor": (
        ADDED,
        places(),
        lambda: shipped.SlicedAttnAddedKVProcessor(1),
    ),
    "CustomDiffusionAttnProcessor": (CROSS, with_text(), custom("CustomDiffusionAttnProcessor")),
    "CustomDiffusionAttnProcessor2_0": (
        CROSS,
        with_text(),
        custom("CustomDiffusionAttnProcessor2_0"),
    ),
    "CustomDiffusionXFormersAttnProcessor": (
        CROSS,
        with_text(),
        custom("CustomDiffusionXFormersAttnProcessor"),
    ),
    "AttnAddedKVProcessor": (ADDED, places()),
    "AttnAddedKVProcessor2_0": (ADDED, places()),
    "XFormersAttnAddedKVProcessor": (ADDED, places()),
    "JointAttnProcessor2_0": (JOINT, with_text()),
    "PAGJointAttnProcessor2_0": (JOINT, with_text()),
    "PAGCFGJointAttnProcessor2_0": (JOINT, with_text(3)),
    "FusedJointAttnProcessor2_0": (JOINT, with_text()),
    "XFormersJointAttnProcessor": (JOINT, with_text()),
    "SD3IPAdapterJointAttnProcessor2_0": (
        JOINT,
        with_text(ip_hidden_states=tiny.draw(2, 3, 6), temb=tiny.draw(2, 10)),
        lambda: shipped.SD3IPAdapterJointAttnProcessor2_0(16, 6, 8, 10),
    ),
    "AllegroAttnProcessor2_0": (BASE, tokens()),
    "AuraFlowAttnProcessor2_0": (JOINT, with_text()),
    "FusedAuraFlowAttnProcessor2_0": (JOINT, with_text()),
    "CogVideoXAttnProcessor2_0": (BASE, with_text(width=16)),
    "FusedCogVideoXAttnProcessor2_0": (BASE, with_text(width=16)),
    "MochiVaeAttnProcessor2_0": (BASE, tokens()),
    "StableAudioAttnProcessor2_0": ({**BASE, "kv_heads": 1}, tokens()),
    "HunyuanAttnProcessor2_0": (CROSS, with_text()),
    "FusedHunyuanAttnProcessor2_0": (BASE, tokens()),
    "PAGHunyuanAttnProcessor2_0": (BASE, tokens()),
    "PAGCFGHunyuanAttnProcessor2_0": (BASE, tokens(3)),
    "LuminaAttnProcessor2_0": (
        {**CROSS, "kv_heads": 1},
        with_text(attention_mask=MASK),
    ),
    "FusedAttnProcessor2_0": (BASE, tokens()),
    "IPAdapterAttnProcessor": (CROSS, IMAGE_PROMPT, image_prompt("IPAdapterAttnProcessor")),
    "IPAdapterAttnProcessor2_0": (CROSS, IMAGE_PROMPT, image_prompt("IPAdapterAttnProcessor2_0")),
    "IPAdapterXFormersAttnProcessor": (
        CROSS,
        IMAGE_PROMPT,
        image_prompt("IPAdapterXFormersAttnProcessor"),
    ),
    "PAGIdentitySelfAttnProcessor2_0": (BASE, tokens()),
    "PAGCFGIdentitySelfAttnProcessor2_0": (BASE, tokens(3)),
    "SanaLinearAttnProcessor2_0": (BASE, tokens()),
    "PAGIdentitySanaLinearAttnProcessor2_0": (BASE, tokens()),
    "PAGCFGSanaLinearAttnProcessor2_0": (BASE, tokens(3)),
    "MochiAttnProcessor2_0": (
        {"query_dim": 16, "added_kv_proj_dim": tiny.TEXT_WIDTH, "heads": 2, "dim_head": 8},
        with_text(attention_mask=tiny.padding()),
    ),
    "SanaMultiscaleAttnProcessor2_0": (
        {"in_channels": 16, "out_channels": 16},
        {"hidden_states": tiny.draw(2, 16, 8, 8)},
    ),
}
KINDS = {
    "MochiAttnProcessor2_0": "MochiAttention",
    "SanaMultiscaleAttnProcessor2_0": "SanaMultiscaleLinearAttention",
}
REFUSED = {
    "SlicedAttnProcessor",
    "SlicedAttnAddedKVProcessor",
    "XFormersAttnProcessor",
    "XFormersAttnAddedKVProcessor",
    "XFormersJointAttnProcessor",
    "CustomDiffusionXFormersAttnProcessor",
    "IPAdapterXFormersAttnProcessor",
}
# Processors for hardware that is not here, which say so themselves; deprecated classes that give
# another one's object; and classes without a call.
ELSEWHERE = {"AttnProcessorNPU", "XLAFlashAttnProcessor2_0"}
RENAMED = {
    "FluxAttnProcessor2_0": "FluxAttnProcessor",
    "FluxSingleAttnProcessor2_0": "FluxAttnProcessor",
    "FusedFluxAttnProcessor2_0": "FluxAttnProcessor",
    "FluxIPAdapterJointAttnProcessor2_0": "FluxIPAdapterAttnProcessor",
    "FluxAttnProcessor2_0_NPU": "FluxAttnProcessor",
    "FusedFluxAttnProcessor2_0_NPU": "FluxAttnProcessor",
    "XLAFluxFlashAttnProcessor2_0": "FluxAttnProcessor",
}
UNCALLABLE = {
    "LoRAAttnProcessor",
    "LoRAAttnProcessor2_0",
    "LoRAXFormersAttnProcessor",
    "LoRAAttnAddedKVProcessor",
}


def host_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Any]]:
    settings, inputs, *maker = HOSTS[name]
    torch.manual_seed(0)
    host = Host(settings, KINDS.get(name, "Attention")).eval()
    processor = maker[0]() if maker else getattr(shipped, name)()
    host.attn.processor = processor
    if name.startswith("Fused"):
        host.attn.fuse_projections()
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    return host.to(dtype), tiny.to(inputs, dtype)
