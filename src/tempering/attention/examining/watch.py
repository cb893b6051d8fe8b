"""Run a model on a few tokens and watch its softmaxes: which layers have one, in what shape.

Attention is told from other softmaxes (routers, indexers, pooling) by its masking: the sample
is padded, so attention over keys has masked logits, and on an axis of its own as many heads as
the module or the configuration states. Every attention call is also tried against a reference
while it is at hand (`trial.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tempering.attention import axes
from tempering.attention.examining.interface_trial import Trial, try_interface
from tempering.attention.examining.sample import fails_on_sample, run, sample_inputs
from tempering.attention.examining.softmax_trial import SoftmaxTrial
from tempering.attention.hooks import interface_patch, interface_route, softmax_route
from tempering.attention.hooks.state import STATE
from tempering.attention.layout import AttentionLayer, attends
from tempering.errors import ArchitectureError, TemperingError

__all__ = ["Observation", "observe", "run", "sample_inputs"]

# A finite masking constant is below this.
_MASKED = -5e3
_HEAD_FIELDS = (
    "num_attention_heads",
    "num_heads",
    "n_heads",
    "n_head",
    "num_attn_heads",
    "heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)


@dataclass
class Observation:
    """What one forward pass showed.

    layers: in the order of their first call. trial: what the reference made of each call.
    memory: the model's cache, if it keeps one.
    softmaxes: how many softmaxes in the shape of its attention a tempered module called itself.
    """

    layers: list[AttentionLayer] = field(default_factory=list)
    trial: Trial = field(default_factory=Trial)
    memory: Any = None
    softmaxes: Counter[str] = field(default_factory=Counter)


def observe(
    model: nn.Module,
    sample: dict[str, Any] | None = None,
    cache: bool = True,
    trial: Trial | None = None,
) -> Observation:
    """Watch one forward pass, and try every attention call that it makes."""
    _refuse_known(model)
    inputs = sample if sample is not None else sample_inputs(model)
    watcher = _Watcher(model, inputs, trial or Trial())
    try:
        observation = watcher.watch(cache)
    except TemperingError:
        raise
    except Exception as error:
        if not cache:
            raise ArchitectureError(fails_on_sample(model, sample, error)) from error
        # A few architectures can't make a cache; what fails for another reason fails again.
        return observe(model, sample, cache=False, trial=trial)
    if watcher.unmasked and trial is None:
        if cache:
            # A few mask what comes later only where they keep no cache.
            return observe(model, sample, cache=False)
        name, shape = next(iter(watcher.unmasked.items()))
        raise ArchitectureError(
            f"{name} calls softmax over the last axis of {list(shape)}, like attention, but masks "
            "nothing there, so it can't be told whether it attends to keys"
        )
    return observation


def _refuse_known(model: nn.Module) -> None:
    """Architectures that a short forward pass would misjudge, or change."""
    for name, module in model.named_modules():
        if "BlockSparseAttention" in type(module).__name__:
            raise ArchitectureError(
                f"{name} ({type(module).__name__}) attends to blocks of long inputs and replaces "
                "itself on short ones; load the model with attention_type='original_full'"
            )


class _Watcher:
    def __init__(self, model: nn.Module, inputs: dict[str, Any], trial: Trial) -> None:
        self.model = model
        self.inputs = inputs
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self.inside: list[nn.Module] = []
        self.found: dict[str, AttentionLayer] = {}
        self.others: dict[str, set[tuple[int, bool]]] = {}
        # Modules with softmaxes in the shape of attention that mask nothing -> the shape.
        self.unmasked: dict[str, torch.Size] = {}
        self.softmaxes: Counter[str] = Counter()
        self.trial = trial
        named = (inputs.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
        given = [*named, *inputs.values()]
        self.batch = next(item.shape[0] for item in given if isinstance(item, Tensor))

    def watch(self, cache: bool) -> Observation:
        handles = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with interface_patch.watched(self._watched), _Functions(self):
                result = run(self.model, self.inputs, cache)
        finally:
            for handle in handles:
                handle.remove()
        layers = [
            replace(layer, other_softmaxes=tuple(sorted(self.others.get(layer.name, ()))))
            for layer in self.found.values()
        ]
        memory = getattr(result, "past_key_values", None)
        return Observation(layers, self.trial, memory, self.softmaxes)

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        self.stack.append(module)

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self.stack and self.stack[-1] is module:
            self.stack.pop()

    # -- calls of the attention interface

    def _watched(
        self, function: Callable[..., Any], eager: Callable[..., Any]
    ) -> Callable[..., Any]:
        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            **kwargs: Any,
        ) -> Any:
            arguments = (query, key, value, attention_mask)
            layer = self._record(module, *arguments, kwargs, function)
            self.inside.append(module)
            try:
                output = function(module, *arguments, **kwargs)
                try_interface(self.trial, layer, function, eager, module, arguments, kwargs)
            finally:
                self.inside.pop()
            return output

        return attention

    def _record(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
        function: Callable[..., Any],
    ) -> AttentionLayer:
        name = self.names.get(id(module))
        if name is None:
            raise ArchitectureError(
                f"{type(module).__name__} calls attention but is no module of "
                f"{type(self.model).__name__}"
            )
        if query.ndim != 4 or key.ndim != 4:
            raise ArchitectureError(
                f"{name}: queries of shape {tuple(query.shape)} are not "
                "[batch, heads, tokens, head_dim]; its heads can't be told apart"
            )
        if query.shape[0] != self.batch:
            raise ArchitectureError(
                f"{name}: {query.shape[0]} rows of queries for a batch of {self.batch}; "
                "its rows can't be told apart"
            )
        features = {
            item for item in interface_route.LOGIT_ARGUMENTS if kwargs.get(item) is not None
        }
        if "s_aux" in features or interface_route.has_own_sinks(module):
            features.add("sinks")
        layer = AttentionLayer(
            name=name,
            stack=self._stack_of(module, name, query.shape[2], key.shape[2], kwargs),
            index=0,
            heads=query.shape[1],
            kv_heads=key.shape[1],
            mask_floor=_mask_floor(mask),
            features=tuple(sorted(features - {"s_aux"})),
        )
        return self.found.setdefault(name, layer)

    def _stack_of(
        self, module: nn.Module, name: str, queries: int, keys: int, kwargs: dict[str, Any]
    ) -> str:
        if name in self.found:
            return self.found[name].stack
        model: Any = self.model
        if not model.config.is_encoder_decoder:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            return "decoder" if causal or model.can_generate() else "encoder"
        decoder = model.get_decoder()
        if decoder is None or not any(item is decoder for item in self.stack):
            return "encoder"
        # The probe's target is shorter than its source, so keys of the source tell.
        return "decoder" if queries == keys else "cross"

    # -- softmaxes that models call themselves

    def own_softmax(self, logits: Tensor, dim: Any) -> AttentionLayer | None:
        """The layer that a softmax outside the interface belongs to, if it is attention.

        None as well where the module has a temperature: that one's own trial is told instead.
        """
        if self.inside or not self.stack or not isinstance(logits, Tensor):
            return None
        owner = next(
            (m for m in reversed(self.stack) if not isinstance(m, nn.Softmax)), self.stack[-1]
        )
        last = dim in (-1, logits.ndim - 1)
        state = getattr(owner, STATE, None)
        if state is not None:
            own = state.layer
            if own.route == "softmax" and last:
                fit = any(axes.fits(pattern, logits.shape, own.heads) for pattern in own.axes)
                self.softmaxes[own.name] += fit
            return None
        name = self.names.get(id(owner), "")
        readings = axes.candidates(logits.shape, self.batch, self._head_counts(owner))
        if not last or not readings or not bool((logits <= _MASKED).any()):
            if last and readings and (name in self.found or attends(owner)):
                self.unmasked[name] = logits.shape
            self.others.setdefault(name, set()).add((logits.ndim, last))
            return None
        if len(readings) > 1:
            raise ArchitectureError(
                f"{name}: logits of shape {list(logits.shape)} can be read as "
                f"{' and '.join(pattern for pattern, _ in readings)}; its heads can't be told apart"
            )
        pattern, heads = readings[0]
        known = self.found.get(name)
        if known is not None and known.route == "interface":
            raise ArchitectureError(
                f"{name} calls both the attention interface and a softmax of its own"
            )
        if known is None:
            known = AttentionLayer(
                name=name,
                stack=self._stack_of(owner, name, *self._lengths(logits, pattern), {}),
                index=0,
                heads=heads,
                kv_heads=heads,
                route="softmax",
                axes=(pattern,),
                mask_floor=_logits_floor(name, axes.standard(logits, pattern, heads)),
                masking=_masking(logits),
            )
        elif heads != known.heads:
            raise ArchitectureError(f"{name} has softmaxes of {known.heads} and of {heads} heads")
        elif pattern not in known.axes:
            known = replace(known, axes=(*known.axes, pattern))
        if known.masking != _masking(logits):
            known = replace(known, masking=None)
        self.found[name] = known
        return known

    def _lengths(self, logits: Tensor, pattern: str) -> tuple[int, int]:
        return (logits.shape[1 if pattern == axes.WINDOWS else -2], logits.shape[-1])

    def _head_counts(self, owner: nn.Module) -> set[int]:
        own = {getattr(owner, name, None) for name in _HEAD_FIELDS}
        counts = {item for item in own if type(item) is int and item > 0}
        if not counts:
            config: Any = self.model.config
            stated = {getattr(config.get_text_config(), name, None) for name in _HEAD_FIELDS}
            counts = {item for item in stated if type(item) is int and item > 0}
        return counts


def _mask_floor(mask: Any) -> float:
    """Half the model's own masking constant (some use -1e4 or -1e9 rather than the minimum)."""
    natural = float(torch.finfo(torch.float32).min) / 2
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return natural
    masked = mask[(mask <= _MASKED) & (mask > -torch.inf)]
    return max(natural, masked.max().item() / 2) if masked.numel() else natural


def _logits_floor(name: str, logits: Tensor) -> float:
    """The same from finished logits [batch, heads, queries, keys]: masking is common to heads."""
    low = logits <= _MASKED
    masked = low.all(dim=1, keepdim=True).expand_as(logits)
    floor = _mask_floor(logits[masked])
    if bool((low & ~masked & (logits <= floor)).any()):
        raise ArchitectureError(
            f"{name} has logits down to {logits[low & ~masked].min().item():.3g}, as low as its "
            f"masking (above {2 * floor:.3g}), so the two can't be told apart"
        )
    return floor


def _masking(logits: Tensor) -> float | None:
    values = logits[logits <= _MASKED].unique().tolist()
    lowest = (-torch.inf, torch.finfo(logits.dtype).min)
    return values[0] if len(values) == 1 and values[0] in lowest else None


class _Functions(TorchFunctionMode):
    """Shows a watcher the softmax and scaled dot product calls outside the interface."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        watcher = self.watcher
        if func in softmax_route.SOFTMAXES and args:
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            layer = watcher.own_softmax(args[0], dim)
            if layer is not None:
                SoftmaxTrial(watcher.trial).try_softmax(layer, args[0], dim)
        elif func in softmax_route.PRODUCTS and len(args) > 1 and not watcher.inside:
            query, key = args[0], args[1]
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if query.ndim == 4:
                shown = query.new_full((*query.shape[:3], key.shape[2]), -torch.inf)
                layer = watcher.own_softmax(shown, -1)
                if layer is not None:
                    layer = replace(layer, mask_floor=_mask_floor(mask), masking=None)
                    watcher.found[layer.name] = layer
                    SoftmaxTrial(watcher.trial).try_product(layer, args, kwargs)
        return func(*args, **kwargs)
