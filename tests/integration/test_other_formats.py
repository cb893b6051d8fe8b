"""Whisper out of CTranslate2 and DINOv2 out of ONNX: every parameter, to the last bit.

The files are written here, by the formats' own rules, from tiny random models; the models of
`make models` are compared with CTranslate2's and ONNX Runtime's own results in
tests/e2e/test_models.py.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tempering.engines.loading.dinov2_model import convert_dinov2
from tempering.engines.loading.whisper_model import convert_whisper, read_ctranslate2
from tempering.errors import ModelError

SUPPRESSED = {"alignment_heads": [[1, 0]], "suppress_ids": [1, 2, 9], "suppress_ids_begin": [3, 6]}


def tiny_whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=16, d_model=8, encoder_layers=2, decoder_layers=3, num_mel_bins=5,
        encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=12,
        decoder_ffn_dim=20, max_source_positions=6, max_target_positions=7, pad_token_id=6,
        bos_token_id=7, eos_token_id=6, decoder_start_token_id=7,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).half()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def as_ctranslate2(model: Any) -> dict[str, np.ndarray]:
    """The variables of CTranslate2's WhisperSpec (converters/transformers.py, WhisperLoader)."""
    given = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    found: dict[str, Any] = {
        "decoder/embeddings/weight": given["decoder.embed_tokens.weight"],
        "encoder/num_heads": torch.tensor(2, dtype=torch.int16),
        "decoder/num_heads": torch.tensor(4, dtype=torch.int16),
        "decoder/scale_embeddings": torch.tensor(0, dtype=torch.int8),
    }

    def linear(name: str, *parts: str) -> None:
        weights = [given[f"{part}.weight"] for part in parts]
        nothing = torch.zeros(len(weights[0]), dtype=torch.float16)
        found[f"{name}/weight"] = torch.cat(weights)
        found[f"{name}/bias"] = torch.cat([given.get(f"{part}.bias", nothing) for part in parts])

    def norm(name: str, part: str) -> None:
        found[f"{name}/layer_norm/gamma"] = given[f"{part}.weight"]
        found[f"{name}/layer_norm/beta"] = given[f"{part}.bias"]

    for stack, count in (("encoder", 2), ("decoder", 3)):
        found[f"{stack}/position_encodings/encodings"] = given[f"{stack}.embed_positions.weight"]
        norm(stack, f"{stack}.layer_norm")
        for i in range(count):
            ours, theirs = f"{stack}.layers.{i}", f"{stack}/layer_{i}"
            norm(f"{theirs}/self_attention", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0",
                   *(f"{ours}.self_attn.{x}_proj" for x in "qkv"))  # fmt: skip
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            norm(f"{theirs}/ffn", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            if stack == "decoder":
                norm(f"{theirs}/attention", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1",
                       f"{ours}.encoder_attn.k_proj", f"{ours}.encoder_attn.v_proj")  # fmt: skip
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
    for part in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            found[f"encoder/{part}/{kind}"] = given[f"encoder.{part}.{kind}"]
    return {name: np.asarray(value) for name, value in found.items()}


def write_ctranslate2(folder: Path, variables: dict[str, np.ndarray], kind: str = "WhisperSpec"):
    """model.bin, and what lies beside it."""
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)

    def text(item: str) -> bytes:
        return struct.pack("<H", len(item) + 1) + item.encode() + b"\0"

    types = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    data = struct.pack("<I", 6) + text(kind) + struct.pack("<II", 3, len(variables))
    for name in sorted(variables):
        array = variables[name]
        data += (
            text(name)
            + struct.pack("<B", array.ndim)
            + struct.pack(f"<{array.ndim}I", *array.shape)
        )
        data += struct.pack("<BI", types[array.dtype.name], array.nbytes) + array.tobytes()
    data += struct.pack("<I", 1) + text("decoder/projection/weight")
    (folder / "model.bin").write_bytes(data + text("decoder/embeddings/weight"))
    (folder / "config.json").write_text(json.dumps(SUPPRESSED))
    words = {letter: i for i, letter in enumerate("abcdef")} | {"<|endoftext|>": 6}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.add_special_tokens(["<|startoftranscript|>", "<|en|>", "<|notimestamps|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "model.bin"


def test_whisper_comes_out_as_it_went_in(tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = tiny_whisper()
    source = write_ctranslate2(tmp_path / "ct2", as_ctranslate2(model))
    (target := tmp_path / "out").mkdir()
    convert_whisper(source, target)
    again, info = WhisperForConditionalGeneration.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    given = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, given.pop(name)), name
    assert not given
    ours, theirs = again.config, model.config
    for name in ("vocab_size", "d_model", "encoder_layers", "decoder_layers", "num_mel_bins",
                 "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim",
                 "decoder_ffn_dim", "max_source_positions", "max_target_positions",
                 "bos_token_id", "eos_token_id", "pad_token_id",
                 "decoder_start_token_id"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    generation = again.generation_config
    assert generation.suppress_tokens == [1, 2, 9]
    assert generation.begin_suppress_tokens == [3, 6]
    assert generation.no_timestamps_token_id == 10
    processor = WhisperProcessor.from_pretrained(target)
    assert processor.feature_extractor.feature_size == 5
    tokens = processor.tokenizer
    assert tokens.convert_ids_to_tokens([8, 10, 11, 15]) == [
        "<|en|>", "<|0.00|>", "<|0.02|>", "<|0.10|>"
    ]  # fmt: skip


def test_keys_with_a_bias_are_refused(tmp_path: Path) -> None:
    variables = as_ctranslate2(tiny_whisper())
    name = "decoder/layer_1/attention/linear_1"
    variables[f"{name}/bias"] = variables[f"{name}/bias"].copy()
    variables[f"{name}/bias"][3] = 1e-3
    source = write_ctranslate2(tmp_path / "ct2", variables)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=f"{name} holds a bias of keys"):
        convert_whisper(source, tmp_path / "out")


def test_another_models_file_is_refused(tmp_path: Path) -> None:
    source = write_ctranslate2(tmp_path / "ct2", {}, "TransformerSpec")
    with pytest.raises(ModelError, match="holds 'TransformerSpec' of version 6, not WhisperSpec"):
        read_ctranslate2(source)


# ONNX, by protobuf's rules: a tag is 8 times the field's number, plus 0 for varints, 2 for bytes.


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def tensor(name: str, value: Tensor, packed: bool) -> bytes:
    if packed:
        dims = field(1, b"".join(map(varint, value.shape)))
    else:
        dims = b"".join(field(1, size) for size in value.shape)
    raw = value.contiguous().numpy().tobytes()
    return field(5, dims + field(2, 1) + field(8, name.encode()) + field(9, raw))


def product(module: str, left: str, right: str) -> bytes:
    output = f"/backbone/{module}/MatMul_output_0"
    names = field(1, left.encode()) + field(1, right.encode()) + field(2, output.encode())
    return field(1, names + field(4, b"MatMul"))


def tiny_dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14,
        mlp_ratio=4, use_mask_token=False,
    )  # fmt: skip
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


# Names of the linear layers of one block on the hub, which the export keeps.
LINEAR = {
    "q_proj": "attention.attention.query",
    "k_proj": "attention.attention.key",
    "v_proj": "attention.attention.value",
    "o_proj": "attention.output.dense",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def write_onnx(path: Path, model: Any, packed: bool = False, leave: str = "") -> Path:
    nodes, tensors = b"", b""
    for i, (name, value) in enumerate(model.state_dict().items()):
        value = value.detach()
        parts = name.split(".")
        linear = LINEAR.get(parts[-2]) if name.startswith("encoder.layer") else None
        if name == "embeddings.position_embeddings":
            tensors += tensor("onnx::Concat_7", value[:, :1], packed)
            if leave != name:
                tensors += tensor("onnx::Reshape_9", value[:, 1:], packed)
        elif linear and parts[-1] == "weight":
            layer = f"encoder/layer.{parts[2]}/{linear.replace('.', '/')}"
            nodes += product(layer, "/something", f"onnx::MatMul_{i}")
            tensors += tensor(f"onnx::MatMul_{i}", value.T, packed)
        else:
            if linear:
                name = f"encoder.layer.{parts[2]}.{linear}.bias"
            tensors += tensor(f"backbone.{name}", value, packed)
    # Beside the backbone: a head, numbers of another type, a product of two activations.
    tensors += tensor("decoder.final_conv.weight", torch.ones(1, 64, 1, 1), packed)
    tensors += field(5, field(1, 2) + field(2, 7) + field(8, b"sizes") + field(9, bytes(16)))
    nodes += product("encoder/layer.0/attention/attention", "/query", "/keys")
    path.write_bytes(field(1, 7) + field(2, b"pytorch") + field(7, nodes + tensors))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_dinov2_comes_out_as_it_went_in(tmp_path: Path, packed: bool) -> None:
    from transformers import Dinov2Model

    model = tiny_dinov2()
    source = write_onnx(tmp_path / "m.onnx", model, packed)
    (target := tmp_path / "out").mkdir()
    convert_dinov2(source, target)
    again, info = Dinov2Model.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    given = dict(model.named_parameters())
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, given.pop(name)), name
    assert not given
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size"):
        assert getattr(again.config, name) == getattr(model.config, name)


def test_a_file_without_positions_is_refused(tmp_path: Path) -> None:
    leave = "embeddings.position_embeddings"
    source = write_onnx(tmp_path / "m.onnx", tiny_dinov2(), leave=leave)
    with pytest.raises(ModelError, match=r"m\.onnx has no position embeddings"):
        convert_dinov2(source, tmp_path)
