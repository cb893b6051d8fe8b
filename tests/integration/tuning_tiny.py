"""A tiny llama, and text sampled from it under known temperatures."""

from __future__ import annotations

from typing import Any

import torch

from tempering import Profile, tempered

LAYERS, HEADS, WORDS = 3, 4, 48


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """3 layers, 4 heads over 2 key-value heads, 48 words; attention matters a lot."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)  # less certain of the next word
    return model.to(dtype).eval()


def sampled_text(model: Any, profile: Profile | None, rows: int, length: int, seed: int) -> Any:
    """Int[Tensor, "rows length"] sampled from the model, under a profile if any."""
    import contextlib

    context = contextlib.nullcontext() if profile is None else tempered(model, profile)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (rows, 1), generator=generator)
    with context, torch.no_grad():
        for _ in range(length - 1):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], dim=1)
    return ids
