"""Whisper as CTranslate2 stores it, turned into a directory that transformers loads.

A `model.bin` of CTranslate2 (binary version 6) is little-endian: the version (uint32), the name of
its specification (a string: uint16 length, bytes, ended by NUL), its revision (uint32), the number
of variables (uint32), and for each its name, rank (uint8), dimensions (uint32 each), type (uint8),
size in bytes (uint32) and values; aliases follow. Only a file whose SHA-256 is known gets here.

Its projections are stacked: queries, keys and values of self-attention, keys and values of
cross-attention. Whisper's keys have no bias, where the stack holds zeros. Values stay in float16,
as stored: the result is the same to the last bit.

Source: https://github.com/OpenNMT/CTranslate2, python/ctranslate2/specs and converters.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tempering.engines.loading.quiet import quiet
from tempering.errors import ModelError

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_NORM = {"gamma": "weight", "beta": "bias"}


def convert_whisper(source: Path, target: Path) -> None:
    """Write model and processor into the empty directory `target`.

    source: model.bin; config.json and tokenizer.json lie beside it. Raises ModelError for a file
    of another kind, OSError when the result can't be written.
    """
    from safetensors.torch import save_file
    from transformers import WhisperFeatureExtractor

    variables = read_ctranslate2(source)
    told = json.loads((source.parent / "config.json").read_text(encoding="utf-8"))
    config, generation = _configs(variables, told)
    config.save_pretrained(target)
    generation.save_pretrained(target)
    weights = {name: torch.from_numpy(array) for name, array in whisper_weights(variables)}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
    with quiet():
        _tokenizer(source.parent / "tokenizer.json", config.vocab_size).save_pretrained(target)


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a model.bin by name; aliases are left out."""
    data = path.read_bytes()
    place = 0

    def take(form: str) -> Any:
        nonlocal place
        values = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return values[0] if len(values) == 1 else values

    def text() -> str:
        return take(f"{take('H')}s").rstrip(b"\0").decode()

    version, kind = take("I"), text()
    if (version, kind) != (6, "WhisperSpec"):
        raise ModelError(f"{path} holds {kind!r} of version {version}, not WhisperSpec of 6")
    take("I")  # the revision
    variables = {}
    for _ in range(take("I")):
        name, rank = text(), take("B")
        shape = [take("I") for _ in range(rank)]
        dtype, size = np.dtype(_TYPES[take("B")]).newbyteorder("<"), take("I")
        variables[name] = np.frombuffer(data, dtype, size // dtype.itemsize, place).reshape(shape)
        place += size
    return variables


def whisper_weights(variables: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Transformers' name and values of every parameter."""
    found: list[tuple[str, np.ndarray]] = []

    def add(name: str, array: np.ndarray) -> None:
        found.append((f"model.{name}", np.ascontiguousarray(array.astype(array.dtype.name))))

    def norm(theirs: str, ours: str) -> None:
        for kind, name in _NORM.items():
            add(f"{ours}.{name}", variables[f"{theirs}/layer_norm/{kind}"])

    def linear(theirs: str, *ours: str) -> None:
        """One linear layer, or several that are stacked."""
        weight, bias = variables[f"{theirs}/weight"], variables[f"{theirs}/bias"]
        for i, name in enumerate(ours):
            rows = slice(i * len(weight) // len(ours), (i + 1) * len(weight) // len(ours))
            add(f"{name}.weight", weight[rows])
            if not name.endswith("k_proj"):
                add(f"{name}.bias", bias[rows])
            elif bias[rows].any():
                raise ModelError(f"{theirs} holds a bias of keys, which Whisper has no place for")

    for stack in ("encoder", "decoder"):
        add(f"{stack}.embed_positions.weight", variables[f"{stack}/position_encodings/encodings"])
        norm(stack, f"{stack}.layer_norm")
        for i in range(_layers(variables, stack)):
            theirs, ours = f"{stack}/layer_{i}", f"{stack}.layers.{i}"
            own = f"{ours}.self_attn"
            norm(f"{theirs}/self_attention", f"{own}_layer_norm")
            stacked = (f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")
            linear(f"{theirs}/self_attention/linear_0", *stacked)
            linear(f"{theirs}/self_attention/linear_1", f"{own}.out_proj")
            if stack == "decoder":
                cross = f"{ours}.encoder_attn"
                norm(f"{theirs}/attention", f"{cross}_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{theirs}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{theirs}/attention/linear_2", f"{cross}.out_proj")
            norm(f"{theirs}/ffn", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            add(f"encoder.{name}.{kind}", variables[f"encoder/{name}/{kind}"])
    add("decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])
    return found


def _layers(variables: dict[str, np.ndarray], stack: str) -> int:
    found = (re.match(rf"{stack}/layer_(\d+)/", name) for name in variables)
    return len({match[1] for match in found if match})


def _configs(variables: dict[str, np.ndarray], told: dict[str, Any]) -> tuple[Any, Any]:
    """The configurations of an English model: shapes from the weights, the rest as published.

    Of the ids, <|endoftext|> is the last of GPT-2's vocabulary, and <|startoftranscript|> follows;
    <|notimestamps|> is the last that isn't a timestamp (openai/whisper, tokenizer.py).
    """
    from transformers import GenerationConfig, WhisperConfig

    vocabulary, width = variables["decoder/embeddings/weight"].shape
    end, start = told["suppress_ids_begin"][1], told["suppress_ids_begin"][1] + 1
    ids = {
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
    }
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        encoder_layers=_layers(variables, "encoder"),
        decoder_layers=_layers(variables, "decoder"),
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=len(variables["encoder/layer_0/ffn/linear_0/weight"]),
        decoder_ffn_dim=len(variables["decoder/layer_0/ffn/linear_0/weight"]),
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        architectures=["WhisperForConditionalGeneration"],
        dtype="float16",
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **ids,
    )
    generation = GenerationConfig(
        alignment_heads=told["alignment_heads"],
        begin_suppress_tokens=told["suppress_ids_begin"],
        suppress_tokens=told["suppress_ids"],
        is_multilingual=False,
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        no_timestamps_token_id=max(told["suppress_ids"]) + 1,
        return_timestamps=False,
        **ids,
    )
    return config, generation


def _tokenizer(path: Path, vocabulary: int) -> Any:
    """The tokenizer, with the timestamps that tokenizer.json leaves out: one each 20 ms."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import WhisperTokenizer

    base = Tokenizer.from_file(str(path))
    first = base.get_vocab_size()
    base.add_tokens(
        [
            AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False, special=False)
            for i in range(vocabulary - first)
        ]
    )
    return WhisperTokenizer(tokenizer_object=base)
