"""GGUF files: beta in the scales of the blocks, rows permuted as llama.cpp wants them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from tempering.attention import Profile, tempered
from tempering.attention.baking.folds import Fold
from tempering.engines.checkpoints import gguf as engine
from tempering.engines.checkpoints.check import check_model
from tempering.engines.checkpoints.gguf import bake_gguf, undo_gguf
from tempering.engines.checkpoints.gguf_blocks import _SCALES, fold_tensor
from tempering.engines.loading.gguf_files import load_gguf
from tempering.engines.loading.hub import load_model
from tempering.errors import (
    BakeError,
    CheckError,
    ModelError,
    OutputError,
    ProfileError,
    RefusedError,
)

LAYERS, HEADS, KV, WIDTH = 2, 4, 2, 256
DIM = WIDTH // HEADS
T = torch.tensor([[0.6, 1.7, 1.0, 2.4], [1.3, 0.4, 3.0, 0.9]], dtype=torch.float64)


def blocks(kind: GGMLQuantizationType, rows: int, size: float = 0.01) -> np.ndarray:
    """Random codes under float16 scales of about `size`; the rest of a block is random bytes."""
    generator = np.random.default_rng(0)
    per_block, width = GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (rows, WIDTH // per_block, width), dtype=np.uint8)
    for offset in _SCALES.get(kind.name, ()):
        place = offset % width
        scales = (size * generator.uniform(0.5, 2, data.shape[:2])).astype(np.float16)
        data[:, :, place : place + 2] = scales[..., None].view(np.uint8)
    if kind.name == "IQ1_M":  # 4 bits of the scale in each of the last 4 words, the lowest first
        bits = (size * generator.uniform(0.5, 2, data.shape[:2])).astype(np.float16).view(np.uint16)
        for word in range(4):
            nibble = (bits >> (4 * word) & 15).astype(np.uint8) << 4
            place = width - 8 + 2 * word + 1
            data[:, :, place] = data[:, :, place] & 15 | nibble
    return data.reshape(rows, -1)


def codes(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of blocks [block, byte] with their float16 scales set to 0."""
    width = GGML_QUANT_SIZES[kind][1]
    found = data.view(np.uint8).reshape(-1, width).copy()
    for offset in _SCALES.get(kind.name, ()):
        found[:, offset % width : offset % width + 2] = 0
    if kind.name == "IQ1_M":
        found[:, -7::2] &= 15
    return found


def folds(axis: int = 0) -> list:
    runs = ((0, 4, 0), (8, 12, 1))
    return [(Fold("q", axis, runs), torch.tensor([0.3, 1.9], dtype=torch.float64))]


@pytest.mark.parametrize("name", [*_SCALES, "IQ1_M"])
def test_every_block_type_keeps_its_codes(name):
    kind = GGMLQuantizationType[name]
    data = blocks(kind, 16)
    own = dequantize(data, kind).astype(np.float64)
    folded, same, _ = fold_tensor(data, kind, folds(), 2.0**-8)
    assert same == kind
    got = dequantize(folded, kind).astype(np.float64)
    for rows, factor in (((0, 4), 0.3), ((8, 12), 1.9)):
        part = slice(*rows)
        # every scale of a row is off by half an ulp of float16 at most, its sum in norm as well
        error = np.linalg.norm(got[part] - factor * own[part], axis=1)
        size = np.linalg.norm(own[part], axis=1) * factor
        assert (error <= 2.0**-10 * size).all()
    for rows in ((4, 8), (12, 16)):
        assert np.array_equal(folded[slice(*rows)], data[slice(*rows)])
    assert np.array_equal(codes(folded, kind), codes(data, kind))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types_are_rounded_once(name):
    kind = GGMLQuantizationType[name]
    weights = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
    data = quantize(weights, kind)
    folded, same, _ = fold_tensor(data, kind, folds(), 2.0**-8)
    assert same == kind
    exact = dequantize(data, kind).copy()
    exact[0:4] *= np.float32(0.3)
    exact[8:12] *= np.float32(1.9)
    assert np.array_equal(folded, quantize(exact, kind))


def test_scales_that_float16_can_not_hold_are_widened():
    kind = GGMLQuantizationType.Q6_K
    tiny = blocks(kind, 16, size=2e-6)
    folded, wider, _ = fold_tensor(tiny, kind, folds(), 2.0**-8)
    assert wider == GGMLQuantizationType.F16
    exact = dequantize(tiny, kind)
    assert np.allclose(dequantize(folded, wider)[0:4], exact[0:4] * 0.3, rtol=1e-2)
    huge = [(Fold("q", 0, ((0, 16, 0),)), torch.tensor([1e3], dtype=torch.float64))]
    folded, wider, _ = fold_tensor(blocks(kind, 16, size=1e3), kind, huge, 2.0**-8)
    assert wider == GGMLQuantizationType.F32
    assert np.isfinite(dequantize(folded, wider)).all()


def test_types_without_such_scales_are_widened():
    kind = GGMLQuantizationType.MXFP4
    data = quantize(np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32), kind)
    folded, wider, _ = fold_tensor(data, kind, folds(), 2.0**-8)
    assert wider == GGMLQuantizationType.F16
    assert np.allclose(
        dequantize(folded, wider)[8:12], dequantize(data, kind)[8:12] * 1.9, rtol=1e-3
    )


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows for rope: pairs side by side, within each head."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def write_llama(
    path: Path, kinds: list[str], more: dict | None = None, values: str = "F32"
) -> Path:
    """A llama whose attn_q tensors have the given types; everything else is float32.

    values: the type of attn_v.
    """
    generator = np.random.default_rng(0)
    characters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    vocabulary = ["<pad>", "<s>", "</s>", *characters, *(chr(256 + i) for i in range(68)), "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(len(kinds))
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_dimension_count(DIM)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in (more or {}).items():
        writer.add_uint16(name, value)

    def add(name: str, *shape: int, kind: str = "F32", std: float = 0.06) -> None:
        values = generator.normal(size=shape).astype(np.float32) * std
        if len(shape) == 1:
            values = 1 + values
        heads = {"attn_q": HEADS, "attn_k": KV}.get(name.split(".")[-2])
        values = permuted(values, heads) if heads else values
        type_ = GGMLQuantizationType[kind]
        try:
            data = quantize(values, type_)
        except NotImplementedError:  # gguf reads more types than it writes
            data = blocks(type_, shape[0])
            data = blocks(type_, shape[0], 0.01 * std / float(dequantize(data, type_).std()))
        writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else type_)

    add("token_embd.weight", len(vocabulary), WIDTH, std=1.0)
    add("output.weight", len(vocabulary), WIDTH)
    add("output_norm.weight", WIDTH)
    for layer, kind in enumerate(kinds):
        at = f"blk.{layer}."
        add(at + "attn_norm.weight", WIDTH)
        add(at + "ffn_norm.weight", WIDTH)
        add(at + "attn_q.weight", WIDTH, WIDTH, kind=kind, std=0.2)
        add(at + "attn_k.weight", KV * DIM, WIDTH)
        add(at + "attn_v.weight", KV * DIM, WIDTH, kind=values)
        add(at + "attn_output.weight", WIDTH, WIDTH)
        add(at + "ffn_gate.weight", 96, WIDTH)
        add(at + "ffn_up.weight", 96, WIDTH)
        add(at + "ffn_down.weight", WIDTH, 96)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "cold.gguf", ["Q4_1", "Q8_0"])


def tensors(path: Path) -> dict:
    return {item.name: item for item in GGUFReader(path).tensors}


def test_a_gguf_file_end_to_end(source, tmp_path):
    out = tmp_path / "warm.gguf"
    result = bake_gguf(source, Profile.from_matrix(T), out)
    assert result.kept == {"Q4_1": 1, "Q8_0": 1}
    assert result.widened == {}
    assert result.deviation <= 1e-4 < result.stored < 0.1
    model, _ = load_gguf(source)
    warm, _ = load_gguf(out)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with tempered(model, Profile.from_matrix(T)):
            wanted = model(ids).logits
        got = warm(ids).logits
    assert (got - wanted).abs().max() <= result.stored * 2 * wanted.std()
    assert (plain - wanted).abs().max() > 20 * (got - wanted).abs().max()
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type
        assert np.array_equal(after[name].data, tensor.data) == ("attn_q" not in name)
    # heads stay together whatever the order of rows within them
    own, new = (
        dequantize(x["blk.1.attn_q.weight"].data, x["blk.1.attn_q.weight"].tensor_type)
        for x in (before, after)
    )
    for head in range(HEADS):
        part = slice(head * DIM, (head + 1) * DIM)
        ratio = np.linalg.norm(new[part]) / np.linalg.norm(own[part])
        assert ratio == pytest.approx(1 / float(T[1, head]), rel=1e-3)


def test_a_gguf_file_is_a_model_by_name(source, tmp_path):
    ids = torch.arange(3, 43)[None]
    own, _ = load_gguf(source)
    model, tokenizer = load_model(str(source), attn_implementation="eager")
    assert (model.config._attn_implementation, tokenizer.padding_side) == ("eager", "left")
    with torch.no_grad():
        assert (model(ids).logits - own(ids).logits).abs().max() < 1e-4
    assert load_model(source, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "plain")  # no mark of a quantised model is left
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(source.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        load_model(broken)
    with pytest.raises(ModelError, match="no model"):
        load_model(tmp_path / "absent.gguf")


def test_metadata_comes_along_with_a_mark(source, tmp_path):
    out = tmp_path / "warm.gguf"
    bake_gguf(source, Profile.from_matrix(T), out)
    before, after = GGUFReader(source), GGUFReader(out)
    kept = {name for name in before.fields if not name.startswith("GGUF.")}
    assert {n for n in after.fields if not n.startswith("GGUF.")} == kept | {"tempering.bake"}
    for name in kept:
        assert before.fields[name].contents() == after.fields[name].contents(), name
    mark = json.loads(after.fields["tempering.bake"].contents())
    assert set(mark["tensors"]) == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}
    with pytest.raises(BakeError, match=r"warm\.gguf was baked .* --undo --out FILE\.gguf"):
        bake_gguf(out, Profile.from_matrix(T), tmp_path / "twice.gguf")
    assert "baked with a temperature profile already" in check_model(out).reason
    with pytest.raises(RefusedError, match="baked with a temperature profile already"):
        tempered(load_gguf(out)[0], Profile.from_matrix(T))
    with pytest.raises(OutputError, match="exists"):
        bake_gguf(source, Profile.from_matrix(T), out)


def test_undo(source, tmp_path):
    bake_gguf(source, Profile.from_matrix(T), tmp_path / "warm.gguf")
    assert undo_gguf(tmp_path / "warm.gguf", tmp_path / "plain.gguf") == LAYERS
    before, after = tensors(source), tensors(tmp_path / "plain.gguf")
    for name, tensor in before.items():
        own, got = (dequantize(x.data, x.tensor_type) for x in (tensor, after[name]))
        assert np.allclose(own, got, rtol=0, atol=3e-3 * np.abs(own).max())
        assert np.array_equal(own, got) or "attn_q" in name
    with pytest.raises(BakeError, match="carries no mark"):
        undo_gguf(tmp_path / "plain.gguf", tmp_path / "more.gguf")
    damaged = tmp_path / "damaged.gguf"
    baked = (tmp_path / "warm.gguf").read_bytes()
    assert baked.count(b'"tensors"') == 1
    damaged.write_bytes(baked.replace(b'"tensors"', b"'tensors'"))
    for read in (load_gguf, lambda path: undo_gguf(path, tmp_path / "more.gguf")):
        with pytest.raises(BakeError, match="the mark of .* is damaged: it is not JSON"):
            read(damaged)
    assert not (tmp_path / "more.gguf").exists()


def test_a_wrong_result_gets_no_name(source, tmp_path, monkeypatch):
    right = engine.write_anew

    def wrong(reader, target, in_file, mark):
        return right(reader, target, dict(list(in_file.items())[1:]), mark)

    monkeypatch.setattr(engine, "write_anew", wrong)
    with pytest.raises(CheckError, match=r"layers.0.self_attn.q_proj.weight came back"):
        bake_gguf(source, Profile.from_matrix(T), tmp_path / "warm.gguf")
    assert not any(tmp_path.iterdir())


def test_bad_input(source, tmp_path):
    out, profile = tmp_path / "warm.gguf", Profile.from_matrix(T)
    with pytest.raises(ModelError, match="no GGUF file"):
        bake_gguf(tmp_path / "nowhere.gguf", profile, out)
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ModelError, match=r"can't read .*text\.gguf as a GGUF file"):
        bake_gguf(tmp_path / "text.gguf", profile, out)
    with pytest.raises(ProfileError, match="3 layers x 4 heads"):
        bake_gguf(source, Profile.from_matrix(torch.ones(3, 4)), out)
    part = write_llama(tmp_path / "part.gguf", ["F32", "F32"], {"split.count": 3})
    with pytest.raises(BakeError, match="one part of a split model"):
        bake_gguf(part, profile, out)
    assert not out.exists()
    assert check_model(source).verdict == "per head"
