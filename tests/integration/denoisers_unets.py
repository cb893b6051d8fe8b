"""Tiny random UNets of diffusers, and models that are parts of them."""

from __future__ import annotations

from tests.integration.denoisers_inputs import (
    FRAMES,
    HEADS,
    ROWS,
    SHAPE,
    SIDE,
    TEXT,
    TEXT_WIDTH,
    draw,
    image,
    maker,
    padding,
    text,
    times,
    video,
)


@maker
def unet():
    config = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": HEADS,
    }
    inputs = {"sample": image(side=8), "timestep": 3, "encoder_hidden_states": text()}
    return "UNet2DConditionModel", config, inputs


@maker
def unet_masked():
    name, config, inputs = unet()
    return name, config, {**inputs, "encoder_attention_mask": padding()}


@maker
def unet_of_images_alone():
    config = {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return "UNet2DModel", config, {"sample": image(3, 8), "timestep": times()}


@maker
def unet_with_added_keys():
    """DeepFloyd's attention, to image and text at once."""
    config = {
        "sample_size": 8,
        "down_block_types": ("SimpleCrossAttnDownBlock2D",),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D",),
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 8,
    }
    inputs = {"sample": image(side=8), "timestep": 3, "encoder_hidden_states": text()}
    return "UNet2DConditionModel", config, inputs


@maker
def unet3d():
    config = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
    }
    inputs = {"sample": video(side=8), "timestep": 3, "encoder_hidden_states": text()}
    return "UNet3DConditionModel", config, inputs


@maker
def unet_motion():
    config = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": TEXT_WIDTH,
        "num_attention_heads": HEADS,
        "motion_num_attention_heads": HEADS,
    }
    words = draw(ROWS * FRAMES, TEXT, TEXT_WIDTH)  # the pipeline repeats them for every frame
    inputs = {"sample": video(side=8), "timestep": 3, "encoder_hidden_states": words}
    return "UNetMotionModel", config, inputs


@maker
def unet_spatio_temporal():
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "block_out_channels": (32, 32),
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 12,
        "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "num_attention_heads": HEADS,
        "num_frames": FRAMES,
    }
    inputs = {
        "sample": video(side=8).transpose(1, 2),
        "timestep": 3,
        "encoder_hidden_states": draw(ROWS, 1, TEXT_WIDTH),
        "added_time_ids": draw(ROWS, 3),
    }
    return "UNetSpatioTemporalConditionModel", config, inputs


@maker
def temporal():
    config = {
        **SHAPE,
        "in_channels": 16,
        "num_layers": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": None,
    }
    frames = draw(ROWS * FRAMES, 16, SIDE, SIDE)
    return "TransformerTemporalModel", config, {"hidden_states": frames, "num_frames": FRAMES}


@maker
def vae():
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (8,),
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return "AutoencoderKL", config, {"sample": image(3, 8)}
