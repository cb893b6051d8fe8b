"""Layouts of quantised safetensors checkpoints: what a weight is, and which tensor scales its rows.

In each of them a row of a weight is integers (or small floats) times scales, with zero points
among the integers, so beta times the row is beta times its scales.

| method | tensors of a linear layer | weight [out, in] |
|---|---|---|
| gptq | qweight, qzeros, scales [groups, out], g_idx | scales (q - z) |
| awq (gemm) | qweight, qzeros, scales [groups, out] | scales (q - z) |
| fp8 | weight, weight_scale_inv [out / block, in / block] | weight times scale |
| fbgemm_fp8 | weight, weight_scale [out, 1] | weight times scale |
| compressed-tensors | weight or weight_packed, weight_scale, weight_zero_point | scale (q - z) |
| torchao, int8 and float8 | _weight_qdata, _weight_scale, _weight_zero_point | scale (q - z) |
| hqq (axis 1) | W_q, scale [out in / group, 1], zero, and settings | scale (q - z) |
| bitsandbytes, 8 bits | weight, SCB [out] | weight times SCB / 127 |
| bitsandbytes, 4 bits | weight, weight.absmax [out in / 64], weight.quant_map | absmax map[q] |

Sources: auto_gptq 0.7 (qlinear_cuda_old), gptqmodel 7 (v2: zero points as they are), autoawq 0.2
(packing_utils), transformers 5 (integrations.finegrained_fp8, fbgemm_fp8, bitsandbytes),
compressed_tensors 0.20 (pack_quantized, naive_quantized), torchao 0.18 (prototype.safetensors,
workflows), hqq 0.2 (quantize, bitpack), bitsandbytes (QuantState).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempering.engines.checkpoints.files import Checkpoint
from tempering.errors import BakeError

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Quantised:
    """One quantised weight of a checkpoint.

    values: the weight [out, in], float32. scales: the name of the tensor that scales its rows.
    axis: the axis of the scales along the rows of the weight; None where they are flat, one for
        each `len / numel` weights in order.
    used: names of the tensors it is made of.
    """

    values: Tensor
    scales: str
    axis: int | None
    used: tuple[str, ...]


Read = Callable[[Checkpoint, str, Mapping[str, Any]], Quantised]


def reader_of(settings: Mapping[str, Any], name: str) -> tuple[str, Read]:
    """The suffix of the tensors that stand for quantised weights, and how to read one of them.

    settings: `quantization_config` of the checkpoint `name`. Raises BakeError, naming the method,
    for a layout that isn't known here.
    """
    method = str(settings.get("quant_method", "")).lower()
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        method = "bitsandbytes, 8 bits"
    elif settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        method = "bitsandbytes, 4 bits"
    form = str(settings.get("checkpoint_format") or settings.get("version") or "").lower()
    known = {
        ("gptq", ""): (".qweight", _gptq),
        ("gptq", "gptq"): (".qweight", _gptq),
        ("gptq", "gptq_v2"): (".qweight", _gptq),
        ("awq", ""): (".qweight", _awq),
        ("awq", "gemm"): (".qweight", _awq),
        ("fp8", form): (".weight_scale_inv", _fp8),
        ("fbgemm_fp8", form): (".weight_scale", _fp8),
        ("compressed-tensors", form): (".weight_scale", _compressed_tensors),
        ("hqq", form): (".W_q", _hqq),
        ("torchao", form): ("._weight_qdata", _torchao),
        ("bitsandbytes, 8 bits", form): (".SCB", _int8),
        ("bitsandbytes, 4 bits", form): (".weight.absmax", _four_bits),
    }
    found = known.get((method, form))
    if found is None:
        what = f"{method or 'unknown method'}{f', {form}' if form else ''}"
        raise BakeError(
            f"{name} is quantised in a layout whose scales aren't known here ({what}); known are "
            "gptq, awq (gemm), fp8, fbgemm_fp8, compressed-tensors, torchao, hqq and bitsandbytes. "
            "Bake the model that it was quantised from, then quantise it"
        )
    return found


def _gptq(files: Checkpoint, module: str, settings: Mapping[str, Any]) -> Quantised:
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    packed, zeros, scales = (files.raw(name) for name in names)
    index = f"{module}.g_idx"
    bits = int(settings["bits"])
    if index in files.tensors:
        groups = files.raw(index).long()
        names.append(index)
        bits = packed.shape[0] * 32 // len(groups)
    else:
        width = packed.shape[0] * 32 // bits
        groups = torch.arange(width) // (width // scales.shape[0])
    codes = unpacked(packed.T, bits, len(groups))
    zero = unpacked(zeros, bits, scales.shape[1])
    if settings.get("checkpoint_format") != "gptq_v2":
        zero = (zero + 1) & (2**bits - 1)  # stored less 1
    values = (codes - zero.T[:, groups]) * scales.T.float()[:, groups]
    return Quantised(values, names[2], 1, tuple(names))


def _awq(files: Checkpoint, module: str, settings: Mapping[str, Any]) -> Quantised:
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    packed, zeros, scales = (files.raw(name) for name in names)
    if int(settings.get("bits", 4)) != 4:
        raise BakeError(f"{module} is packed in {settings['bits']} bits; AWQ packs 4")
    codes, zero = (
        unpacked(item, 4, scales.shape[1]).unflatten(1, (-1, 8))[:, :, list(_AWQ_ORDER)].flatten(1)
        for item in (packed, zeros)
    )
    size = len(codes) // len(scales)
    values = (codes - zero.repeat_interleave(size, 0)) * scales.float().repeat_interleave(size, 0)
    return Quantised(values.T.contiguous(), names[2], 1, tuple(names))


def _fp8(files: Checkpoint, module: str, settings: Mapping[str, Any]) -> Quantised:
    own = "weight_scale_inv" if f"{module}.weight_scale_inv" in files.tensors else "weight_scale"
    names = (f"{module}.weight", f"{module}.{own}")
    weight, scale = (files.raw(name).float() for name in names)
    blocks = settings.get("weight_block_size")
    return Quantised(weight * _spread(scale, weight, blocks), names[1], 0, names)


def _compressed_tensors(files: Checkpoint, module: str, settings: Mapping[str, Any]) -> Quantised:
    scheme = _scheme(module, settings)
    scale_name, zero_name = f"{module}.weight_scale", f"{module}.weight_zero_point"
    scale = files.raw(scale_name).float()
    packed = f"{module}.weight_packed" in files.tensors
    if scheme.get("type") == "float" and int(scheme["num_bits"]) < 8:
        raise BakeError(
            f"{module} holds floats of {scheme['num_bits']} bits (compressed-tensors), whose "
            "scales take few factors exactly; bake the model that it was quantised from"
        )
    if f"{module}.weight_g_idx" in files.tensors:
        raise BakeError(f"{module} has its columns in another order (weight_g_idx)")
    zero: Tensor | None = None
    if packed:
        bits = int(scheme["num_bits"])
        shape = files.raw(f"{module}.weight_shape").tolist()
        offset = 2 ** (bits - 1)
        used = [f"{module}.weight_packed", f"{module}.weight_shape", scale_name]
        codes = unpacked(files.raw(used[0]), bits, int(shape[1])).float() - offset
        if zero_name in files.tensors:
            zero = unpacked(files.raw(zero_name).T, bits, int(shape[0])).T.float() - offset
    else:
        used = [f"{module}.weight", scale_name]
        codes = files.raw(used[0]).float()
        if zero_name in files.tensors:
            zero = files.raw(zero_name).float()
    if zero is not None:
        used.append(zero_name)
        codes = codes - _spread(zero, codes, scheme.get("block_structure"))
    values = codes * _spread(scale, codes, scheme.get("block_structure"))
    return Quantised(values, scale_name, 0, tuple(used))


def _scheme(module: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the weights of a module are quantised, where all groups of the config agree."""
    schemes = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
    kinds = {(item.get("num_bits"), json.dumps(item.get("block_structure"))) for item in schemes}
    if len(kinds) != 1:
        raise BakeError(
            f"{module}: config.json has {len(kinds)} kinds of quantised weights; with one, their "
            "scales can be changed in place"
        )
    return schemes[0]


# Kinds of torchao whose data are one number each, weight = scale (q - zero point). Others pack them
# for a kernel, or have zero points beside the scales that are no integers.
_TORCHAO = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def _torchao(files: Checkpoint, module: str, settings: Mapping[str, Any]) -> Quantised:
    about = json.loads(files.metadata.get(f"{module}.weight", "{}"))
    kind = about.get("_type")
    if kind not in _TORCHAO:
        raise BakeError(
            f"{module}.weight is torchao's {kind or 'tensor of an unknown kind'}; those whose "
            f"scales can be changed in place are {', '.join(_TORCHAO)}"
        )
    start = f"{module}._weight_"
    used = tuple(key for key in files.tensors if key.startswith(start))
    if f"{start}act_pre_scale" in used:
        raise BakeError(f"{module} scales its input by itself (act_pre_scale)")
    codes, scale = (files.raw(start + part).float() for part in ("qdata", "scale"))
    if f"{start}zero_point" in used:
        codes = codes - _spread(files.raw(f"{start}zero_point").float(), codes, None)
    return Quantised(codes * _spread(scale, codes, None), f"{start}scale", 0, used)


# Numbers in a word of hqq's packing, by their bits; the first of them are the highest bits.
_HQQ_WORDS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def _hqq(files: Checkpoint, module: str, settings: Mapping[str, Any]) -> Quantised:
    used = tuple(key for key in files.tensors if key.rpartition(".")[0] == module)
    own = {key.rpartition(".")[2]: key for key in used if not key.endswith(".bias")}
    absent = {"W_q", "scale", "zero", "axis", "nbits", "shape"} - own.keys()
    if absent:
        raise BakeError(f"{module} lacks {', '.join(sorted(absent))} of hqq; save the model again")
    axis, bits = (int(files.raw(own[part])) for part in ("axis", "nbits"))
    if axis != 1 or bits not in _HQQ_WORDS:
        raise BakeError(
            f"{module} has groups along axis {axis} of {bits} bits; hqq's scales belong to rows "
            "with axis=1, and 1, 2, 3, 4 or 8 bits"
        )
    words = files.raw(own["W_q"])
    if words.is_floating_point():  # view_as_float
        words = words.view(torch.int32 if bits == 3 else torch.uint8)
    scale, zero = (files.raw(own[part]).float() for part in ("scale", "zero"))
    shifts = [bits * place for place in reversed(range(_HQQ_WORDS[bits]))]
    codes = torch.cat([words >> shift & 2**bits - 1 for shift in shifts])[: len(scale)]
    values = ((codes - zero) * scale).reshape(files.raw(own["shape"]).tolist())
    return Quantised(values, own["scale"], None, tuple(own.values()))


def _int8(files: Checkpoint, module: str, settings: Mapping[str, Any]) -> Quantised:
    names = [f"{module}.weight", f"{module}.SCB"]
    weight, scale = (files.raw(name).float() for name in names)
    form = f"{module}.weight_format"
    if form in files.tensors:
        if int(files.raw(form)) != 0:
            raise BakeError(f"{module} is stored in a GPU's own order of int8 weights")
        names.append(form)
    return Quantised(weight * (scale / 127)[:, None], names[1], 0, tuple(names))


def _four_bits(files: Checkpoint, module: str, settings: Mapping[str, Any]) -> Quantised:
    weight, scale = f"{module}.weight", f"{module}.weight.absmax"
    state = next(
        (key for key in files.tensors if key.startswith(f"{weight}.quant_state.bitsandbytes__")),
        None,
    )
    if state is None or f"{weight}.nested_absmax" in files.tensors:
        raise BakeError(
            f"the scales of {weight} are quantised themselves (bnb_4bit_use_double_quant), for "
            "rows of several heads together; quantise the model without that"
        )
    about = json.loads(bytes(files.raw(state).tolist()))
    packed = files.raw(weight).flatten()
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten().long()  # high half first
    absmax = files.raw(scale).float().repeat_interleave(int(about["blocksize"]))[: len(codes)]
    table = f"{weight}.quant_map"
    values = (files.raw(table).float()[codes] * absmax).reshape(about["shape"])
    return Quantised(values, scale, None, (weight, scale, table, state))


def _spread(scale: Tensor, weight: Tensor, blocks: Any) -> Tensor:
    """Scales of a tensor, of rows, of groups or of blocks, one for each weight."""
    rows, columns = weight.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        scale = scale[:, None]
    high, wide = blocks or (-(-rows // scale.shape[0]), -(-columns // scale.shape[1]))
    return scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `bits` bits in each row of int32 words, lowest bits first."""
    data = np.ascontiguousarray(words.numpy()).view(np.uint8)
    flat = np.unpackbits(data, axis=1, bitorder="little")[:, : count * bits]
    digits = flat.reshape(len(flat), count, bits)
    numbers = np.zeros(digits.shape[:2], dtype=np.int32)
    for place in range(bits):
        numbers |= digits[:, :, place].astype(np.int32) << place
    return torch.from_numpy(numbers)
