"""Attention that a model computes itself, outside of transformers' interface."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama as llama


class OwnAttention(llama.LlamaAttention):
    """Llama's attention as code of its own: neither goes through transformers' interface."""

    product = False

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **_
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        key, value = (llama.repeat_kv(x, self.num_key_value_groups) for x in (key, value))
        if self.product:
            mixed = F.scaled_dot_product_attention(query, key, value, attention_mask)
        else:
            scores = query @ key.transpose(2, 3) * self.scaling + attention_mask
            mixed = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value
        return self.o_proj(mixed.transpose(1, 2).reshape(*shape[:-2], -1)), None


class OwnProduct(OwnAttention):
    product = True
