"""Tiny random models that read more than text, with processors, and files for them to read."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny import TEXT

HEADS, SIZE, PATCH, RATE = 4, 32, 8, 16000
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "initializer_range": 0.25,
}
_IMAGES = {"image_size": SIZE, "patch_size": PATCH}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.25,
}
WORDS = 300
ROWS, SIDE = 2, SIZE // PATCH
IMAGE, FIRST = WORDS, 2  # llava's token for an image, and where its patches begin


def tokenizer(size: int = WORDS, **special: str) -> Any:
    """Bytes and a few merges of them, with an end and a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", **special}
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(dict.fromkeys(named.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def vit(labels: int = 3) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    names = dict(enumerate(["cat", "dog", "fish"][:labels]))
    config = ViTConfig(
        **_ENCODER, **_IMAGES, id2label=names, label2id={v: k for k, v in names.items()}
    )
    return _made(ViTForImageClassification, config)


def dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**_ENCODER, **_IMAGES, mlp_ratio=2)
    return _made(Dinov2Model, config)


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **_BART,
        vocab_size=WORDS,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return _made(WhisperForConditionalGeneration, config)


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(**_BART, vocab_size=WORDS, max_position_embeddings=128)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    config.decoder_start_token_id, config.forced_eos_token_id = 2, None
    return _made(BartForConditionalGeneration, config)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=HEADS)
    config.initializer_factor, config.decoder_start_token_id = 1.5, 0
    return _made(T5ForConditionalGeneration, config)


def bert(kind: str = "BertForSequenceClassification") -> Any:
    import transformers

    names = {0: "no", 1: "yes"}
    config = transformers.BertConfig(
        **_ENCODER,
        vocab_size=WORDS,
        max_position_embeddings=128,
        id2label=names,
        label2id={v: k for k, v in names.items()},
    )
    return _made(getattr(transformers, kind), config)


def clip(kind: str = "CLIP") -> Any:
    import transformers

    shared = {k: v for k, v in _ENCODER.items() if k != "initializer_range"}
    text = {**shared, "vocab_size": WORDS, "max_position_embeddings": 32, "num_hidden_layers": 2}
    if kind == "CLIP":
        text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**shared, **_IMAGES}
    )
    config.projection_dim = 16
    return _made(getattr(transformers, f"{kind}Model"), config)


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_ENCODER, **_IMAGES),
        text_config=LlamaConfig(
            **{**_ENCODER, "num_hidden_layers": 2},
            num_key_value_heads=2,
            vocab_size=WORDS + 4,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=WORDS,
        image_seq_length=(SIZE // PATCH) ** 2,
    )
    return _made(Llava, config)


def wav2vec2() -> Any:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **_ENCODER,
        vocab_size=40,
        conv_dim=(16, 16),
        conv_kernel=(10, 8),
        conv_stride=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return _made(Wav2Vec2ForCTC, config)


MAKERS = {
    "vit": vit,
    "dinov2": dinov2,
    "whisper": whisper,
    "bart": bart,
    "t5": t5,
    "bert": bert,
    "clip": clip,
    "siglip": lambda: clip("Siglip"),
    "llava": llava,
    "wav2vec2": wav2vec2,
}


def _made(kind: Any, config: Any) -> Any:
    """A model whose attention matters, every parameter off its initial constant."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and (
                "q_proj" in name or "k_proj" in name or "query" in name or "key" in name
            ):
                parameter.mul_(2)
            elif bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def given(name: str) -> dict[str, torch.Tensor]:
    """What a processor would give, with labels where the model answers."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(5, 290, (ROWS, length), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(ROWS, *shape, generator=generator)

    if name == "llava":
        read = ids(FIRST + SIDE**2 + 9)
        read[:, FIRST : FIRST + SIDE**2] = IMAGE
        labels = read.clone()
        labels[:, : FIRST + SIDE**2 + 3] = -100
        return {
            "input_ids": read,
            "pixel_values": noise(3, SIZE, SIZE),
            "labels": labels,
        }
    return {
        "vit": lambda: {
            "pixel_values": noise(3, SIZE, SIZE),
            "labels": torch.tensor([2, 0]),
        },
        "dinov2": lambda: {"pixel_values": noise(3, SIZE, SIZE)},
        "clip": lambda: {"input_ids": ids(9), "pixel_values": noise(3, SIZE, SIZE)},
        "whisper": lambda: {"input_features": noise(8, 100), "labels": ids(7)},
        "bart": lambda: {"input_ids": ids(11), "labels": ids(6)},
        "t5": lambda: {"input_ids": ids(11), "labels": ids(6)},
        "bert": lambda: {"input_ids": ids(12), "labels": torch.tensor([1, 0])},
        "wav2vec2": lambda: {"input_values": noise(2000)},
    }[name]()


class Made:
    """Each tiny model, made once."""

    def __init__(self) -> None:
        self.made: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self.made:
            self.made[name] = MAKERS[name]()
        return self.made[name]


def image_processor() -> Any:
    from transformers import AutoImageProcessor  # noqa: F401
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})


def whisper_extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, hop_length=160, chunk_length=1
    )


def draw_images(
    folder: Path, count: int = 4, names: list[str] | None = None, size: int = 40
) -> Path:
    """Pictures of coloured noise, one in each of the folders `names` in turn where there are."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(count):
        place = folder / names[i % len(names)] if names else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def write_wave(
    path: Path, seconds: float = 0.6, rate: int = RATE, channels: int = 1, width: int = 2
) -> np.ndarray:
    """A tone that rises; the samples between -1 and 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    at = np.arange(int(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * (300 + 200 * at) * at)
    scaled = np.round(tone * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        scaled = scaled + 128
    frames = b"".join(
        int(value).to_bytes(width, "little", signed=width > 1) * channels for value in scaled
    )
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(frames)
    return tone


def llava_processor() -> Any:
    from transformers import LlavaProcessor

    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        image_processor(),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


class Processor:
    """A feature extractor and a tokenizer side by side, as a processor of transformers has them."""

    def __init__(self, feature_extractor: Any, tokenizer: Any) -> None:
        self.feature_extractor, self.tokenizer = feature_extractor, tokenizer
