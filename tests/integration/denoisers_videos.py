"""Tiny random transformers of diffusers that make videos."""

from __future__ import annotations

import torch

from tests.integration.denoisers_inputs import (
    FRAMES,
    HEADS,
    ROWS,
    SHAPE,
    SIDE,
    TEXT,
    TEXT_WIDTH,
    WIDTH,
    draw,
    maker,
    padding,
    text,
    times,
    video,
)


@maker
def cogvideox():
    config = {
        **SHAPE,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 4,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": 2,
        "sample_width": SIDE,
        "sample_height": SIDE,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
    }
    inputs = {
        "hidden_states": video().transpose(1, 2),
        "encoder_hidden_states": text(),
        "timestep": times(),
    }
    return "CogVideoXTransformer3DModel", config, inputs


@maker
def wan():
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 2,
        "rope_max_seq_len": 16,
        "image_dim": 6,
        "added_kv_proj_dim": 24,
    }
    inputs = {
        "hidden_states": video(),
        "timestep": times(),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_image": draw(ROWS, 257, 6),
    }
    return "WanTransformer3DModel", config, inputs


@maker
def skyreels():
    _, config, inputs = wan()
    return "SkyReelsV2Transformer3DModel", config, inputs


@maker
def ltx():
    config = {
        **SHAPE,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": HEADS * WIDTH,
        "num_layers": 2,
        "caption_channels": TEXT_WIDTH,
    }
    inputs = {
        "hidden_states": draw(ROWS, FRAMES * SIDE, 4),
        "encoder_hidden_states": text(),
        "timestep": times(),
        "encoder_attention_mask": padding(),
        "num_frames": FRAMES,
        "height": 2,
        "width": 2,
    }
    return "LTXVideoTransformer3DModel", config, inputs


@maker
def hunyuan_video():
    config = {
        **SHAPE,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": TEXT_WIDTH,
        "pooled_projection_dim": 10,
        "rope_axes_dim": (2, 2, 4),
    }
    inputs = {
        "hidden_states": video(),
        "timestep": times(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": padding(),
        "pooled_projections": draw(ROWS, 10),
        "guidance": torch.tensor([1.0, 2.0]),
    }
    return "HunyuanVideoTransformer3DModel", config, inputs


@maker
def mochi():
    config = {
        **SHAPE,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "max_sequence_length": 16,
    }
    inputs = {
        "hidden_states": video(),
        "encoder_hidden_states": text(16),
        "timestep": times(),
        "encoder_attention_mask": padding().bool(),
    }
    return "MochiTransformer3DModel", config, inputs


@maker
def latte():
    config = {
        **SHAPE,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": HEADS * WIDTH,
        "attention_bias": True,
        "sample_size": SIDE,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 8,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": TEXT_WIDTH,
        "video_length": FRAMES,
    }
    inputs = {"hidden_states": video(), "timestep": times(), "encoder_hidden_states": text()}
    return "LatteTransformer3DModel", config, inputs


@maker
def allegro():
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_height": SIDE,
        "sample_width": SIDE,
        "sample_frames": FRAMES,
        "caption_channels": TEXT_WIDTH,
    }
    wave = (torch.ones(SIDE, 4), torch.zeros(SIDE, 4))
    at = torch.zeros(ROWS, FRAMES * SIDE * SIDE // 4, dtype=torch.long)
    inputs = {
        "hidden_states": video(),
        "encoder_hidden_states": text(),
        "timestep": times(),
        "attention_mask": torch.ones(ROWS, FRAMES, SIDE, SIDE),
        "encoder_attention_mask": padding(),
        "image_rotary_emb": ((wave, wave, wave), (at, at, at)),
    }
    return "AllegroTransformer3DModel", config, inputs


@maker
def kandinsky5():
    config = {
        "in_visual_dim": 4,
        "in_text_dim": TEXT_WIDTH,
        "in_text_dim2": 10,
        "time_dim": 16,
        "out_visual_dim": 4,
        "patch_size": (1, 2, 2),
        "model_dim": 16,
        "ff_dim": 16,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (2, 2, 4),
    }
    inputs = {
        "hidden_states": video().permute(0, 2, 3, 4, 1),
        "encoder_hidden_states": text(),
        "timestep": times(),
        "pooled_projections": draw(ROWS, 10),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(TEXT),
    }
    return "Kandinsky5Transformer3DModel", config, inputs
