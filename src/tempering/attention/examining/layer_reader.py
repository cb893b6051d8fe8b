"""Attention layers, read off the calls of softmax and attention functions that a model makes.

Attention is told from other softmaxes (routers, indexers, pooling) by its masking: a sample of text
is padded, so attention over its tokens has masked logits, and on an axis of its own as many heads
as the module or the configuration states. Over other keys (of images, of sound, latents), which
need no padding, a module whose class is named for attention is taken at its name. Models of
diffusers mask little and put frames among their rows; there, attention is what a module named for
it computes (`denoisers.py`). A module that
attends in a way that is not read so is noted with the reason, and refused by name
(`refuse_unread`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention import axes, denoisers
from tempering.attention.examining.masking import (
    MASKED,
    logits_floor,
    mask_floor,
    masking_value,
    soft_mask,
)
from tempering.attention.examining.module_stack import ModuleStack
from tempering.attention.examining.own_law import own_law
from tempering.attention.examining.shape_readings import ShapeReadings
from tempering.attention.examining.towers import tower_of
from tempering.attention.hooks import interface_route
from tempering.attention.hooks.site import state_of
from tempering.attention.layout import AttentionLayer, Stack, attends, named_for_attention
from tempering.attention.visibility import is_causal
from tempering.errors import ArchitectureError


class LayerReader:
    """The attention layers that one forward pass has shown so far.

    batch: rows of the sample; rows_told: whether they can be told from frames. padded: numbers of
    tokens of which attention has some to mask. read: the layers by name. masks: whether a layer's
    own softmaxes mask keys. others: for each module, (number of axes, whether over the last) of its
    softmaxes that are no attention. unmasked: modules with softmaxes in the shape of attention that
    should mask and don't, and the shape. unread: modules that attend in a way that was not read,
    and how. own_calls: how many softmaxes in the shape of its attention a tempered module called
    itself. unused: modules whose own softmaxes change nothing, so that they are passed over.
    by_interface, by_softmax: modules that attended so, read or not.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: ModuleStack,
        batch: int,
        padded: set[int],
        rows_told: bool = True,
        unused: Collection[str] = (),
    ) -> None:
        self.model: Any = model
        self.modules = modules
        self.batch, self.rows_told = batch, rows_told
        self.padded = padded
        self.shapes = ShapeReadings(model, batch)
        self.of_diffusers = self.shapes.of_diffusers
        self.read: dict[str, AttentionLayer] = {}
        self.masks: dict[str, bool] = {}
        self.others: dict[str, set[tuple[int, bool]]] = {}
        self.unmasked: dict[str, torch.Size] = {}
        self.unread: dict[str, str] = {}
        self.own_calls: Counter[str] = Counter()
        self.unused = unused
        self.by_interface: set[str] = set()
        self.by_softmax: set[str] = set()
        # Of functions that are known, and that are being computed: the interface's, PyTorch's.
        self.interface_calls = 0
        self.announced = 0

    def layers(self) -> list[AttentionLayer]:
        """The layers in the order of their first call."""
        return [
            replace(layer, other_softmaxes=tuple(sorted(self.others.get(layer.name, ()))))
            for layer in self.read.values()
        ]

    def refuse_unread(self) -> None:
        """ArchitectureError that names a module which attends, and was not read as a layer."""
        if self.of_diffusers:
            self._note_processors()
        for name, how in self.unread.items():
            kind = type(self.model.get_submodule(name)).__name__
            raise ArchitectureError(
                f"{name} ({kind}) {how}, so its temperature can't be controlled exactly"
            )

    def _note_processors(self) -> None:
        """Note the processors that ran and called no softmax, unless they are known to have none.

        They may run kernels from elsewhere, which are operators under any name.
        """
        for name, module in self.model.named_modules():
            processor = denoisers.processor_of(module)
            if processor is None or denoisers.is_linear(processor) or state_of(module) is not None:
                continue
            if name in self.modules.reached and name not in self.read:
                self.unread.setdefault(
                    name,
                    f"attends by {type(processor).__name__}, which calls no softmax that can be "
                    "reached (sliced attention, or a fused kernel?); set another processor, "
                    "model.set_attn_processor(...)",
                )

    @contextlib.contextmanager
    def inside_interface(self) -> Iterator[None]:
        """What is called inside belongs to a call of the attention interface."""
        self.interface_calls += 1
        try:
            yield
        finally:
            self.interface_calls -= 1

    @contextlib.contextmanager
    def announce(self) -> Iterator[None]:
        """What PyTorch computes inside belongs to a function whose call was seen."""
        self.announced += 1
        try:
            yield
        finally:
            self.announced -= 1

    # -- calls of the attention interface

    def interface(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> AttentionLayer:
        """The layer that a call of the attention interface belongs to."""
        name = self.modules.name_of(module)
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
        self.by_interface.add(name)
        features = {
            argument
            for argument in interface_route.LOGIT_ARGUMENTS
            if kwargs.get(argument) is not None
        }
        if "s_aux" in features or interface_route.has_own_sinks(module):
            features.add("sinks")
        layer = AttentionLayer(
            name=name,
            stack=self._stack_of(name, query.shape[2], key.shape[2], is_causal(module, kwargs)),
            index=0,
            heads=query.shape[1],
            kv_heads=key.shape[1],
            mask_floor=mask_floor(mask),
            features=tuple(sorted(features - {"s_aux"})),
            keys=key.shape[2],
            law=own_law(module),
            of_rows=query.shape[0] == self.batch,
            soft_mask=soft_mask(self.modules.arguments_of(module)),
        )
        known = self.read.setdefault(name, layer)
        if known.of_rows and not layer.of_rows:
            known = self.read[name] = replace(known, of_rows=False)
        return known

    def _stack_of(self, name: str, queries: int, keys: int, causal: bool) -> Stack:
        if name in self.read:
            return self.read[name].stack
        if self.of_diffusers:
            # What a module says of itself; text may happen to be as long as the image.
            stated = getattr(self.modules.caller(), "is_cross_attention", None)
            crosses = queries != keys if stated is None else stated
            return "cross" if crosses else "encoder"
        if not self.model.config.is_encoder_decoder:
            decodes = self.model.can_generate() and tower_of(self.model, name) in ("", "text")
            return "decoder" if causal or decodes else "encoder"
        decoder = self.model.get_decoder()
        if decoder is None or not self.modules.is_inside(decoder):
            return "encoder"
        # The sample's target is shorter than its source: keys of the source are more.
        return "decoder" if queries == keys else "cross"

    # -- softmaxes that models call themselves

    def softmax(self, logits: Tensor, dim: Any) -> AttentionLayer | None:
        """The layer that a softmax outside the interface belongs to, if it is attention.

        None too where the module has a temperature, whose own trial sees the call.
        """
        return self._call(logits.shape, dim, logits) if isinstance(logits, Tensor) else None

    def product(self, query: Tensor, key: Tensor, mask: Any) -> AttentionLayer | None:
        """The layer that a scaled dot product attention outside the interface belongs to."""
        if query.ndim != 4:
            if self.modules.running and not self.interface_calls:
                self.unread[self.modules.name_of(self.modules.caller()) or ""] = (
                    f"has queries of shape {list(query.shape)} in scaled_dot_product_attention, "
                    "which are not [batch, heads, tokens, head_dim]"
                )
            return None
        layer = self._call(torch.Size([*query.shape[:3], key.shape[2]]), -1)
        if layer is not None:
            floor = max(mask_floor(mask), self._least_floor)
            layer = self.read[layer.name] = replace(layer, mask_floor=floor, masking=None)
        return layer

    @property
    def _least_floor(self) -> float:
        # The masks of diffusers are such numbers, and its sample may mask nothing.
        return MASKED if self.of_diffusers else -torch.inf

    def _call(
        self, shape: torch.Size, dim: Any, logits: Tensor | None = None
    ) -> AttentionLayer | None:
        """`softmax` of logits, or of a scaled dot product attention, which keeps its logits inside.

        The latter is read as masked: it attends, and its causality may be inside as well.
        """
        if self.interface_calls or not self.modules.running:
            return None
        module = self.modules.caller()
        over_last = dim in (-1, len(shape) - 1)
        state = state_of(module)
        if state is not None:
            layer = state.layer
            if layer.route == "softmax" and over_last:
                fits = any(axes.fits(item, shape, layer.heads) for item in layer.axes)
                self.own_calls[layer.name] += fits
            return None
        name = self.modules.name_of(module) or ""
        if name in self.unused:
            return None
        certain = self.of_diffusers and (logits is None or named_for_attention(module))
        readings = (
            self.shapes.certain(module, shape) if certain else self.shapes.likely(module, shape)
        )
        if not readings and not self.of_diffusers and attends(module):
            readings = self.shapes.of_any_rows(module, shape)
        masked = certain or logits is None or bool((logits <= MASKED).any())
        if certain and not (over_last and readings):
            self._note_unread(name, shape)
            return None
        may_mask = shape[-1] in self.padded or not attends(module)
        should_mask = self.masks.get(name, may_mask)
        if not over_last or not readings or masked < should_mask:
            self._note_other(module, name, shape, over_last, bool(readings), masked)
            return None
        if len(readings) > 1:
            raise ArchitectureError(
                f"{name}: logits of shape {list(shape)} can be read as "
                f"{' and '.join(pattern for pattern, _ in readings)}; its heads can't be told apart"
            )
        if masked and not self.masks.setdefault(name, True):
            self.unmasked[name] = shape  # another softmax of the same module masks nothing
        self.masks.setdefault(name, masked)
        self.by_softmax.add(name)
        layer = self.read[name] = self._layer(module, name, shape, logits, *readings[0])
        return layer

    def _note_other(
        self,
        module: nn.Module,
        name: str,
        shape: torch.Size,
        over_last: bool,
        readable: bool,
        masked: bool,
    ) -> None:
        """Note a softmax that is not read as attention, though it may be."""
        square = len(shape) > 1 and shape[-1] == shape[-2] > 1
        if over_last and readable and (name in self.read or attends(module)):
            self.unmasked[name] = shape
        elif over_last and not readable and attends(module) and (masked or square):
            self._note_unread(name, shape)
        self.others.setdefault(name, set()).add((len(shape), over_last))

    def _note_unread(self, name: str, shape: torch.Size) -> None:
        self.by_softmax.add(name)
        self.unread.setdefault(
            name,
            f"calls softmax over {list(shape)}, whose {self.batch} rows and heads can't be told "
            "apart (attention in windows?)",
        )

    def _layer(
        self,
        module: nn.Module,
        name: str,
        shape: torch.Size,
        logits: Tensor | None,
        pattern: str,
        heads: int,
    ) -> AttentionLayer:
        """The layer as known before, with what this call adds to it."""
        layer = self.read.get(name)
        masking = None if logits is None else masking_value(logits)
        if layer is not None and layer.route == "interface":
            raise ArchitectureError(
                f"{name} calls both the attention interface and a softmax of its own"
            )
        if layer is None:
            queries = shape[1 if pattern == axes.WINDOWS else -2]
            layer = AttentionLayer(
                name=name,
                stack=self._stack_of(name, queries, shape[-1], is_causal(module, {})),
                index=0,
                heads=heads,
                kv_heads=heads,
                route="softmax",
                axes=(pattern,),
                masking=masking,
                soft_mask=soft_mask(self.modules.arguments_of(module)),
            )
            if logits is not None:
                floor = logits_floor(name, axes.standard(logits, pattern, heads))
                layer = replace(layer, mask_floor=max(floor, self._least_floor))
        elif heads != layer.heads:
            raise ArchitectureError(f"{name} has softmaxes of {layer.heads} and of {heads} heads")
        elif pattern not in layer.axes:
            layer = replace(layer, axes=(*layer.axes, pattern))
        if layer.masking != masking:
            layer = replace(layer, masking=None)
        of_rows = axes.rows(pattern, shape, heads) == self.batch and self.rows_told
        return replace(layer, keys=max(layer.keys, shape[-1]), of_rows=layer.of_rows and of_rows)

    # -- attention that no known function computes

    def operator(self, name: str, logits: Any, dim: Any) -> None:
        """Note an operator that attends, or may, if no function that is known called it."""
        if self._accounted_for():
            return
        module = self.modules.caller()
        if isinstance(logits, Tensor) and not named_for_attention(module):
            # A softmax of some other kind, unless it looks like attention all the same.
            readings = self.shapes.likely(module, logits.shape)
            over_last = dim in (-1, logits.ndim - 1)
            if not (over_last and readings and bool((logits <= MASKED).any())):
                return
        self.unread.setdefault(
            self.modules.name_of(module) or "",
            f"attends by {name}, out of reach of a temperature (a softmax by hand, or of "
            "compiled, scripted or fused code; call torch.nn.functional.softmax)",
        )

    def exponential(self, logits: Tensor) -> None:
        """Note an exponential of masked logits in attention: it is a softmax by hand.

        In a model of diffusers, which masks little, any in the shape of logits counts as one.
        """
        if self._accounted_for():
            return
        module = self.modules.caller()
        if not named_for_attention(module):
            return
        if self.of_diffusers:
            by_hand = logits.ndim > 2
        else:
            by_hand = bool((logits <= MASKED).any() and self.shapes.likely(module, logits.shape))
        if by_hand:
            self.operator("exp", None, None)

    def _accounted_for(self) -> bool:
        """Whether what is computed belongs to a known function, or to no module at all."""
        return bool(self.interface_calls or self.announced or not self.modules.running)
