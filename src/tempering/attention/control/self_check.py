"""The self-check on attach: does the model in hand obey softmax(l / T), exactly?

Two short forwards. The first finds the layers and tries every attention call that it makes
(`examining/`); it is the one that gives the layout, so it is seldom run for the check alone. The
second runs under a real handle, as a step of decoding where the model keeps a cache, and tries
every call again. What must hold:

- T = 1 reproduces the original, bit for bit;
- every layer of the layout is reached by its temperature;
- random temperatures per head, in one row of the batch, agree with the reference;
- the output moves.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, cast

import torch
from torch import nn

from tempering.attention.control.handle import Tempering
from tempering.attention.examining.interface_trial import (
    Findings,
    random_temperatures,
    row_temperatures,
)
from tempering.attention.examining.layout_of import Description, examined
from tempering.attention.examining.sample import sample_inputs
from tempering.attention.examining.softmax_trial import SoftmaxTrial
from tempering.attention.examining.stored import input_device
from tempering.attention.examining.watch import Observation, observe, rows_of
from tempering.attention.hooks.ownership import untempered
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import CheckError, TemperingError

__all__ = ["ensure_checked", "random_temperatures", "self_check", "verdict_key"]

# The keys of models that passed (`verdict_key`): a model with the same key passes too.
_PASSED: set[tuple[Any, ...]] = set()


def verdict_key(model: nn.Module, known: Description | None = None) -> tuple[Any, ...] | None:
    """What a verdict holds for: class, code, configuration, implementation, dtype and device.

    None for a model whose own instances have code of their own: its verdict is its alone.
    """
    known = known or examined(model)
    instances_code = [item() for item in known.own_code]
    if known.structure.patches or not all(isinstance(f, FunctionType) for f in instances_code):
        return None
    weights = next(model.parameters(), torch.empty(0))
    computes = (weights.dtype, input_device(model).type)
    return (type(model), known.structure.stated, *computes, known.code, known.own_code)


def ensure_checked(model: nn.Module, known: Description, sample: dict[str, Any] | None) -> None:
    """Run the self-check unless this model, or one of its kind, has passed it in this process."""
    if known.passed:
        return
    key = verdict_key(model, known)
    if key is None or key not in _PASSED:
        self_check(model, sample, known)
    else:
        _raise(known.observation.findings)
        known.observation.memory = None
    if key is not None:
        _PASSED.add(key)
    known.passed = True


def self_check(
    model: nn.Module, sample: dict[str, Any] | None = None, known: Description | None = None
) -> Findings:
    """What the reference made of the model's calls, over both forwards.

    Raises CheckError that names the first layer that disagrees.
    """
    known = known or examined(model, sample)
    sample = known.sample if sample is None else sample
    model_layout, first = known.layout, known.observation
    _raise(first.findings)
    second = _second(model, model_layout, first, sample)
    first.memory = None
    _raise(second.findings)
    moved = max(first.findings.moved, second.findings.moved)
    if moved < 16 * torch.finfo(torch.float32).eps:
        raise CheckError(
            f"random temperatures did not move the attention of {type(model).__name__} "
            f"(largest relative change {moved:.2g}), so nothing is proven about it"
        )
    return Findings(
        share=max(first.findings.share, second.findings.share),
        moved=moved,
        spread=max(first.findings.spread, second.findings.spread),
        calls={
            name: sum(item.findings.calls.get(name, 0) for item in (first, second))
            for name in model_layout.names
        },
    )


def _raise(findings: Findings) -> None:
    if findings.disagreement is not None:
        raise CheckError(f"{findings.disagreement}. This model can't be controlled exactly")


def _second(
    model: nn.Module, model_layout: Layout, first: Observation, sample: dict[str, Any] | None
) -> Observation:
    if sample is None and first.memory is not None:
        try:
            return _under_a_handle(model, model_layout, _next_inputs(model, first.memory))
        except TemperingError:
            raise
        except Exception:
            # Some architectures can't be run so. Any other fault shows again in what follows.
            first.memory = None
    return _under_a_handle(
        model, model_layout, sample if sample is not None else sample_inputs(model)
    )


def _under_a_handle(model: nn.Module, model_layout: Layout, inputs: dict[str, Any]) -> Observation:
    batch, findings = rows_of(inputs), Findings()
    neutral = [Profile.neutral(model_layout)]
    with untempered(), Tempering(model, model_layout, neutral, private=True) as handle:
        handle.set_rows(
            [
                row_temperatures(layer, batch if layer.of_rows else 1)
                for layer in model_layout.layers
            ]
        )
        states = handle.states()
        before = handle.calls()
        for state in states:
            state.trial = SoftmaxTrial(findings)
        try:
            observation = observe(model, inputs, findings=findings)
        finally:
            for state in states:
                state.trial = None
        after = handle.calls()
    for layer in model_layout.layers:
        reached = after[layer.name] - before[layer.name]
        called = observation.own_calls[layer.name]
        if reached == 0 or reached < called:
            times = f" in {called - reached} of {called} softmaxes" if reached else ""
            raise CheckError(
                f"{layer.name} was not reached by its temperature{times} (route: {layer.route}). "
                "This model can't be controlled exactly"
            )
    return observation


def _next_inputs(model: nn.Module, memory: Any) -> dict[str, Any]:
    """What decoding gives the model after the first forward: one token and the cache."""
    inputs, subject = sample_inputs(model), cast(Any, model)
    if subject.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, -1:]
        return {**inputs, "past_key_values": memory}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids = torch.cat([ids, ids[:, -1:]], dim=1)
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return subject.prepare_inputs_for_generation(
        ids, next_sequence_length=1, past_key_values=memory, attention_mask=mask
    )
