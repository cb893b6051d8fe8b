"""What may be given for an argument of a forward, by its name and the model's configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tempering.survey.configs import FIRST_SPECIAL

ROWS, WORDS, TARGETS, PADDING = 2, 11, 7, 2


def parameters(model: Any) -> dict[str, Any]:
    """The named arguments of a forward, and their defaults."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(model.forward).parameters.values()
    return {item.name: item.default for item in found if item.kind in kinds}


# Heads that may look for special tokens.
_HEADS = ("ForQuestionAnswering", "ForSequenceClassification", "ForPreTraining")


class Maker:
    """Makes inputs for one model, by what its configurations say about sizes."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        name = type(model).__name__
        self.chooses = name.endswith("ForMultipleChoice")
        self.seeks = self.chooses or name.endswith(_HEADS)
        self.generator = torch.Generator().manual_seed(0)

    def number(self, *names: str, default: int) -> int:
        """The first of some fields that a configuration, or one inside it, has a number for."""
        for name in names:
            for config in self.configs():
                value = getattr(config, name, None)
                if isinstance(value, list | tuple) and value:
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    def sizes(self, name: str) -> list[int]:
        """What the configuration says under a name that holds many numbers; none if nothing."""
        stated = getattr(self.config, name, None)
        return list(stated) if isinstance(stated, list | tuple) else []

    def configs(self) -> list[Any]:
        """The configuration and those inside it, without text's."""
        found, waiting = [], [self.config]
        while waiting:
            config = waiting.pop(0)
            found.append(config)
            for value in vars(config).values():
                if hasattr(value, "to_dict") and hasattr(value, "model_type"):
                    waiting.append(value)
        return found

    def floats(self, *shape: int) -> Tensor:
        """Random numbers, alike in every row."""
        row = torch.randn(1, *shape, generator=self.generator)
        return row.expand(ROWS, *shape).contiguous()

    def words(self, count: int) -> Tensor:
        """Ids of ordinary words, alike in every row."""
        vocabulary = self.number("vocab_size", default=FIRST_SPECIAL)
        high = max(6, min(vocabulary, FIRST_SPECIAL))
        row = torch.randint(5, high, (1, count), generator=self.generator)
        return row.expand(ROWS, -1).contiguous()


def padded(count: int) -> Tensor:
    mask = torch.ones(ROWS, count, dtype=torch.long)
    mask[:, :PADDING] = 0
    return mask


def _images(maker: Maker) -> Iterator[Tensor]:
    channels = maker.number("num_channels", "in_channels", "in_chans", default=3)
    stated = maker.number("image_size", "img_size", default=96)
    if "image_grid_thw" in parameters(maker.model) or "grid_thw" in parameters(maker.model):
        patches = _patches(maker, channels)
        patch = maker.number("patch_size", default=8)
        merged = patch * maker.number("spatial_merge_size", default=2)
        yield patches
        yield patches.unflatten(1, (-1, channels, patch, patch))[:, 0]
        yield maker.floats(_GRID * _GRID, merged, merged, channels).flatten(0, 1)
    if "spatial_shapes" in parameters(maker.model):
        patch = maker.number("patch_size", default=8)
        yield maker.floats(_GRID * _GRID, channels * patch * patch)
    sizes = dict.fromkeys((stated, 32, 64, 96, 128, 224))
    for size in sizes:
        yield maker.floats(channels, size, size)
    frames = maker.number("num_frames", default=4)
    for size in sizes:
        for count in dict.fromkeys((frames, 2, 1)):  # a pair of images is what matching takes
            yield maker.floats(count, channels, size, size)


_GRID = 4


def _patches(maker: Maker, channels: int) -> Tensor:
    patch = maker.number("patch_size", default=8)
    times = maker.number("temporal_patch_size", "patch_temporal", default=1)
    rows = maker.floats(_GRID * _GRID, channels * times * patch * patch)
    return rows.flatten(0, 1)


def _grid(maker: Maker) -> Iterator[Tensor]:
    yield torch.tensor([[1, _GRID, _GRID]] * ROWS)


def _shapes(maker: Maker) -> Iterator[Tensor]:
    yield torch.tensor([[_GRID, _GRID]] * ROWS)


def _patch_mask(maker: Maker) -> Iterator[Tensor]:
    yield torch.ones(ROWS, _GRID * _GRID, dtype=torch.long)


def _videos(maker: Maker) -> Iterator[Tensor]:
    if "video_grid_thw" in parameters(maker.model):
        yield _patches(maker, maker.number("num_channels", "in_channels", default=3))
    channels = maker.number("num_channels", "in_channels", default=3)
    size = maker.number("image_size", "crop_size", default=32)
    for frames in (maker.number("num_frames", "frames_per_clip", default=4), 8, 16):
        yield maker.floats(frames, channels, size, size)
        yield maker.floats(channels, frames, size, size)


# Under these names, configurations say how many numbers a frame of sound has.
_BINS = (
    "input_size num_mel_bins feature_size input_feat_per_channel n_mels input_dim num_features "
    "input_feat_size feature_projection_input_dim"
).split()


def bins_of(maker: Maker) -> list[int]:
    """What a configuration says of the numbers in a frame of sound."""
    stated = [maker.number(name, default=0) for name in _BINS]
    counts = [count for count in dict.fromkeys(stated) if count] or [80]
    # Frames that are joined with their differences, in pairs.
    stacked = any(hasattr(config, "subsample_layers") for config in maker.configs())
    return [*counts, 4 * counts[0]] if stacked else counts


_MELS = 64


def _features(maker: Maker) -> Iterator[Tensor]:
    positions = maker.number("max_source_positions", default=32)
    for bins in bins_of(maker):
        for frames in dict.fromkeys((2 * positions, _MELS, 8 * WORDS, 100, 200, positions)):
            yield maker.floats(bins, frames)
            yield maker.floats(frames, bins)
            yield maker.floats(1, frames, bins)


def _hidden(maker: Maker) -> Iterator[Tensor]:
    if "grid_thw" in parameters(maker.model):
        yield _patches(maker, maker.number("num_channels", "in_channels", "in_chans", default=3))
    yield from _features(maker)


def _waves(maker: Maker) -> Iterator[Tensor]:
    length = maker.number("max_length", default=0)
    if length and maker.number("num_mel_bins", default=0):  # a spectrogram
        yield maker.floats(length, bins_of(maker)[0])
    hop = math.prod(maker.sizes("downsampling_ratios"))
    if hop > 1 and "input_features" in parameters(maker.model):
        yield maker.floats(1, _MELS * hop) * 0.1
    for length in (4000, 16000, 1920 * 4, 3200):
        yield maker.floats(length) * 0.1
        yield maker.floats(1, length) * 0.1
    yield from _vectors(maker)  # of models without the part that reads sound


def _vectors(maker: Maker) -> Iterator[Tensor]:
    """What a model reads in place of embeddings."""
    width = maker.number("latent_dim", "d_model", "hidden_size", default=64)
    yield maker.floats(WORDS, width)


def _latents(maker: Maker) -> Iterator[Tensor]:
    for width in (maker.number(name, default=64) for name in ("latent_dim", "hidden_size")):
        yield maker.floats(width, WORDS)


def _spoken(maker: Maker) -> Iterator[Tensor]:
    yield maker.floats(TARGETS, maker.number("num_mel_bins", default=80))
    yield maker.floats(TARGETS, maker.number("hidden_size", default=64))


def _speakers(maker: Maker) -> Iterator[Tensor]:
    yield maker.floats(maker.number("speaker_embedding_dim", default=64))


def _mels(maker: Maker) -> Iterator[Tensor]:
    yield maker.floats(_MELS, bins_of(maker)[0])


def _mel_padding(maker: Maker) -> Iterator[Tensor]:
    yield torch.zeros(ROWS, _MELS, dtype=torch.bool)


def _series(maker: Maker) -> Iterator[Tensor]:
    length = maker.number("context_length", default=32)
    lags = max(getattr(maker.config, "lags_sequence", None) or [0])
    channels = maker.number("num_input_channels", "input_size", default=1)
    yield maker.floats(length + lags, channels)
    yield maker.floats(length + lags)


def _time_features(maker: Maker) -> Iterator[Tensor]:
    length = maker.number("context_length", default=32)
    lags = max(getattr(maker.config, "lags_sequence", None) or [0])
    yield maker.floats(length + lags, max(1, maker.number("num_time_features", default=1)))


def _observed(maker: Maker) -> Iterator[Tensor]:
    for values in _series(maker):
        yield torch.ones_like(values)


def _ids(maker: Maker) -> Iterator[Tensor]:
    words, config = maker.words(WORDS), maker.config
    books = maker.number("num_codebooks", default=0)
    # Sequences that end, with the separators and the question that some heads look for.
    marked = words.clone()
    marked[:, -1] = maker.number("eos_token_id", default=2)
    separator = getattr(config, "sep_token_id", None)
    if separator is not None:
        marked[:, [PADDING + 1, PADDING + 3, -1]] = separator
    question = getattr(config, "question_token_id", None)
    if question is not None:
        marked[:, PADDING + 2] = question
    for ids in (words, marked) if maker.seeks else (words,):
        yield ids if not maker.chooses else ids[:, None].expand(-1, 2, -1).contiguous()
    if books:
        yield words[..., None].expand(-1, -1, books + 1).contiguous()


def _mask(maker: Maker) -> Iterator[Tensor]:
    mask = padded(WORDS)
    yield mask if not maker.chooses else mask[:, None].expand(-1, 2, -1).contiguous()


def _targets(maker: Maker) -> Iterator[Tensor]:
    words = maker.words(TARGETS)
    channels = getattr(getattr(maker.config, "decoder_config", None), "num_channels", None)
    yield words if channels is None else words[..., None].expand(-1, -1, channels).contiguous()
    if maker.seeks:  # as many as the inputs, whose end they look for among these
        yield maker.words(WORDS)


def _task(maker: Maker) -> Iterator[Tensor]:
    yield maker.words(maker.number("task_seq_len", default=WORDS))


def _question(maker: Maker) -> Iterator[Tensor]:
    yield maker.words(TARGETS)


def _hidden_patches(maker: Maker) -> Iterator[Tensor]:
    """Every other patch is masked."""
    patch = maker.number("patch_size", default=8)
    size = maker.number("image_size", default=32)
    count = (size // patch) ** 2
    times = maker.number("num_frames", default=1) // maker.number("tubelet_size", default=1)
    yield (torch.arange(count * max(1, times)) % 2 == 1).expand(ROWS, -1).contiguous()


def _prompts(maker: Maker) -> Iterator[Tensor]:
    for size in dict.fromkeys((maker.number("image_size", default=32), 32)):
        yield maker.floats(maker.number("num_channels", default=3), size, size)


def _one_a_row(maker: Maker) -> Iterator[Tensor]:
    yield torch.ones(ROWS, dtype=torch.long)


def _boxes(maker: Maker) -> Iterator[Tensor]:
    corners = torch.sort(torch.randint(0, 16, (1, WORDS, 2, 2), generator=maker.generator), 2)
    yield corners.values.flatten(2).expand(ROWS, -1, -1).contiguous()


def _points(maker: Maker) -> Iterator[Tensor]:
    yield maker.floats(1, 1, 2).abs() * 8


def _high_resolution(maker: Maker) -> Iterator[Tensor]:
    config = getattr(maker.config, "high_res_vision_config", maker.config)
    yield maker.floats(3, config.image_size, config.image_size)


def _queries(maker: Maker) -> Iterator[Tensor]:
    yield maker.floats(8, maker.config.hidden_size)


def _encoded(maker: Maker) -> Iterator[Tensor]:
    width = maker.number("encoder_hidden_size", "hidden_size", default=64)
    yield maker.floats(WORDS + 2, width)


def _regions(maker: Maker) -> Iterator[Tensor]:
    width = maker.number("visual_feat_dim", "visual_embedding_dim", default=64)
    yield maker.floats(WORDS - 2, width)


def _region_places(maker: Maker) -> Iterator[Tensor]:
    yield maker.floats(WORDS - 2, 4).abs()


# Decision transformers read so many steps.
_STEPS = 6


def _per_step(*names: str) -> Callable[[Maker], Iterator[Tensor]]:
    def made(maker: Maker) -> Iterator[Tensor]:
        yield maker.floats(_STEPS, maker.number(*names, default=1) if names else 1)

    return made


def _steps(maker: Maker) -> Iterator[Tensor]:
    yield torch.arange(_STEPS).expand(ROWS, -1).contiguous()


MAKERS: dict[str, Callable[[Maker], Iterator[Any]]] = {
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "spatial_shapes": _shapes,
    "pixel_attention_mask": _patch_mask,
    "input_features": _features,
    "input_values": _waves,
    "past_values": _series,
    "past_observed_mask": _observed,
    "past_time_features": _time_features,
    "input_ids": _ids,
    "attention_mask": _mask,
    "decoder_input_ids": _targets,
    "bbox": _boxes,
    "input_points": _points,
    "hidden_states": _hidden,
    "high_res_pixel_values": _high_resolution,
    "query_embeds": _queries,
    "encoder_hidden_states": _encoded,
    "visual_feats": _regions,
    "visual_pos": _region_places,
    "states": _per_step("state_dim"),
    "actions": _per_step("act_dim"),
    "rewards": _per_step(),
    "returns_to_go": _per_step(),
    "timesteps": _steps,
    "inputs": _vectors,
    "inputs_embeds": _vectors,
    "latents": _latents,
    "decoder_input_values": _spoken,
    "speaker_embeddings": _speakers,
    "audio_mel": _mels,
    "audio_mel_mask": _mel_padding,
    "task_inputs": _task,
    "qformer_input_ids": _question,
    "bool_masked_pos": _hidden_patches,
    "prompt_pixel_values": _prompts,
    "prompt_masks": _prompts,
    "merge_sizes": _one_a_row,
}
# Given where a model takes them, though it may do without.
WANTED = set(
    "pixel_values high_res_pixel_values image_grid_thw input_features input_ids decoder_input_ids "
    "bbox visual_feats visual_pos states actions rewards returns_to_go timesteps "
    "decoder_input_values speaker_embeddings".split()
)
