"""The attention of definitions.md, section 5, in float64; shares no code with the library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, VOCABULARY = 4, 4, 61


def tiny_llama(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    kind: tuple[Any, Any] = (LlamaConfig, LlamaForCausalLM),
    **settings: Any,
) -> Any:
    """A random decoder with grouped heads whose logits spread by about 2, so that T matters."""
    torch.manual_seed(seed)
    config_class, model_class = kind
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.25,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = config_class(**{**shape, **settings})
    config._attn_implementation = attention
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.7 + 0.6 * torch.rand_like(parameter))
    return model.to(dtype)


def tiny_bert() -> Any:
    """A random encoder of 2 layers and 4 heads."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    config._attn_implementation = "eager"
    return BertModel(config).eval()


def in_double(model: Any) -> Any:
    """Replace norms that round to float32 inside, so that the whole model is float64."""
    model = model.double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm = norm.double()
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def random_temperatures(seed: int, *shape: int, low: float = 1 / 3, high: float = 3.0) -> Tensor:
    """Log-uniform in low..high, float64."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return low * (high / low) ** share


def tokens(seed: int, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def byte_tokenizer() -> Any:
    """Every byte is a token: ids 3..258, after pad, begin and end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(special + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


class Forward(NamedTuple):
    """logits [batch, seq, vocabulary]; weights and softmax inputs, a list [batch, heads, q, k]."""

    logits: Tensor
    weights: list[Tensor]
    inputs: list[Tensor]


def forward(
    model: Any,
    ids: Tensor,
    temperature: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Forward:
    """A Llama's forward pass with softmax(l / T), from its weights alone, in float64.

    temperature: [layers, heads] or [batch, layers, heads]. mask: 1 where a token is real.
    """
    config = model.config
    batch, length = ids.shape
    weight = {name: value.detach().double() for name, value in model.state_dict().items()}
    if temperature is None:
        temperature = torch.ones(config.num_hidden_layers, config.num_attention_heads)
    temperature = temperature.double().expand(batch, -1, -1)
    if positions is None:
        positions = torch.arange(length).expand(batch, -1)
    real = torch.ones(batch, length) if mask is None else mask
    query_at, key_at = torch.arange(length)[:, None], torch.arange(length)[None, :]
    causal = key_at <= query_at
    if window is not None:
        causal &= key_at > query_at - window
    seen = causal[None, None] & real.bool()[:, None, None, :]
    empty = ~seen.any(-1, keepdim=True)

    d = config.head_dim
    base = config.rope_parameters["rope_theta"]
    # transformers rounds the angles to float32; the same rounding here keeps 1e-10 in reach
    frequency = 1.0 / base ** (torch.arange(0, d, 2).float() / d)
    angle = positions[..., None].float() * frequency
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        rms = (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return x / rms * weight[name]

    def rotate(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * cos + turned * sin

    def split(x: Tensor, heads: int) -> Tensor:
        return x.view(batch, length, heads, d).transpose(1, 2)

    x = weight["model.embed_tokens.weight"][ids]
    all_weights, all_inputs = [], []
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        q = rotate(split(y @ weight[at + "self_attn.q_proj.weight"].T, config.num_attention_heads))
        k = rotate(split(y @ weight[at + "self_attn.k_proj.weight"].T, config.num_key_value_heads))
        v = split(y @ weight[at + "self_attn.v_proj.weight"].T, config.num_key_value_heads)
        outputs, inputs, weights = [], [], []
        for head in range(config.num_attention_heads):
            group = head * config.num_key_value_heads // config.num_attention_heads
            l = q[:, head] @ k[:, group].transpose(-1, -2) / d**0.5
            tempered = l / temperature[:, layer, head, None, None]
            tempered = tempered.masked_fill(~seen[:, 0], float("-inf"))
            r = torch.where(empty[:, 0], 0.0, torch.softmax(tempered, -1))
            inputs.append(tempered)
            weights.append(r)
            outputs.append(r @ v[:, group])
        all_inputs.append(torch.stack(inputs, 1))
        all_weights.append(torch.stack(weights, 1))
        x = x + torch.cat(outputs, -1) @ weight[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(y @ weight[at + "mlp.gate_proj.weight"].T)
        up = y @ weight[at + "mlp.up_proj.weight"].T
        x = x + (gate * up) @ weight[at + "mlp.down_proj.weight"].T
    x = norm(x, "model.norm.weight")
    return Forward(x @ weight["lm_head.weight"].T, all_weights, all_inputs)


@contextlib.contextmanager
def softmax_divided(temperatures: list[Tensor]) -> Iterator[list[Tensor]]:
    """Divide the input of each 4-D softmax in a block by T, in the order of the calls.

    For models in eager attention whose forward is not worth writing twice. temperatures: one
    [heads] or [batch, heads] a call, over again when all are used. Yields the divided inputs.
    """
    original, seen = torch.nn.functional.softmax, []

    def divided(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim != 4:
            return original(x, *args, **kwargs)
        x = x / temperatures[len(seen) % len(temperatures)][..., None, None].to(x.dtype)
        seen.append(x)
        return original(x, *args, **kwargs)

    with mock.patch.object(torch.nn.functional, "softmax", divided):
        yield seen


def statistics(inputs: Tensor, sink: int = 0) -> dict[str, Tensor]:
    """Means over batch and queries of what each head's softmax kept; inputs [b, heads, q, k]."""
    heads = inputs.shape[1]
    out = {name: torch.zeros(heads, dtype=torch.float64) for name in STATISTICS}
    for head in range(heads):
        rows: dict[str, list[float]] = {name: [] for name in STATISTICS}
        for row in inputs[:, head].double().flatten(0, 1):
            x = row[row > float("-inf")]
            kept = (row > float("-inf")).nonzero().flatten().tolist()
            r = torch.exp(x - x.logsumexp(0))
            rows["entropy"].append(_entropy(r))
            rows["peak"].append(float(r.max()))
            rows["sink_share"].append(float(r[kept.index(sink)]) if sink in kept else 0.0)
            rows["heat_capacity"].append(float((r * x**2).sum() - (r * x).sum() ** 2))
            others = torch.tensor([i for i, key in enumerate(kept) if key != sink])
            if len(others):
                p = torch.exp(x[others] - x[others].logsumexp(0))
                rows["entropy_without_sink"].append(_entropy(p))
        for name, values in rows.items():
            out[name][head] = sum(values) / len(values)
    return out


STATISTICS = ("entropy", "peak", "sink_share", "heat_capacity", "entropy_without_sink")


def _entropy(r: Tensor) -> float:
    r = r[r > 0]
    return -float((r * r.log()).sum())
