"""Every attention call of a forward pass, tried: is it softmax(l / T) V for random T?

A call is repeated on the same arguments and compared with the reference (`reference.py`): once
with random temperatures of the heads in the last row of the batch, and T = 1 in the others; once
with one temperature for all, which reaches the logits through the scaling factor. Since each call
is judged by its own arguments, errors don't add up over depth, and only rounding may differ. What
can run in float64 does, so a model in half precision is judged as sharply as any.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.examining.reference import Arguments, ReferenceCall, widened
from tempering.attention.hooks.forward import module_tempered
from tempering.attention.hooks.interface_route import widened_sinks
from tempering.attention.hooks.ownership import untempered
from tempering.attention.hooks.site import state_of
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.attention.layout import AttentionLayer
from tempering.attention.visibility import is_causal, is_flash

# Disagreement allowed, as a share of what the temperatures changed; exact control leaves 1e-6,
# a bias or a sink left undivided 1e-2 and more (measured by the mutations of the tests).
SHARE = 1e-3
# For kernels that know half precision alone: rounding may do so many times what it does
# untempered, and the untempered output may be off from eager attention's by this share.
FUSED, FUSED_SHARE = 6.0, 0.02
# Attention functions that run in float64 too.
_WIDE = ("eager", "sdpa")
# The one temperature for all heads and rows; any but 1 would do.
UNIFORM = 0.6
# So many queries of a long call are tried, up to twice as many.
_QUERIES = 64
# Instead of 0 as a divisor.
_TINY = 1e-300


def random_temperatures(name: str, heads: int) -> Float[Tensor, "heads"]:
    """Log-uniform in 1/3..3, fixed by the layer's name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.exp((torch.rand(heads, generator=generator) * 2 - 1) * 1.1)


def row_temperatures(layer: AttentionLayer, rows: int) -> Float[Tensor, "rows heads"]:
    """1 in all rows but the last (float64); one row for all where they can't be told apart."""
    if not layer.of_rows:
        return random_temperatures(layer.name, layer.heads).double()[None]
    table = torch.ones(rows, layer.heads, dtype=torch.float64)
    table[-1] = random_temperatures(layer.name, layer.heads).double()
    return table


def in_force(state: TemperatureState, rows: int) -> Float[Tensor, "rows heads"]:
    """The temperatures that all handles of a module give together (float64)."""
    total = torch.ones(1, state.layer.heads, dtype=torch.float64)
    for part in state.parts.values():
        total = total * part.detach().double().cpu()
    return total.expand(rows, -1)


def trial_state(layer: AttentionLayer, like: Tensor) -> TemperatureState:
    """A state at T = 1, of the precision that a model with such tensors gives it."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return TemperatureState(layer, like.device, dtype)


@dataclass(eq=False)
class Findings:
    """What the reference made of the calls so far.

    disagreement: the first one, in words. share: the largest error, as a share of what the
    temperatures changed. moved: the largest relative change that temperatures made.
    spread: the largest standard deviation of a layer's logits: what there is to divide.
    calls: trials of attention calls, by layer.
    """

    disagreement: str | None = None
    share: float = 0.0
    moved: float = 0.0
    spread: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)

    def disagree(self, text: str) -> None:
        """Note a disagreement; the first one stays."""
        if self.disagreement is None:
            self.disagreement = text

    def judge(
        self, layer: AttentionLayer, error: float, effect: float, scale: float, noise: float
    ) -> None:
        """Note a call whose output is off by `error` where temperatures changed it by `effect`."""
        self.calls[layer.name] = self.calls.get(layer.name, 0) + 1
        share = error / max(effect, _TINY)
        if not error <= SHARE * effect + noise:
            self.disagree(
                f"{layer.name} disagrees with the reference: its output is off by {share:.2g} of "
                f"what the temperatures changed (allowed {SHARE:g})"
            )
        if effect > noise:
            self.share = max(self.share, share)
            self.moved = max(self.moved, effect / max(scale, _TINY))


def try_interface(
    findings: Findings,
    layer: AttentionLayer,
    function: Callable[..., Any],
    eager: Callable[..., Any],
    module: nn.Module,
    arguments: Arguments,
    kwargs: dict[str, Any],
) -> None:
    """Try a call of the attention interface; temper the module meanwhile if it is untempered."""
    arguments = _with_fewer_queries(module, arguments, kwargs)
    call = _RepeatedCall(layer, function, module, arguments, kwargs)
    reference = ReferenceCall(eager, module, arguments, kwargs, layer.mask_floor)
    findings.spread = max(findings.spread, reference.spread())
    state = state_of(module)
    if state is not None:
        before = state.calls
        _tempered(findings, call, reference, state)
        state.calls = before
        return
    _untempered(findings, call, reference)
    original = call()
    with module_tempered(module, layer) as temper:
        temper(torch.ones(1, layer.heads, dtype=torch.float64))
        if not torch.equal(call().nan_to_num(), original.nan_to_num()):
            findings.disagree(f"{layer.name}: T = 1 does not reproduce the original bit for bit")
        one = torch.full((1, layer.heads), UNIFORM, dtype=torch.float64)
        for table in (one, row_temperatures(layer, len(original))):
            _tempered(findings, call, reference, temper(table))


def _with_fewer_queries(
    module: nn.Module, arguments: Arguments, kwargs: dict[str, Any]
) -> Arguments:
    """The arguments of a call with some of its queries, where nothing tells one from another.

    The 1500 frames of Whisper's encoder, in float64, would take a minute. Without a mask a query's
    output depends on itself and all keys, so a part of the queries shows whether that is exact.
    """
    query, key, value, mask = arguments
    by_query = any(isinstance(item, Tensor) and item.ndim > 1 for item in kwargs.values())
    if mask is not None or by_query or is_causal(module, kwargs) or is_flash(module):
        return arguments
    step = max(1, query.shape[2] // _QUERIES)
    return query[:, :, ::step], key, value, mask


def _untempered(findings: Findings, call: _RepeatedCall, reference: ReferenceCall) -> None:
    """Is the reference one for this function at all?"""
    plain, name = reference.output(), call.layer.name
    bad = ~plain.isfinite()
    if bool(bad.any()):
        # [batch, queries, heads, values], as the attention interface gives it
        head = int(bad.any(-1).flatten(0, 1).any(0).nonzero()[0]) if plain.ndim == 4 else 0
        findings.disagree(
            f"{name}, head {head}: its attention is not finite on the model as it is; look at "
            "the weights"
        )
        return
    scale = max(reference.norm(plain), _TINY)
    error = reference.norm(reference.eager - plain) / scale
    if not error <= reference.noise:
        findings.disagree(f"{name}: its eager attention is not softmax(l) V (off by {error:.2g})")
    error = reference.norm(call(wide=True) - plain) / scale
    if not error <= (reference.noise if call.widens else FUSED_SHARE):
        findings.disagree(f"{name}: its attention differs from its eager attention by {error:.2g}")


def _tempered(
    findings: Findings, call: _RepeatedCall, reference: ReferenceCall, state: TemperatureState
) -> None:
    plain = reference.output()
    exact = reference.output(in_force(state, len(plain)).to(plain.device))
    effect, scale = reference.norm(exact - plain), reference.norm(exact)
    error = reference.norm(call(wide=True) - exact)
    noise = reference.noise * scale
    if not call.widens:
        with untempered():
            noise = FUSED * reference.norm(call() - plain)
    findings.judge(call.layer, error, effect, scale, noise)


@dataclass
class _RepeatedCall:
    """An attention call that can be repeated, in float64 where the function can."""

    layer: AttentionLayer
    function: Callable[..., Any]
    module: nn.Module
    arguments: Arguments
    kwargs: dict[str, Any]

    @property
    def widens(self) -> bool:
        config: Any = self.module.config
        return config._attn_implementation in _WIDE

    def __call__(self, wide: bool = False) -> Tensor:
        if not (wide and self.widens):
            return self.function(self.module, *self.arguments, **self.kwargs)[0]
        arguments = tuple(widened(item) for item in self.arguments)
        kwargs = {name: widened(item) for name, item in self.kwargs.items()}
        return self.function(widened_sinks(self.module), *arguments, **kwargs)[0]
