"""What an engine's precision does to log probabilities: the reference with its numbers rounded.

Inside `rounded(model, precision)` the inputs and outputs of every linear layer, and the outputs of
every block and norm, are rounded as an engine of that precision stores them:

    float32, float16, bfloat16    to the nearest number of that kind
    q8       inputs of linear layers to 8 bits in blocks of 32 with one scale each, as llama.cpp
             multiplies quantised weights; outputs to float16, as it keeps keys and values

Two float32 engines differ by the order of their sums: there the outputs are moved by a random
part of their own rounding instead. Weights are not touched: load them as the engine has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tempering.errors import InputError

PRECISIONS = ("float32", "bfloat16", "float16", "q8")
_BLOCK = 32
# Sums of a few hundred products in another order differ by about the square root of their number
# of roundings, of which half a unit each: some 4 units of 2^-24 at the widths of these models.
_REORDERED = 4 * 2.0**-24


@contextlib.contextmanager
def rounded(model: nn.Module, precision: str, seed: int = 0) -> Iterator[None]:
    """Round as an engine of that precision does, until the end; InputError for an unknown one."""
    check_precision(precision)
    generator = torch.Generator().manual_seed(seed)

    def outward(item: Any) -> Any:
        if isinstance(item, tuple):
            return tuple(outward(part) for part in item)
        if not isinstance(item, Tensor) or item.dtype != torch.float32:
            return item
        if precision == "float32":
            noise = torch.randn(item.shape, generator=generator).to(item.device)
            return item * (1 + _REORDERED * noise)
        return item.to(_KINDS[precision]).float()

    def inward(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return tuple(_in_blocks(item) if isinstance(item, Tensor) else item for item in args)

    handles = []
    try:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        for module in model.modules():
            if isinstance(module, nn.ModuleList) or module is model or not _counts(module):
                continue
            if precision == "q8" and isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(inward))
            if module is head and precision == "q8":
                continue  # logits stay in float32
            handles.append(module.register_forward_hook(lambda _m, _i, out: outward(out)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_precision(precision: str) -> None:
    """InputError for a precision that isn't known."""
    if precision not in PRECISIONS:
        raise InputError(
            f"the precision of an engine is {', '.join(PRECISIONS)} (quantised weights with "
            f"activations of 8 bits, as in llama.cpp); not '{precision}'"
        )


_KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "q8": torch.float16}


def _counts(module: nn.Module) -> bool:
    """Whether a module's output is stored by engines: linear layers, norms, blocks of layers."""
    name = type(module).__name__
    return isinstance(module, nn.Linear) or name.endswith(("Norm", "Layer", "Block", "MLP"))


def _in_blocks(values: Tensor) -> Tensor:
    """To 8 bits: x -> s round(x/s), s = max|x| of 32 neighbours over 127, in float16."""
    width = values.shape[-1]
    if width % _BLOCK or not values.is_floating_point():
        return values
    blocks = values.unflatten(-1, (-1, _BLOCK))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, blocks / step, 0.0).round()
    return (codes * step.half().float()).flatten(-2).to(values.dtype)
