"""Patterns beside the untempered model: cost, distance, diversity, controls and budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tempering.attention.examining.layout_of import layout, layout_reached
from tempering.attention.examining.subject import check_of_transformers, unwrapped
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import UNTEMPERED, Profile
from tempering.chunks import token_chunks
from tempering.errors import InputError
from tempering.evaluation.benefit import (
    Benefit,
    check_prompts,
    check_samples,
    cut_prompts,
    measure_benefits,
)
from tempering.evaluation.budget import Budget, largest_amplitude
from tempering.evaluation.cost import Cost, Variant, check_labels, measure_costs
from tempering.evaluation.journal import Journal, Progress
from tempering.inputs.example import as_inputs
from tempering.schedules import Schedule, as_schedule, controls
from tempering.text_tables import TextTable

SAMPLING_CONTROLS = (0.8, 0.9, 1.1, 1.2)
_SHUFFLES = (0, 1, 2)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison. Costs and benefits are in the order of `variants`.

    complete: False after Ctrl-C; then the numbers rest on the chunks and prompts that were
        finished.
    """

    variants: tuple[Variant, ...]
    costs: tuple[Cost, ...]
    benefits: tuple[Benefit, ...] = ()
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    chunks: int = 0
    chunk_length: int = 0
    seed: int = 0
    complete: bool = True

    def cost(self, label: str) -> Cost:
        """The cost of one variant by its label."""
        return next(item for item in self.costs if item.label == label)


def compare(
    model: nn.Module,
    tokenizer: Any,
    text: Any,
    patterns: Sequence[str | Schedule | tuple[str, Profile]],
    *,
    chunk: int = 512,
    limit: int | None = None,
    with_controls: bool = False,
    budget: float | None = None,
    samples: int = 0,
    prompts: int = 4,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    seed: int = 0,
    stack: str | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure what patterns cost on a text and, with `samples`, what they buy.

    Parameters
    ----------
    model, tokenizer: of transformers. text: at least one chunk of tokens; or token ids in chunks,
        or what the model's processor gives (`tempering.inputs.as_inputs`): these need no tokenizer
        (None).
    patterns: schedules read as relative temperatures over depth, or (label, Profile).
    chunk, limit: tokens in a chunk, chunks at most.
    with_controls: also run each schedule's controls (uniform at its geometric mean, reversed,
        upside down, shuffled), and with `samples` plain sampling temperatures.
    budget: nats per token; adds each schedule at the largest amplitude within it.
    samples, prompts, prompt_tokens, new_tokens: k samples for each of so many prompts cut from
        the text; 0 samples leaves diversity out.
    seed: of sampling and bootstrap.
    stack: where schedules act, as for `Profile.from_schedule`; by default in every stack.
    journal: keeps finished chunks for a later run. progress: (stage, done, total).

    Raises InputError when there is nothing to compare, DataError when the text is too short.
    """
    if not patterns:
        raise InputError("name at least one pattern or profile to compare")
    check_of_transformers(unwrapped(model), "compare")
    if samples:
        check_samples(samples, prompts, new_tokens)
        check_prompts(text)
    chunks = (
        token_chunks(tokenizer, text, chunk, limit) if isinstance(text, str | TextTable) else text
    )
    if not isinstance(chunks, torch.Tensor):
        chunks = as_inputs(chunks, unwrapped(model))
        layout_reached(model, chunks.sample)
    length = chunks.shape[1] if isinstance(chunks, torch.Tensor) else 0
    variants: list[Variant] = []
    budgets: dict[str, Budget] = {}
    plan = layout(model)
    depth = max(plan.depths[part] for part in plan.parts_called(stack))

    def report(stage: str) -> Callable[[int, int], None] | None:
        if progress is None:
            return None
        return lambda done, total: progress(stage, done, total)

    for item in patterns:
        if isinstance(item, tuple):
            variants.append(Variant(item[0], item[1], text=item[1].pattern or ""))
            continue
        pattern = as_schedule(item)
        variants += pattern_variants(pattern, model, depth, with_controls, stack)
        if budget is not None:
            found = _within(model, chunks, pattern, budget, stack, journal, report)
            budgets[str(pattern)] = found
            if found.cost is not None:
                fitted = pattern.amplitude(found.amplitude)
                label = f"within {budget:g} nats: {fitted}"
                variants.append(_variant(model, label, fitted, stack=stack))
    if with_controls and samples:
        variants += [
            Variant(f"sampling temperature {t:g}", None, t, "sampling temperature")
            for t in SAMPLING_CONTROLS
        ]
    check_labels([Variant(UNTEMPERED), *variants])
    costs, complete = measure_costs(
        model, chunks, variants, journal=journal, progress=report("cost")
    )
    benefits: list[Benefit] = []
    if samples and complete and isinstance(chunks, torch.Tensor):
        benefits, complete = measure_benefits(
            model,
            cut_prompts(chunks, prompts, prompt_tokens),
            [Variant(UNTEMPERED), *variants],
            k=samples,
            tokens=new_tokens,
            seed=seed,
            journal=journal,
            progress=report("samples"),
        )
    return Comparison(
        tuple(variants),
        tuple(costs),
        tuple(benefits),
        budgets,
        len(chunks),
        length,
        seed,
        complete,
    )


def pattern_variants(
    pattern: Schedule,
    model: nn.Module | Layout,
    depth: int,
    with_controls: bool,
    stack: str | None = None,
) -> list[Variant]:
    """A pattern read as relative temperatures over depth, and its controls if asked."""
    variants = [_variant(model, str(pattern), pattern, stack=stack)]
    if with_controls:
        variants += [
            _variant(model, f"{name}: {pattern}", control, "control", stack)
            for name, control in controls(pattern, depth, _SHUFFLES).items()
        ]
    return variants


def _variant(
    model: nn.Module | Layout,
    label: str,
    pattern: Schedule,
    family: str = "attention pattern",
    stack: str | None = None,
) -> Variant:
    profile = Profile.from_schedule(pattern, model, stack=stack)
    return Variant(label, profile, 1.0, family, str(pattern))


def _within(
    model: nn.Module,
    chunks: Any,
    pattern: Schedule,
    budget: float,
    stack: str | None,
    journal: Journal | None,
    report: Callable[[str], Callable[[int, int], None] | None],
) -> Budget:
    def cost_of(amplitude: float) -> Any:
        label = f"{pattern}|amplitude({amplitude:.6g})"
        variant = _variant(model, label, pattern.amplitude(amplitude), stack=stack)
        stage = f"amplitude {amplitude:.3f}"
        costs, complete = measure_costs(
            model, chunks, [variant], journal=journal, progress=report(stage)
        )
        if not complete:
            raise KeyboardInterrupt
        return costs[0].cost

    return largest_amplitude(cost_of, budget)
