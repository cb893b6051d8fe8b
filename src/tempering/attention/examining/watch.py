"""Run a model on a few tokens and watch its softmaxes: which layers have one, in what shape.

`layer_reader.py` reads layers off the calls. Every attention call is also tried against a
reference while it is at hand (`interface_trial.py`, `softmax_trial.py`). A module that attends
and was not read as a layer is refused by name: none that ran is left alone silently.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tempering.attention import denoisers
from tempering.attention.examining.interface_trial import Findings, try_interface
from tempering.attention.examining.layer_reader import LayerReader
from tempering.attention.examining.module_stack import ModuleStack
from tempering.attention.examining.sample import fails_on_sample, run, sample_inputs
from tempering.attention.examining.softmax_calls import Functions, Operators
from tempering.attention.examining.unused import results_unused
from tempering.attention.hooks import interface_patch
from tempering.attention.layout import AttentionLayer
from tempering.errors import ArchitectureError, TemperingError


@dataclass
class Observation:
    """What one forward pass showed.

    layers: in the order of their first call. findings: what the reference made of each call.
    memory: the model's cache, if it keeps one.
    own_calls: how many softmaxes in the shape of its attention a tempered module called itself.
    reached: names of the modules that ran.
    """

    layers: list[AttentionLayer] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    memory: Any = None
    own_calls: Counter[str] = field(default_factory=Counter)
    reached: frozenset[str] = frozenset()


def observe(
    model: nn.Module,
    sample: dict[str, Any] | None = None,
    cache: bool = True,
    findings: Findings | None = None,
    unused: Collection[str] = (),
) -> Observation:
    """Watch one forward pass, and try every attention call that it makes.

    findings: of a tempered model, where its own trials note theirs. unused: modules whose own
    softmaxes are known to change nothing.
    """
    _refuse_known(model)
    inputs = sample if sample is not None else sample_inputs(model)
    modules = ModuleStack(model)
    told = not denoisers.of_diffusers(model) or denoisers.rows_are_told(inputs)
    reader = LayerReader(model, modules, rows_of(inputs), _padded(inputs), told, unused)
    kept = findings or Findings()
    try:
        memory = _run_watched(model, inputs, cache, modules, reader, kept)
    except TemperingError:
        raise
    except Exception as error:
        if not cache:
            raise ArchitectureError(fails_on_sample(model, sample, error)) from error
        # A few architectures can't make a cache; a model that fails otherwise fails again.
        return observe(model, sample, cache=False, findings=findings)
    if reader.unmasked and findings is None:
        if cache:
            # A few architectures mask later tokens only where they keep no cache.
            return observe(model, sample, cache=False)
        name, shape = next(iter(reader.unmasked.items()))
        raise ArchitectureError(
            f"{name} calls softmax over the last axis of {list(shape)}, like attention, but masks "
            "nothing there, so it can't be told whether it attends to keys"
        )
    twofold = reader.by_interface & reader.by_softmax
    if twofold and results_unused(model, inputs, cache, twofold):
        return observe(model, sample, cache, findings, twofold)
    reader.refuse_unread()
    return Observation(reader.layers(), kept, memory, reader.own_calls, frozenset(modules.reached))


def _refuse_known(model: nn.Module) -> None:
    """Architectures that a short forward pass would misjudge, or change."""
    for name, module in model.named_modules():
        if "BlockSparseAttention" in type(module).__name__:
            raise ArchitectureError(
                f"{name} ({type(module).__name__}) attends to blocks of long inputs and replaces "
                "itself on short ones; load the model with attention_type='original_full'"
            )


def rows_of(inputs: dict[str, Any]) -> int:
    """Rows of the batch, by the inputs that are sure to have one entry a row, or else any."""
    named = (inputs.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
    found = (item.shape[0] for item in named if isinstance(item, Tensor))
    rows = next(found, None) or denoisers.rows_of(inputs)
    others = (item.shape[0] for item in inputs.values() if isinstance(item, Tensor) and item.ndim)
    return rows or next(others)


def _padded(inputs: dict[str, Any]) -> set[int]:
    """How many tokens inputs hold, where they are text alone and some of it is padding."""
    tensors = {name: item for name, item in inputs.items() if isinstance(item, Tensor)}
    mask = tensors.pop("attention_mask", None)
    if mask is None or bool(mask.all()):
        return set()
    if any(item.is_floating_point() for item in tensors.values()):
        return set()
    targets = tensors.get("decoder_input_ids")
    return {mask.shape[-1]} if targets is None else {mask.shape[-1], targets.shape[-1]}


def _run_watched(
    model: nn.Module,
    inputs: dict[str, Any],
    cache: bool,
    modules: ModuleStack,
    reader: LayerReader,
    findings: Findings,
) -> Any:
    """One forward pass whose calls are read and tried; the cache that the model kept, if any."""

    def watched(function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        def attention(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            **kwargs: Any,
        ) -> Any:
            arguments = (query, key, value, attention_mask)
            layer = reader.interface(module, query, key, attention_mask, kwargs)
            with reader.inside_interface():
                output = function(module, *arguments, **kwargs)
                try_interface(findings, layer, function, eager, module, arguments, kwargs)
            return output

        return attention

    with (
        modules.followed(),
        interface_patch.watched(watched),
        Functions(reader, findings),
        Operators(reader),
    ):
        result = run(model, inputs, cache)
    return getattr(result, "past_key_values", None) if _takes_cache(model) else None


def _takes_cache(model: nn.Module) -> bool:
    """Whether a model takes the cache that it gives; a few (T5ForQuestionAnswering) take none.

    A wrapper that names neither passes it on.
    """
    named = inspect.signature(model.forward).parameters
    return "past_key_values" in named or "use_cache" not in named
