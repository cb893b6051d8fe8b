"""Quantised checkpoints baked by their scales, in layouts that are packed here number by number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tempering.attention import Profile, tempered
from tempering.engines.checkpoints.bake import bake_checkpoint, undo_checkpoint
from tempering.engines.checkpoints.check import check_model
from tempering.engines.checkpoints.files import Checkpoint
from tempering.engines.checkpoints.quantised import reader_of
from tempering.engines.checkpoints.scales import bake_scales
from tempering.errors import BakeError, OutputError, ProfileError
from tests.tiny import save_tiny_llama

LAYERS, HEADS, WIDTH, GROUP = 2, 4, 128, 32
DIM = WIDTH // HEADS
T = torch.tensor([[0.6, 1.7, 1.0, 2.4], [1.3, 0.4, 3.0, 0.9]], dtype=torch.float64)
PROFILE = Profile.from_matrix(T)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("plain"), LAYERS, width=WIDTH, spread=0.1)


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of numbers as rows of int32 words, lowest bits first, by Python's own integers."""
    rows = []
    for row in numbers.tolist():
        whole = sum(value << (bits * place) for place, value in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([whole >> (32 * i) & 0xFFFFFFFF for i in range(words)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def grouped(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], zero points and float16 scales [out, groups]."""
    split = weight.unflatten(1, (-1, GROUP))
    low, high = split.amin(-1), split.amax(-1)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    codes = (split / scale[..., None].float() + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).long(), zero.long(), scale


def wide(groups: torch.Tensor) -> torch.Tensor:
    return groups.float().repeat_interleave(GROUP, 1)


def gptq(weight, bits, less=1):
    codes, zero, scale = grouped(weight, bits)
    order = torch.arange(WIDTH) // GROUP if weight.shape[1] == WIDTH else None
    tensors = {
        "qweight": packed(codes, bits).T.contiguous(),
        "qzeros": packed((zero.T - less) % 2**bits, bits),
        "scales": scale.T.contiguous(),
    }
    if order is not None:
        tensors["g_idx"] = order.int()
    return tensors, lambda scales: (codes - wide(zero)) * wide(scales.T)


def awq(weight):
    codes, zero, scale = grouped(weight, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    shuffled = [item.T.unflatten(1, (-1, 8))[:, :, order].flatten(1) for item in (codes, zero)]
    tensors = {
        "qweight": packed(shuffled[0], 4),
        "qzeros": packed(shuffled[1], 4),
        "scales": scale.T.contiguous(),
    }
    return tensors, lambda scales: (codes - wide(zero)) * wide(scales.T)


def fp8_blocks(weight):
    blocks = weight.unflatten(1, (-1, 32)).unflatten(0, (-1, 16))
    scale = blocks.abs().amax((1, 3)) / 448
    spread = lambda x: x.repeat_interleave(16, 0).repeat_interleave(32, 1)  # noqa: E731
    codes = (weight / spread(scale)).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale_inv": scale}
    return tensors, lambda scales: codes.float() * spread(scales)


def fp8_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": scale.bfloat16(), "input_scale": torch.ones(1)}
    return tensors, lambda scales: codes.float() * scales.float()


def ct_packed(weight):
    codes, zero, scale = grouped(weight, 4)
    tensors = {
        "weight_packed": packed(codes, 4),
        "weight_shape": torch.tensor(weight.shape),
        "weight_zero_point": packed(zero.T, 4).T.contiguous(),
        "weight_scale": scale,
    }
    return tensors, lambda scales: (codes - wide(zero)) * wide(scales)


def int8(weight):
    scale = weight.abs().amax(1)
    codes = (weight / scale[:, None] * 127).round().to(torch.int8)
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, lambda scales: codes.float() * scales[:, None] / 127


def four_bits(weight, block=64):
    table = torch.linspace(-1, 1, 16) ** 3
    flat = weight.reshape(-1, block)
    absmax = flat.abs().amax(1)
    codes = (flat / absmax[:, None])[..., None].sub(table).abs().argmin(-1).flatten()
    state = {"blocksize": block, "quant_type": "nf4", "dtype": "float16", "shape": [*weight.shape]}
    tensors = {
        "weight": (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor([*json.dumps(state).encode()]).byte(),
    }
    return tensors, lambda s: (table[codes].reshape(-1, block) * s[:, None]).reshape(weight.shape)


def torchao(kind: str):
    def pack(weight):
        if kind == "Float8Tensor":
            own, _ = fp8_rows(weight)
            codes, scale, zero = own["weight"], own["weight_scale"], torch.zeros(1)
            tensors = {"_weight_qdata": codes, "_weight_scale": scale}
        else:
            numbers, shift, scale = grouped(weight, 4)
            codes, zero = (numbers - 8).to(torch.int8), (shift - 8).to(torch.int8)
            tensors = {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zero}
            zero = wide(zero)
        of = lambda s: s.float() if kind == "Float8Tensor" else wide(s)  # noqa: E731
        return tensors, lambda scales: (codes.float() - zero) * of(scales)

    pack.kind = kind
    return pack


def hqq(bits: int, axis: int = 1):
    def pack(weight):
        codes, zero, scale = grouped(weight, bits)
        rows = codes.reshape(-1, GROUP)
        many = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
        size = -(-len(rows) // many)
        filled = torch.cat((rows, torch.zeros(many * size - len(rows), GROUP, dtype=rows.dtype)))
        words = sum(part << bits * (many - 1 - i) for i, part in enumerate(filled.split(size)))
        tensors = {
            "W_q": words.to(torch.int32 if bits == 3 else torch.uint8),
            "scale": scale.reshape(-1, 1),
            "zero": zero.half().reshape(-1, 1),
            "shape": torch.tensor(weight.shape),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "view_as_float": torch.tensor(0, dtype=torch.uint8),
        }
        return tensors, lambda scales: ((rows - zero.reshape(-1, 1)) * scales.float()).reshape(
            weight.shape
        )

    return pack


def ct(form: str, **weights) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


GPTQ = {"quant_method": "gptq", "group_size": GROUP, "desc_act": False}
# name: (how a weight is packed, quantization_config, the tensor that scales it)
LAYOUTS = {
    **{
        f"gptq {bits} bits": (lambda w, b=bits: gptq(w, b), {**GPTQ, "bits": bits}, "scales")
        for bits in (2, 3, 4, 8)
    },
    "gptq v2": (
        lambda w: gptq(w, 4, less=0),
        {**GPTQ, "bits": 4, "checkpoint_format": "gptq_v2"},
        "scales",
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, "scales"),
    "fp8": (
        fp8_blocks,
        {"quant_method": "fp8", "weight_block_size": [16, 32]},
        "weight_scale_inv",
    ),
    "fbgemm_fp8": (fp8_rows, {"quant_method": "fbgemm_fp8"}, "weight_scale"),
    "ct float": (
        fp8_rows,
        ct("float-quantized", num_bits=8, type="float", strategy="channel"),
        "weight_scale",
    ),
    "ct packed": (
        ct_packed,
        ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP),
        "weight_scale",
    ),
    **{
        f"torchao {kind}": (torchao(kind), {"quant_method": "torchao"}, "_weight_scale")
        for kind in ("Float8Tensor", "IntxUnpackedToInt8Tensor")
    },
    **{f"hqq {bits} bits": (hqq(bits), {"quant_method": "hqq"}, "scale") for bits in (2, 3, 4, 8)},
    "bnb int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "SCB"),
    "bnb nf4": (
        four_bits,
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "weight.absmax",
    ),
}


def quantise(plain: Path, target: Path, pack, settings: dict) -> dict:
    """A checkpoint with every linear layer but the head packed; how to dequantise each."""
    shutil.copytree(plain, target)
    tensors, decode = {}, {}
    for name, value in load_file(plain / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = value
            continue
        module = name.removesuffix(".weight")
        own, decode[module] = pack(value)
        tensors.update({f"{module}.{part}": item.contiguous() for part, item in own.items()})
    kind = getattr(pack, "kind", None)
    about = {f"{module}.weight": json.dumps({"_type": kind}) for module in decode if kind}
    save_file(tensors, target / "model.safetensors", {"format": "pt", **about})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return decode


def model_of(plain: Path, folder: Path, decode: dict, scales: str):
    """The model in a quantised checkpoint, dequantised by the test."""
    from transformers import LlamaForCausalLM

    stored = load_file(folder / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(plain).eval()
    with torch.no_grad():
        for module, values in decode.items():
            weights = values(stored[f"{module}.{scales}"])
            model.get_submodule(module).weight.copy_(weights)
    return model


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_as_it_was_packed(plain, tmp_path, name):
    pack, settings, scales = LAYOUTS[name]
    decode = quantise(plain, tmp_path / "cold", pack, settings)
    files = Checkpoint(tmp_path / "cold")
    suffix, read = reader_of(settings, name)
    assert {key.removesuffix(suffix) for key in files.tensors if key.endswith(suffix)} == {*decode}
    for module, values in decode.items():
        found = read(files, module, settings)
        assert found.scales == f"{module}.{scales}"
        wanted = values(files.raw(found.scales))
        assert torch.allclose(found.values, wanted, rtol=1e-6, atol=0)


# One of each kind of scales: by group, block, row; along either axis, or flat.
@pytest.mark.parametrize(
    "name",
    ["gptq 3 bits", "awq", "fp8", "ct float", "ct packed", "hqq 4 bits", "bnb int8", "bnb nf4"],
)
def test_only_scales_of_q_change_and_the_logits_are_the_tempered_ones(plain, tmp_path, name):
    pack, settings, scales = LAYOUTS[name]
    cold, warm = tmp_path / "cold", tmp_path / "warm"
    decode = quantise(plain, cold, pack, settings)
    result = bake_scales(cold, PROFILE, warm)
    file = "model.safetensors"
    assert (warm / file).stat().st_size == (cold / file).stat().st_size
    before, after = load_file(cold / file), load_file(warm / file)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    wanted = {f"model.layers.{i}.self_attn.q_proj.{scales}" for i in range(LAYERS)}
    assert changed == wanted
    assert result.tensors == LAYERS
    assert "--undo --out DIR" in (warm / "README.md").read_text()
    model, again = (model_of(plain, folder, decode, scales) for folder in (cold, warm))
    for layer in range(LAYERS):
        q = f"model.layers.{layer}.self_attn.q_proj.weight"
        own, new = (x.get_parameter(q).detach().double() for x in (model, again))
        rows = (1 / T[layer]).repeat_interleave(DIM)[:, None] * own
        lost = ((new - rows).unflatten(0, (HEADS, -1)).norm(dim=(1, 2))) / rows.unflatten(
            0, (HEADS, -1)
        ).norm(dim=(1, 2))
        assert lost.max() <= result.rounding * 1.001 + 1e-7
        assert result.rounding <= 2.0**-9
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        untempered = model(ids).logits
        with tempered(model, PROFILE):
            target = model(ids).logits
        got = again(ids).logits
    assert result.deviation <= 1e-4
    assert (got - target).abs().max() <= max(2 * result.stored, 1e-4) * target.std()
    assert (untempered - target).abs().max() > 20 * (got - target).abs().max()


def test_kinds_of_torchao_that_pack_otherwise(plain, tmp_path):
    pack = torchao("Int4Tensor")
    quantise(plain, tmp_path / "cold", pack, {"quant_method": "torchao"})
    with pytest.raises(BakeError, match=r"_proj.weight is torchao's Int4Tensor; those whose"):
        bake_scales(tmp_path / "cold", PROFILE, tmp_path / "warm")


def test_groups_of_hqq_across_rows(plain, tmp_path):
    quantise(plain, tmp_path / "cold", hqq(4, axis=0), {"quant_method": "hqq"})
    with pytest.raises(BakeError, match="groups along axis 0 of 4 bits; hqq's scales belong to"):
        bake_scales(tmp_path / "cold", PROFILE, tmp_path / "warm")


def test_transformers_reads_a_baked_fp8_checkpoint(plain, tmp_path):
    from transformers import LlamaForCausalLM

    cold, warm = tmp_path / "cold", tmp_path / "warm"
    quantise(plain, cold, *LAYOUTS["fp8"][:2])
    bake_scales(cold, PROFILE, warm)
    # Without a GPU transformers dequantises such weights by its own code.
    model, again = (
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (cold, warm)
    )
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        with tempered(model, PROFILE):
            wanted = model(ids).logits
        assert (again(ids).logits - wanted).abs().max() <= 1e-4 * wanted.std()
        assert (model(ids).logits - wanted).abs().max() > wanted.std()


@pytest.fixture(scope="module")
def cold(plain, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gptq") / "cold"
    quantise(plain, folder, *LAYOUTS["gptq 4 bits"][:2])
    return folder


def test_undo_and_refused_twice(cold, tmp_path):
    warm, back = tmp_path / "warm", tmp_path / "back"
    bake_scales(cold, PROFILE, warm)
    with pytest.raises(BakeError, match="was baked with a temperature profile already"):
        bake_scales(warm, PROFILE, tmp_path / "twice")
    assert undo_checkpoint(warm, back) == LAYERS
    own, got = (load_file(folder / "model.safetensors") for folder in (cold, back))
    for key, value in own.items():
        assert torch.equal(value, got[key]) or key.endswith("q_proj.scales")
        assert torch.allclose(value.float(), got[key].float(), rtol=2e-3, atol=1e-7)
    config = json.loads((back / "config.json").read_text())
    assert config == json.loads((cold / "config.json").read_text())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["back", "warm"]


def test_one_scale_for_several_heads(plain, tmp_path):
    def tensor(weight):
        scale = weight.abs().amax() / 448
        return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale[None]}, 0

    def scalar(weight):
        own, _ = tensor(weight)
        return {"weight": own["weight"], "weight_scale_inv": own["weight_scale"][0]}, 0

    def blocks(weight):
        own, _ = fp8_blocks(weight)
        scale = own["weight_scale_inv"][::4, ::4].contiguous()
        return {"weight": own["weight"], "weight_scale_inv": scale}, 0

    same = Profile.from_matrix(torch.tensor([[0.7] * 4, [1.4] * 4]))
    pairs = Profile.from_matrix(torch.tensor([[0.7, 0.7, 1.4, 1.4], [1.0, 1.0, 2.0, 2.0]]))
    float8 = ct("float-quantized", num_bits=8, type="float", strategy="tensor")
    quantise(plain, tmp_path / "tensor", tensor, float8)
    with pytest.raises(BakeError, match=r"q_proj.weight_scale has one scale for rows 0 to 127 of"):
        bake_scales(tmp_path / "tensor", PROFILE, tmp_path / "warm")
    assert bake_scales(tmp_path / "tensor", same, tmp_path / "warm").rounding <= 2.0**-9
    quantise(plain, tmp_path / "scalar", scalar, {"quant_method": "fp8"})
    with pytest.raises(BakeError, match="is one scale for all of .*quantise it by row"):
        bake_scales(tmp_path / "scalar", PROFILE, tmp_path / "none")
    wide = {"quant_method": "fp8", "weight_block_size": [64, 128]}
    quantise(plain, tmp_path / "blocks", blocks, wide)
    with pytest.raises(BakeError, match=r"rows 0 to 63 of .*heads at 1/T = 0\.588 to 1\.67"):
        bake_scales(tmp_path / "blocks", PROFILE, tmp_path / "none")
    bake_scales(tmp_path / "blocks", pairs, tmp_path / "pairs")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "quanto"}, r"layout whose scales aren't known here \(quanto\)"),
        ({"quant_method": "awq", "version": "gemv"}, r"aren't known here \(awq, gemv\)"),
        ({**GPTQ, "bits": 4, "checkpoint_format": "marlin"}, r"known here \(gptq, marlin\)"),
        ({"quant_method": "mxfp4"}, r"aren't known here \(mxfp4\)"),
        ({"load_in_8bit": True}, r"has no tensor called \*\.SCB"),
    ],
)
def test_layouts_that_are_not_known_are_named(cold, tmp_path, settings, words):
    folder = tmp_path / "cold"
    shutil.copytree(cold, folder)
    config = json.loads((cold / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(BakeError, match=words):
        bake_scales(folder, PROFILE, tmp_path / "warm")
    assert [*tmp_path.iterdir()] == [folder]


def test_refusals_write_nothing(plain, cold, tmp_path):
    out = tmp_path / "warm"
    with pytest.raises(BakeError, match="isn't quantised, so it has no scales"):
        bake_scales(plain, PROFILE, out)
    with pytest.raises(BakeError, match=r"quantised \(gptq\).* or change their scales: --in-place"):
        bake_checkpoint(cold, PROFILE, out)
    with pytest.raises(ProfileError, match="3 layers x 4 heads"):
        bake_scales(cold, Profile.from_matrix(torch.ones(3, 4)), out)
    double = tmp_path / "double"
    quantise(plain, double, *LAYOUTS["bnb nf4"][:2])
    tensors = load_file(double / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight.nested_absmax"] = torch.ones(2)
    save_file(tensors, double / "model.safetensors", {"format": "pt"})
    with pytest.raises(BakeError, match="bnb_4bit_use_double_quant"):
        bake_scales(double, PROFILE, out)
    extreme = torch.ones(LAYERS, HEADS)
    extreme[1, 2] = 900.0
    fine = tmp_path / "fine"
    quantise(plain, fine, *LAYOUTS["gptq 8 bits"][:2])
    with pytest.raises(BakeError, match=r"layers.1.self_attn.q_proj.weight would lose 0\.\d+ of"):
        bake_scales(fine, Profile.from_matrix(extreme), out)
    out.mkdir()
    with pytest.raises(OutputError, match="exists"):
        bake_scales(cold, PROFILE, out)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["double", "fine", "warm"]
    assert "quantised (gptq)" in check_model(cold).reason
