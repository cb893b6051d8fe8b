"""Ways to compress the embedded model, each a function that changes a copy of it in place.

round 2, 3, 4 bits      every linear layer but the head, asymmetric, groups of 32
Q2_K, Q3_K_S, ...       llama.cpp's own, on the embedded file (pip install cyllama==0.2.18)
hqq 2, 3, 4 bits        half-quadratic quantisation, groups of 64 (pip install hqq)
GPTQ 2, 3, 4 bits       as round, each column's error made up for by those after it (Frantar et al.
                        2023); inputs are those of the uncompressed model, in all layers
int8 activations        weights by row, activations by token, both to 8 bits, symmetric
sparse 40%, 50%         the smallest weights of each row set to 0
2:4                     two of every four weights of a row set to 0, the smallest
Wanda 50%, Wanda 2:4    the same by |w| times the norm of its input (Sun et al. 2023)
heads removed           in each layer the two heads whose output is smallest, weights set to 0
layers removed          three layers whose output is most like their input (Men et al. 2024)
window 128, 256         keys further away are masked, but the first four (Xiao et al. 2023)
evicted 25, 50, 75%     before the second half of a text, the keys of its first half with the
                        largest norms in each head, but the first four, go (Devoto et al. 2024)
KV 4, 2 bits            keys by channel, values by token, groups of 32 (KIVI, Liu et al. 2024)
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempering.engines.loading.rounding import round_weights, rounded

SINKS = 4
# llama_ftype of llama.h.
FTYPES = {
    "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17,
    "IQ3_S": 26, "IQ3_XXS": 23, "IQ2_S": 28,
}  # fmt: skip


def linears(model: nn.Module) -> list[nn.Linear]:
    """Every linear layer but the head."""
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


# -- quantised weights


def llamacpp(name: str) -> Callable[[Any, Tensor], None]:
    def compress(model: Any, ids: Tensor) -> None:
        with tempfile.TemporaryDirectory() as folder:
            other = quantised_file(name, Path(folder))
            state = loaded(other).state_dict()
        model.load_state_dict(state)

    return compress


def loaded(path: Path) -> Any:
    from tempering.engines.loading.gguf_files import load_gguf

    return load_gguf(path)[0]


def quantised_file(name: str, folder: Path) -> Path:
    """The embedded model's file, quantised by llama.cpp."""
    from cyllama.llama import llama_cpp as llama

    from tempering.engines.loading.gguf_files import embedded_gguf

    llama.disable_logging()
    out = folder / f"{name}.gguf"
    settings = llama.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread, settings.allow_requantize = FTYPES[name], 1, True
    llama.model_quantize(str(embedded_gguf("smollm2")), str(out), settings)
    return out


def hqq(bits: int) -> Callable[[Any, Tensor], None]:
    def compress(model: Any, ids: Tensor) -> None:
        from hqq.core.quantize import Quantizer

        for linear in linears(model):
            codes, meta = Quantizer.quantize(
                linear.weight.data, nbits=bits, group_size=64, axis=1, device="cpu"
            )
            linear.weight.data.copy_(Quantizer.dequantize(codes, meta).to(linear.weight.dtype))

    return compress


def gptq(bits: int, group: int = 32, damp: float = 0.01) -> Callable[[Any, Tensor], None]:
    def compress(model: Any, ids: Tensor) -> None:
        for linear, products in input_products(model, ids).items():
            products += damp * products.diagonal().mean() * torch.eye(len(products)).double()
            factor = torch.linalg.cholesky(torch.linalg.inv(products), upper=True).float()
            weight: Tensor = linear.weight.data  # type: ignore[assignment]
            left = weight.clone()
            for place in range(left.shape[1]):
                if place % group == 0:
                    part = left[:, place : place + group]
                    low = part.amin(1)
                    step = ((part.amax(1) - low) / (2**bits - 1)).clamp(min=1e-12)
                column = left[:, place]
                weight[:, place] = (
                    low + ((column - low) / step).round().clamp(0, 2**bits - 1) * step
                )
                error = (column - weight[:, place]) / factor[place, place]
                left[:, place:] -= error[:, None] * factor[place, place:]

    return compress


def int8(model: Any, ids: Tensor) -> None:
    def by_token(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (through(args[0], symmetric(args[0].detach(), 8, -1)),)

    for linear in linears(model):
        linear.weight.data.copy_(symmetric(linear.weight.data, 8, -1))
        linear.register_forward_pre_hook(by_token)


def symmetric(x: Tensor, bits: int, dim: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-12) / top
    return (x / scale).round().clamp(-top, top) * scale


def through(x: Tensor, quantised: Tensor) -> Tensor:
    """The quantised values; gradients pass as if nothing had been rounded."""
    return x + (quantised - x).detach()


# -- sparse weights


def sparse(share: float | None, by_input: bool = False) -> Callable[[Any, Tensor], None]:
    """share: of each row's weights set to 0; None for two of every four."""

    def compress(model: Any, ids: Tensor) -> None:
        norms = input_norms(model, ids) if by_input else {}
        for linear in linears(model):
            weight = linear.weight.data
            score = weight.abs() * norms.get(linear, torch.ones(()))
            if share is None:
                fours = score.unflatten(-1, (-1, 4))
                drop = fours.argsort(-1).argsort(-1).lt(2).flatten(-2)
            else:
                drop = score.argsort(-1).argsort(-1) < round(share * weight.shape[1])
            weight[drop] = 0.0

    return compress


def input_norms(model: Any, ids: Tensor) -> dict[nn.Module, Tensor]:
    """The Euclidean norm of every input of every linear layer, over the tokens of a text."""
    squares = over_inputs(model, ids, lambda rows: rows.square().sum(0))
    return {module: total.sqrt() for module, total in squares.items()}


def input_products(model: Any, ids: Tensor) -> dict[nn.Module, Tensor]:
    """X' X of the inputs X of every linear layer, over the tokens of a text."""
    return over_inputs(model, ids, lambda rows: rows.double().T @ rows.double())


def over_inputs(model: Any, ids: Tensor, of: Callable[[Tensor], Tensor]) -> dict[nn.Module, Tensor]:
    """The sum of `of(inputs)`, a row for each token, for every linear layer."""
    sums: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[module] = sums.get(module, 0.0) + of(args[0].flatten(0, -2))

    hooks = [linear.register_forward_pre_hook(add) for linear in linears(model)]
    with torch.no_grad():
        for row in ids:
            model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return sums


# -- parts removed


def heads_removed(model: Any, ids: Tensor, count: int = 2) -> None:
    """Of each layer, those whose part of the attention's output has the smallest norm."""
    norms = input_norms(model, ids)
    for layer in model.model.layers:
        mixer, width = layer.self_attn.o_proj, layer.self_attn.head_dim
        heads = mixer.in_features // width
        parts = (mixer.weight.data * norms[mixer]).unflatten(-1, (heads, width))
        for head in parts.square().sum((0, 2)).argsort()[:count].tolist():
            mixer.weight.data[:, head * width : (head + 1) * width] = 0.0


def layers_removed(model: Any, ids: Tensor, count: int = 3) -> None:
    """Those that change the direction of their input least lose what they add."""
    with torch.no_grad():
        states = model(ids[:4], use_cache=False, output_hidden_states=True).hidden_states
    # The last state has passed the last norm, so the last layer is left out.
    alike = [
        nn.functional.cosine_similarity(a, b, dim=-1).mean()
        for a, b in itertools.pairwise(states[:-1])
    ]
    for place in torch.stack(alike).argsort(descending=True)[:count].tolist():
        layer = model.model.layers[place]
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


# -- what attention sees


def window(length: int) -> Callable[[Any, Tensor], None]:
    def compress(model: Any, ids: Tensor) -> None:
        def mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            size = kwargs["input_ids"].shape[1]
            query, key = torch.arange(size)[:, None], torch.arange(size)
            seen = (key <= query) & ((query - key < length) | (key < SINKS))
            bias = torch.zeros(1, 1, size, size).masked_fill(~seen, torch.finfo().min)
            return args, kwargs | {"attention_mask": bias}

        model.model.register_forward_pre_hook(mask, with_kwargs=True)

    return compress


def evicted(share: float) -> Callable[[Any, Tensor], None]:
    def compress(model: Any, ids: Tensor) -> None:
        def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            size, heads = states.shape[1], module.num_key_value_groups
            half = size // 2
            keys = module.k_proj(states.detach()).unflatten(-1, (-1, module.head_dim))
            norms = keys[:, SINKS:half].norm(dim=-1).transpose(1, 2)  # a rotation keeps norms
            dropped = norms.argsort(-1).argsort(-1) >= norms.shape[-1] - round(share * half)
            query, key = torch.arange(size)[:, None], torch.arange(size)
            hidden = (key > query).expand(len(keys), keys.shape[2], size, size).clone()
            hidden[:, :, half:, SINKS:half] |= dropped[:, :, None]
            bias = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo().min)
            return args, kwargs | {"attention_mask": bias.repeat_interleave(heads, 1)}

        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(mask, with_kwargs=True)

    return compress


def cache(bits: int) -> Callable[[Any, Tensor], None]:
    def compress(model: Any, ids: Tensor) -> None:
        def keys(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return through(output, by_group(output.detach().transpose(-1, -2)).transpose(-1, -2))

        def values(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return through(output, by_group(output.detach()))

        def by_group(x: Tensor) -> Tensor:
            return rounded(x, bits, 32)

        for layer in model.model.layers:
            layer.self_attn.k_proj.register_forward_hook(keys)
            layer.self_attn.v_proj.register_forward_hook(values)

    return compress


def rounding(bits: int) -> Callable[[Any, Tensor], None]:
    def compress(model: Any, ids: Tensor) -> None:
        round_weights(model, bits)

    return compress


FORMS: dict[str, Callable[[Any, Tensor], None]] = {
    "round 3 bits": rounding(3),
    "round 2 bits": rounding(2),
    "round 4 bits": rounding(4),
    **{name: llamacpp(name) for name in FTYPES},
    "hqq 2 bits": hqq(2),
    "hqq 3 bits": hqq(3),
    "hqq 4 bits": hqq(4),
    "GPTQ 2 bits": gptq(2),
    "GPTQ 3 bits": gptq(3),
    "GPTQ 4 bits": gptq(4),
    "int8 activations": int8,
    "sparse 40%": sparse(0.4),
    "sparse 50%": sparse(0.5),
    "2:4": sparse(None),
    "Wanda 50%": sparse(0.5, by_input=True),
    "Wanda 2:4": sparse(None, by_input=True),
    "heads removed": heads_removed,
    "layers removed": layers_removed,
    "window 128": window(128),
    "window 256": window(256),
    "evicted 25%": evicted(0.25),
    "evicted 50%": evicted(0.5),
    "evicted 75%": evicted(0.75),
    "KV 4 bits": cache(4),
    "KV 2 bits": cache(2),
}


def compressed(name: str, reference: Any, ids: Tensor) -> Any:
    """A copy of the reference, compressed. ids: chunks of text, for ways that look at inputs."""
    model = copy.deepcopy(reference)
    with torch.no_grad():
        FORMS[name](model, ids)
    return model
