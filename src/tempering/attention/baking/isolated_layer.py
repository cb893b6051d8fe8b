"""One attention layer alone: a float32 copy, run on the calls that it received from its model.

Weights of 0 hide what depends on them: a dead pair of dimensions in the norm of the keys hides
those of the queries, a pruned head hides whose rows are its own. `Isolated.jittered` makes weights
that hide nothing, so that what is read off them is a fact about the architecture.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from tempering.attention.control.handle import Tempering
from tempering.attention.layout import AttentionLayer, Layout
from tempering.attention.logits import has_sinks, sliced_logits
from tempering.attention.profiles.profile import Profile

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def with_own_cache(item: Any) -> Any:
    """A copy of a cache, which the call that it is given to writes to; any other item as it is."""
    from transformers import Cache

    return copy.deepcopy(item) if isinstance(item, Cache) else item


@dataclass
class SeenLogits:
    """What one call of a layer showed.

    queries, keys: the operands of the products that the logits are made of.
    logits: Float[Tensor, "batch heads queries keys"], finished.
    visible: where they are not masked.
    sinks: whether the last key is a learned sink logit.
    choices: what was ranked to choose keys or experts, which finished logits don't show.
    outputs: every floating tensor that the call returned.
    """

    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    visible: list[Tensor] = field(default_factory=list)
    sinks: bool = False
    choices: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class Isolated:
    """A layer's module copied out of its model; running it leaves the model alone."""

    def __init__(self, module: nn.Module, layer: AttentionLayer, calls: list[Arguments]) -> None:
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)
        self.layer = layer
        self.calls = calls
        # The module is its own root here, so its name is empty.
        self._layout = Layout((replace(layer, name=""),), (), {layer.part: 1})

    @contextlib.contextmanager
    def jittered(self) -> Iterator[None]:
        """Inside, weights and inputs are perturbed, so that no zero and no tie hides a dependence.

        The same each time. Each parameter gets Gaussian noise of a tenth of its own root mean
        square, which becomes 1 first where it is too large or too small for float32. Masks of
        `torch.nn.utils.prune` let everything through, and inputs that are constant, which tell
        their channels apart no more, become Gaussian.
        """
        calls, tensors = self.calls, [*self.module.parameters(), *_pruning_masks(self.module)]
        saved = [tensor.detach().clone() for tensor in tensors]
        generator = torch.Generator().manual_seed(2)
        try:
            with torch.no_grad():
                for parameter in self.module.parameters():
                    _add_noise(parameter, generator)
                for mask in _pruning_masks(self.module):
                    mask.fill_(1)
            self.calls = tree_map(lambda item: _varied(item, generator), calls)
            yield
        finally:
            self.calls = calls
            with torch.no_grad():
                for tensor, values in zip(tensors, saved, strict=True):
                    tensor.copy_(values)

    def run(
        self,
        beta: Float[Tensor, "heads"] | None = None,
        scale: Float[Tensor, "heads"] | None = None,
    ) -> list[SeenLogits]:
        """One `SeenLogits` for each call.

        beta: what the layer's logits are multiplied by. scale: what its heads' outputs are.
        """
        if beta is None:
            profile = Profile.neutral(self._layout)
        else:
            profile = Profile.from_rows([beta.double().reciprocal()], self._layout)
        if scale is not None:
            profile = replace(profile, output_scale=(scale.double(),))
        return list(self._runs(profile))

    def _runs(self, profile: Profile) -> Iterator[SeenLogits]:
        for args, kwargs in self.calls:
            seen = SeenLogits()
            # Some layers write into dictionaries that they are given; this makes new ones.
            args, kwargs = tree_map(with_own_cache, (args, kwargs))
            with (
                Tempering(self.module, self._layout, [profile]) as handle,
                torch.random.fork_rng(devices=[]),
            ):
                torch.manual_seed(0)
                handle.states()[0].observer = _Observer(seen)
                with _ProductsWatched(seen):
                    output = self.module(*args, **kwargs)
            seen.outputs = [
                item
                for item in tree_flatten(output)[0]
                if isinstance(item, Tensor) and item.is_floating_point()
            ]
            yield seen


# Noise, as a share of the root mean square: enough to show in float32, too little to change signs.
_NOISE = 0.1
# Outside these sizes, products of parameters vanish or overflow in float32.
_SMALLEST, _LARGEST = 1e-6, 1e6


def _add_noise(parameter: Tensor, generator: torch.Generator) -> None:
    if not parameter.numel() or not parameter.is_floating_point():
        return
    size = float(torch.linalg.vector_norm(parameter, dtype=torch.float64))
    size /= parameter.numel() ** 0.5
    if not _SMALLEST <= size <= _LARGEST:
        parameter.div_(size or 1.0)
        size = 1.0
    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
    parameter.add_(noise, alpha=_NOISE * size)


def _pruning_masks(module: nn.Module) -> list[Tensor]:
    """Of parameters `NAME_orig` that take part as `NAME_orig * NAME_mask`."""
    return [
        mask
        for part in module.modules()
        for name, mask in part._buffers.items()
        if mask is not None and name.removesuffix("_mask") + "_orig" in part._parameters
    ]


def _varied(item: Any, generator: torch.Generator) -> Any:
    """Hidden states [batch, tokens, channels] that are constant, made random; all else as it is."""
    if not isinstance(item, Tensor) or not item.is_floating_point() or item.ndim != 3:
        return item
    if item.shape[-1] < 2 or not bool((item == item.flatten()[0]).all()):
        return item
    return torch.randn(item.shape, generator=generator).to(item)


class _Observer:
    """Keeps what reaches the softmax, with its graph."""

    def __init__(self, seen: SeenLogits) -> None:
        self.seen = seen

    def see_call(
        self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> None:
        self._see(module, query, key, mask, kwargs)

    def see_product(self, layer: AttentionLayer, args: Any, kwargs: dict[str, Any]) -> None:
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
        own = {"scaling": kwargs.get("scale"), "is_causal": causal}
        self._see(None, args[0], args[1], mask, own)

    def see_logits(self, layer: AttentionLayer, logits: Tensor) -> None:
        floor = max(layer.mask_floor, torch.finfo(logits.dtype).min / 2)
        self.seen.logits.append(logits)
        self.seen.visible.append(logits > floor)

    def _see(self, module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: Any) -> None:
        self.seen.queries.append(query)
        self.seen.keys.append(key)
        self.seen.sinks = module is not None and has_sinks(module, kwargs)
        logits = torch.cat(list(sliced_logits(module, query, key, mask, kwargs)), 2)
        self.seen.logits.append(logits)
        self.seen.visible.append(logits.isfinite())


class _ProductsWatched(TorchFunctionMode):
    """Keeps the operands of batched products (queries and keys, where a model multiplies them
    itself) and what is ranked.
    """

    _TWO = (
        torch.matmul,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.bmm,
        torch.Tensor.__matmul__,
    )
    _ADDED = (torch.baddbmm, torch.Tensor.baddbmm)
    _RANKED = tuple(
        getattr(place, name)
        for place in (torch, torch.Tensor)
        for name in ("topk", "sort", "argsort", "argmax")
    )

    def __init__(self, seen: SeenLogits) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._RANKED and args and args[0].is_floating_point():
            self.seen.choices.append(args[0].detach().clone())
        pair: tuple[Any, ...] = ()
        if func in self._TWO:
            pair = args[:2]
        elif func in self._ADDED:
            given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | kwargs
            pair = (given["batch1"], given["batch2"])
        elif func is torch.einsum and len(args) == 3:
            pair = args[1:]
        # Products after the softmax can't reach the logits, so they do no harm here. What a
        # constant (a table of positions or types) is multiplied with is no key.
        if len(pair) == 2 and all(map(_is_activation, pair)) and pair[0].requires_grad:
            self.seen.queries.append(pair[0])
            self.seen.keys.append(pair[1])
        return func(*args, **kwargs)


def _is_activation(item: Any) -> bool:
    return (
        isinstance(item, Tensor)
        and item.ndim >= 3
        and not isinstance(item, nn.Parameter)
        and not isinstance(item._base, nn.Parameter)
    )
