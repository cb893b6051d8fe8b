"""Which layers of a model have a softmax, and how many heads compete there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from tempering.attention.axes import STANDARD
from tempering.attention.denoisers import is_linear, processor_of
from tempering.errors import ProfileError

# mypy compares what is written in other files with these (strict_equality).
Stack = Literal["decoder", "encoder", "cross"]
Route = Literal["interface", "softmax"]


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of a model.

    name: module name, e.g. "model.layers.3.self_attn".
    stack: "decoder", "encoder" or "cross" (decoder queries over encoder keys).
    tower: in a model of several towers, the one that it belongs to: "vision", "text", "audio", ...
    index: place of its layer in the stack, counted from 0 and including layers without softmax.
    heads, kv_heads: query heads, key-value heads.
    route: "interface" (transformers' attention interface) or "softmax" (attention code of its
        own, reached at its softmax call).
    axes: with route "softmax", how its logits are laid out (see `axes.py`).
    other_softmaxes: with route "softmax", (number of axes, whether over the last) of softmaxes
        in the same module that are no attention over keys.
    mask_floor: logits at or below it are masking, and stay as they are.
    masking: with route "softmax", the value of all masked logits, where it is one that division
        by T leaves as low: -inf or the dtype's minimum.
    features: what sits before the softmax besides scaled products: "sinks", "softcap",
        "position_bias".
    law: the model's own law of length, as the text of a rule: "log_steps(0.1,8192.0)"; None for
        none.
    keys: the most keys that a query had on the sample.
    of_rows: whether its rows are those of the batch. Where they aren't (frames of a video stand
        among them), or where the sample can't tell, it takes one profile alone.
    """

    name: str
    stack: Stack
    index: int
    heads: int
    kv_heads: int
    route: Route = "interface"
    axes: tuple[str, ...] = (STANDARD,)
    other_softmaxes: tuple[tuple[int, bool], ...] = ()
    mask_floor: float = float(torch.finfo(torch.float32).min) / 2
    masking: float | None = None
    features: tuple[str, ...] = ()
    law: str | None = None
    tower: str = ""
    keys: int = field(default=0, compare=False)
    of_rows: bool = field(default=True, compare=False)

    @property
    def part(self) -> str:
        """The stack, and before it the tower in a model of several: "vision encoder"."""
        return f"{self.tower} {self.stack}".lstrip()


@dataclass(frozen=True)
class Layout:
    """The attention layers of a model in order of depth, and the layers that have none.

    depths: number of layers of each part (a stack, or that of a tower), softmax or not; the clock
        of a schedule over depth.
    untempered: names of layers without softmax (state space, linear attention, ...), and of
        attention that the sample did not reach (a vision tower, where it was text).
    outside: names of modules that attend by their code, and did not when the model ran on the
        sample; unreached: those of them that did not run at all.
    """

    layers: tuple[AttentionLayer, ...]
    untempered: tuple[str, ...]
    depths: dict[str, int]
    outside: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Module names, one for each row of a profile."""
        return tuple(layer.name for layer in self.layers)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of query heads in each row of a profile."""
        return tuple(layer.heads for layer in self.layers)

    def parts_called(self, name: str | None) -> tuple[str, ...]:
        """The parts that a name means: one of them, all stacks of a tower, or one stack of all.

        All parts for None; ProfileError for a name that means none.
        """
        if name is None:
            return tuple(self.depths)
        meant = {
            layer.part for layer in self.layers if name in (layer.part, layer.stack, layer.tower)
        }
        if not meant:
            raise ProfileError(f"this model has no stack '{name}'; it has {', '.join(self.depths)}")
        return tuple(part for part in self.depths if part in meant)

    def describe(self) -> str:
        """A short text for messages, e.g. "30 layers x 9 heads"."""
        counts = sorted(set(self.heads))
        heads = str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"
        return f"{len(self.layers)} layers x {heads} heads"


# Names by which attention code calls attention, or forms a softmax.
_CALLS = {
    "get_interface",
    "softmax",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "logsumexp",
    "dispatch_attention_fn",
    "get_attention_scores",
}


def named_for_attention(module: nn.Module) -> bool:
    """Whether a module's class is named for attention, or leaves it to a processor that is."""
    kinds = (type(module), type(processor_of(module)))
    return any(
        "attention" in kind.__name__.lower() or "attn" in kind.__name__.lower() for kind in kinds
    )


def attends(module: nn.Module) -> bool:
    """Whether a module named for attention, or its processor, calls an attention function."""
    processor = processor_of(module)
    if not named_for_attention(module) or is_linear(processor):
        return False
    bases = (*type(module).__mro__, *type(processor).__mro__)
    kinds = [kind for kind in bases if kind not in nn.Module.__mro__]
    items = [item for kind in kinds for item in vars(kind).values()]
    return any(_CALLS.intersection(x.__code__.co_names) for x in items if hasattr(x, "__code__"))
