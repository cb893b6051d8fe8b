"""Tiny random transformers of diffusers that make images or sound."""

from __future__ import annotations

from typing import Any

import torch

from tests.integration.denoisers_inputs import (
    HEADS,
    ROWS,
    SHAPE,
    SIDE,
    TEXT,
    TEXT_WIDTH,
    WIDTH,
    draw,
    image,
    maker,
    padding,
    text,
    times,
)


@maker
def dit():
    config = {**SHAPE, "num_layers": 2, "norm_num_groups": 4, "sample_size": 4}
    inputs = {"hidden_states": image(), "timestep": times(), "class_labels": torch.tensor([1, 2])}
    return "DiTTransformer2DModel", config | {"num_embeds_ada_norm": 8}, inputs


@maker
def pixart():
    config = {
        **SHAPE,
        "num_layers": 2,
        "norm_num_groups": 4,
        "sample_size": 4,
        "cross_attention_dim": HEADS * WIDTH,
        "caption_channels": TEXT_WIDTH,
        "use_additional_conditions": False,
    }
    inputs = {
        "hidden_states": image(),
        "timestep": times(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": padding(),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }
    return "PixArtTransformer2DModel", config, inputs


@maker
def sd3():
    config = {
        **SHAPE,
        "sample_size": 4,
        "in_channels": 4,
        "num_layers": 3,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": HEADS * WIDTH,
        "pooled_projection_dim": 10,
        "out_channels": 4,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    inputs = {
        "hidden_states": image(),
        "encoder_hidden_states": text(),
        "pooled_projections": draw(ROWS, 10),
        "timestep": times(),
    }
    return "SD3Transformer2DModel", config, inputs


FLUX = {
    **SHAPE,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (2, 2, 4),
}


def flux_inputs(axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": draw(ROWS, SIDE * SIDE, 4),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": draw(SIDE * SIDE, axes),
        "txt_ids": draw(TEXT, axes),
    }


@maker
def flux():
    config = {**FLUX, "pooled_projection_dim": 10}
    inputs = {**flux_inputs(), "pooled_projections": draw(ROWS, 10)}
    return "FluxTransformer2DModel", config, inputs


@maker
def flux2():
    config = {**FLUX, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8}
    inputs = {**flux_inputs(4), "guidance": torch.tensor([1.0, 2.0])}
    return "Flux2Transformer2DModel", config, inputs


@maker
def chroma():
    config = {
        **FLUX,
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 8,
        "approximator_layers": 1,
    }
    mask = torch.cat([padding(), torch.ones(ROWS, SIDE * SIDE, dtype=torch.long)], 1).bool()
    return "ChromaTransformer2DModel", config, {**flux_inputs(), "attention_mask": mask}


@maker
def bria():
    config = {**FLUX, "axes_dims_rope": [2, 2, 4]}
    return "BriaTransformer2DModel", config, flux_inputs()


@maker
def qwen_image():
    config = {
        **SHAPE,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (2, 2, 4),
    }
    inputs = {
        "hidden_states": draw(ROWS, SIDE * SIDE, 16),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": padding().bool(),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_shapes": [[(1, SIDE, SIDE)]] * ROWS,
    }
    return "QwenImageTransformer2DModel", config, inputs


@maker
def auraflow():
    config = {
        **SHAPE,
        "sample_size": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": HEADS * WIDTH,
        "pos_embed_max_size": 16,
    }
    inputs = {
        "hidden_states": image(),
        "encoder_hidden_states": text(),
        "timestep": torch.tensor([0.3, 0.7]),
    }
    return "AuraFlowTransformer2DModel", config, inputs


@maker
def cogview3():
    config = {
        **SHAPE,
        "in_channels": 4,
        "num_layers": 2,
        "out_channels": 4,
        "text_embed_dim": TEXT_WIDTH,
        "time_embed_dim": 8,
        "condition_dim": 2,
        "pos_embed_max_size": 8,
        "sample_size": 4,
    }
    size = torch.tensor([[32.0, 32.0]] * ROWS)
    inputs = {
        "hidden_states": image(),
        "encoder_hidden_states": text(),
        "timestep": times(),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(ROWS, 2),
    }
    return "CogView3PlusTransformer2DModel", config, inputs


@maker
def cogview4():
    _, config, inputs = cogview3()
    return "CogView4Transformer2DModel", config | {"rope_axes_dim": (8, 8)}, inputs


@maker
def sana():
    config = {
        **SHAPE,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_cross_attention_heads": HEADS,
        "cross_attention_head_dim": WIDTH,
        "cross_attention_dim": HEADS * WIDTH,
        "caption_channels": TEXT_WIDTH,
        "sample_size": 4,
    }
    inputs = {
        "hidden_states": image(),
        "encoder_hidden_states": text(),
        "timestep": times(),
        "encoder_attention_mask": padding(),
    }
    return "SanaTransformer2DModel", config, inputs


@maker
def hunyuan_dit():
    config = {
        **SHAPE,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": HEADS * WIDTH,
        "num_layers": 2,
        "cross_attention_dim": TEXT_WIDTH,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 4,
        "text_len": TEXT,
        "text_len_t5": 3,
        "activation_fn": "gelu-approximate",
        "use_style_cond_and_image_meta_size": False,
    }
    inputs = {
        "hidden_states": image(side=8),
        "timestep": times().float(),
        "encoder_hidden_states": text(),
        "text_embedding_mask": padding(),
        "encoder_hidden_states_t5": draw(ROWS, 3, 16),
        "text_embedding_mask_t5": torch.ones(ROWS, 3),
        "image_rotary_emb": (torch.ones(16, WIDTH), torch.zeros(16, WIDTH)),
    }
    return "HunyuanDiT2DModel", config, inputs


@maker
def lumina2():
    config = {
        "sample_size": 4,
        "in_channels": 4,
        "hidden_size": 16,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 4,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (16, 16, 16),
        "cap_feat_dim": TEXT_WIDTH,
    }
    inputs = {
        "hidden_states": image(),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": padding().bool(),
    }
    return "Lumina2Transformer2DModel", config, inputs


@maker
def prx():
    config = {
        "in_channels": 4,
        "patch_size": 2,
        "context_in_dim": TEXT_WIDTH,
        "hidden_size": 16,
        "num_heads": HEADS,
        "depth": 2,
        "axes_dim": [4, 4],
    }
    inputs = {
        "hidden_states": image(),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": text(),
        "attention_mask": padding().bool(),
    }
    return "PRXTransformer2DModel", config, inputs


@maker
def stable_audio():
    config = {
        "sample_size": 6,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 1,
        "cross_attention_dim": 8,
        "time_proj_dim": 8,
        "global_states_input_dim": 6,
        "cross_attention_input_dim": TEXT_WIDTH,
    }
    inputs = {
        "hidden_states": draw(ROWS, 4, 6),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": text(),
        "global_hidden_states": draw(ROWS, 1, 6),
        "rotary_embedding": (torch.ones(7, 4), torch.zeros(7, 4)),
    }
    return "StableAudioDiTModel", config, inputs


@maker
def prior():
    config = {**SHAPE, "num_layers": 2, "embedding_dim": 8, "num_embeddings": TEXT}
    inputs = {
        "hidden_states": draw(ROWS, 8),
        "timestep": times(),
        "proj_embedding": draw(ROWS, 8),
        "encoder_hidden_states": text(8),
        "attention_mask": padding().bool(),
    }
    return "PriorTransformer", config, inputs
