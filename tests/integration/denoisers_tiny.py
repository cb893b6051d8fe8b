"""Tiny random models of diffusers, with inputs of two rows; and their attention in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

HEADS, WIDTH = 2, 8
TEXT, TEXT_WIDTH = 5, 12
ROWS, SIDE, FRAMES = 2, 4, 3
# Pooled text attends inside a function of PyTorch's, out of reach.
REFUSED = {"hunyuan_dit": "time_extra_emb.pooler"}
# Models that compute parts in single precision, whatever their weights are in.
SINGLE = {"kandinsky5"}
# What a mask of diffusers adds where it hides a key.
HIDDEN = -1e4

Maker = Callable[[], tuple[str, dict[str, Any], dict[str, Any]]]
MAKERS: dict[str, Maker] = {}


def maker(function: Maker) -> Maker:
    MAKERS[function.__name__] = function
    return function


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def image(channels: int = 4, side: int = SIDE) -> Tensor:
    return draw(ROWS, channels, side, side)


def video(channels: int = 4, side: int = SIDE) -> Tensor:
    return draw(ROWS, channels, FRAMES, side, side)


def text(width: int = TEXT_WIDTH) -> Tensor:
    return draw(ROWS, TEXT, width)


def times() -> Tensor:
    return torch.tensor([3, 7])


def padding() -> Tensor:
    """A mask of text, 1 for what is real, whose second row is shorter."""
    mask = torch.ones(ROWS, TEXT, dtype=torch.long)
    mask[1, 3:] = 0
    return mask


SHAPE = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH}


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


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """(model, sample): a model whose weights are drawn wide, so that T matters in every layer."""
    import diffusers

    kind, config, inputs = MAKERS[name]()
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim > 1:  # norms start as they should, and gates at zero
                value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
            elif "norm" not in key:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            if any(part in key for part in ("to_q", "to_k", "add_q", "add_k", "qkv")):
                value.mul_(2)
    return model.to(dtype), to(inputs, dtype)


def to(item: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of nested inputs in another dtype."""
    if isinstance(item, Tensor):
        return item.to(dtype) if item.is_floating_point() else item
    if isinstance(item, dict):
        return {name: to(value, dtype) for name, value in item.items()}
    if isinstance(item, list | tuple):
        return type(item)(to(value, dtype) for value in item)
    return item


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The first tensor that a model gives."""
    with torch.no_grad():
        given = model(**inputs, return_dict=False)[0]
    return given[0] if isinstance(given, list | tuple) else given


@contextlib.contextmanager
def attention_divided(
    model: Any, temperatures: dict[str, Tensor], beta: Callable[..., Tensor] | None = None
) -> Iterator[list[str]]:
    """softmax(l / T) V in float64, in place of every attention that the model's modules call.

    temperatures: [heads] or [rows, heads] by module. beta: (module, keys seen of every query) ->
    one more factor. Yields the names of the modules in the order of their calls. It shares no code
    with the library: scaled dot products are written out, and the module is the innermost one, of
    those that have a temperature, whose forward runs.
    """
    running: list[str] = []
    called: list[str] = []
    handles = []
    for name in temperatures:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    own = torch.Tensor.softmax

    def over_t(logits: Tensor) -> Tensor:
        """Finished logits [rows, heads, q, k] over T; those at or under -5000 are hidden."""
        name = running[-1]
        called.append(name)
        T = temperatures[name].double()
        T = T.expand(logits.shape[0], -1) if T.ndim == 1 else T
        factor = 1 / T[:, :, None, None]
        live = logits > HIDDEN / 2
        if beta is not None:
            factor = factor * beta(name, live.sum(-1, keepdim=True))
        hidden = torch.where(live.any(-1, keepdim=True), -torch.inf, logits)
        return torch.where(live, logits * factor, hidden)

    def product(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        dtype = query.dtype
        query, key, value = query.double(), key.double(), value.double()
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
        if is_causal:
            later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask.double()
        over = over_t(logits)
        weights = torch.exp(over - over.logsumexp(-1, keepdim=True)).nan_to_num(0.0)
        # In the memory order of PyTorch's own kernels, which some models rely on.
        mixed = torch.einsum("bhqk,bhkd->bqhd", weights, value).to(dtype)
        return mixed.contiguous().transpose(1, 2)

    def softmax(logits, dim=None, *args, **kwargs):
        if not running:
            return own(logits, dim, *args, **kwargs)
        heads = temperatures[running[-1]].shape[-1]
        folded = logits.double().reshape(-1, heads, *logits.shape[-2:])
        return own(over_t(folded), -1).reshape(logits.shape).to(logits.dtype)

    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", product),
        mock.patch.object(torch.Tensor, "softmax", softmax),
        mock.patch.object(torch, "softmax", softmax),
        mock.patch.object(functional, "softmax", softmax),
    ):
        try:
            yield called
        finally:
            for handle in handles:
                handle.remove()


def random_rows(plan: Any, seed: int = 3) -> list[Tensor]:
    """Temperatures of every head, log-uniform in 1/3..3."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.exp(1.1 * (2 * torch.rand(heads, generator=generator, dtype=torch.float64) - 1))
        for heads in plan.heads
    ]
