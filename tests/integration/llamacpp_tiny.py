"""Tiny GGUF files for llama.cpp, in the styles of llama, qwen2 and gemma3, with a vocabulary.

gemma3 gets the vocabulary of the others: what is tested is its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

WIDTH, HEADS, KV = 64, 4, 2
CHARACTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
VOCABULARY = [
    *("<pad>", "<s>", "</s>", "<think>", "</think>"),
    *CHARACTERS,
    *(chr(256 + i) for i in range(68)),
    "ab",
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_gguf(
    path: Path,
    kind: str = "llama",
    seed: int = 0,
    *,
    width: int = WIDTH,
    base: float = 1e4,
    window: int = 16,
    more: Callable[[GGUFWriter], None] | None = None,
) -> Path:
    """A float32 file of 2 layers (gemma3: 6, of which the last is global).

    width: of the layers; types whose blocks hold 256 numbers need 256. base: of the rotation.
    window: of gemma3's sliding layers. more: adds keys of its own.
    """
    layers = 6 if kind == "gemma3" else 2
    inner = 96 if width == WIDTH else width
    # llama.cpp scales gemma3 by 1/sqrt(size of a head), transformers by 1/sqrt(256).
    dim = 256 if kind == "gemma3" else width // HEADS
    rng = np.random.default_rng(seed)
    out = GGUFWriter(path, kind)
    out.add_block_count(layers)
    out.add_context_length(512)
    out.add_embedding_length(width)
    out.add_feed_forward_length(inner)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV)
    out.add_rope_freq_base(base)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(VOCABULARY))
    if kind == "llama":
        out.add_rope_dimension_count(dim)
    out.add_key_length(dim)
    out.add_value_length(dim)
    if kind == "gemma3":
        out.add_sliding_window(window)
    if more is not None:
        more(out)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(VOCABULARY)
    out.add_token_types([3] * 3 + [4, 4] + [1] * (len(VOCABULARY) - 5))
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(TEMPLATE)

    # Wide ones milder: blocks of 256 round more, which hot attention would multiply.
    usual = 0.3 if width == WIDTH else 0.1

    def add(name: str, *shape: int, std: float = usual, start: float = 0.0) -> None:
        values = (start + std * rng.normal(size=shape)).astype(np.float32)
        if kind == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
            heads = HEADS if "attn_q" in name else KV  # llama's files pair neighbours
            values = values.reshape(heads, 2, dim // 2, width).swapaxes(1, 2).reshape(shape)
        out.add_tensor(name, values)

    add("token_embd.weight", len(VOCABULARY), width, std=1.0 if kind != "gemma3" else 0.3)
    if kind != "gemma3":
        add("output.weight", len(VOCABULARY), width, std=0.15)
    add("output_norm.weight", width, std=0.1, start=1.0)
    for layer in range(layers):
        at = f"blk.{layer}."
        add(at + "attn_norm.weight", width, std=0.1, start=1.0)
        for name, heads in (("attn_q", HEADS), ("attn_k", KV), ("attn_v", KV)):
            add(f"{at}{name}.weight", heads * dim, width)
            if kind == "qwen2":
                add(f"{at}{name}.bias", heads * dim)
        add(at + "attn_output.weight", width, HEADS * dim)
        if kind == "gemma3":
            for name in ("attn_q_norm", "attn_k_norm"):
                add(f"{at}{name}.weight", dim, std=0.2, start=1.0)
            for name in ("post_attention_norm", "post_ffw_norm"):
                add(f"{at}{name}.weight", width, std=0.1, start=1.0)
        add(at + "ffn_norm.weight", width, std=0.1, start=1.0)
        add(at + "ffn_gate.weight", inner, width)
        add(at + "ffn_up.weight", inner, width)
        add(at + "ffn_down.weight", width, inner)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
