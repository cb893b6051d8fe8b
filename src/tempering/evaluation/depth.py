"""How much depth a pattern needs: the same pattern repeated over depth, and in parts of the stack.

There are two families of cases. In `cycles` the pattern runs 1, 2, 3, .. times from the first layer
to the last, so that each stage has fewer and fewer layers. In `sub-stack` it runs once over the
lower, middle or upper part of the layers, and the other layers keep T = 1.

Every case is compared with its own controls: the same values in the same layers in other orders.
The difference of the costs is paired over chunks. Its interval doesn't include the variation
between random orders, so with few shuffles a difference shows that these orders differ, and not
that the pattern's order is good.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import Profile
from tempering.counts import whole_number
from tempering.errors import DepthWarning, InputError, ScheduleError
from tempering.evaluation.benefit import (
    Benefit,
    check_prompts,
    check_samples,
    cut_prompts,
    measure_benefits,
)
from tempering.evaluation.cost import Cost, Variant, cost_rows, summarised
from tempering.evaluation.journal import Journal, Progress
from tempering.evaluation.paired import IntervalEstimate, mean_estimate, paired_difference
from tempering.schedules import Schedule, as_schedule

PLACES = ("lower", "middle", "upper")


@dataclass(frozen=True, eq=False)
class Case:
    """One way to lay a pattern over depth.

    family: "cycles" or "sub-stack". place: "whole", "lower", "middle" or "upper".
    cycles: how often the pattern runs. first, last: the first and last layer that it runs over.
    stages: of all cycles. profile: the temperatures. controls: the same values in other orders.
    """

    family: str
    place: str
    cycles: int
    first: int
    last: int
    stages: int
    profile: Profile
    controls: tuple[Profile, ...]

    @property
    def layers(self) -> int:
        """How many layers the pattern runs over."""
        return self.last - self.first + 1

    @property
    def layers_a_stage(self) -> float:
        """Layers for each stage of each cycle."""
        return self.layers / self.stages

    @property
    def label(self) -> str:
        """A name, unique in a study."""
        if self.family == "cycles":
            return f"{self.cycles} cycle{'s' * (self.cycles > 1)}"
        return f"{self.layers} layers, {self.place}"


@dataclass(frozen=True, eq=False)
class DepthStudy:
    """The result of a study; all in the order of `cases`.

    costs: against the untempered model. shuffled: mean cost of the controls. difference: cost less
    `shuffled`, paired over chunks. benefits: diversity of samples, if asked for. complete: False
    after Ctrl-C; then the numbers are of the chunks that were finished.
    """

    cases: tuple[Case, ...]
    costs: tuple[Cost, ...]
    shuffled: tuple[IntervalEstimate, ...]
    difference: tuple[IntervalEstimate, ...]
    benefits: tuple[Benefit, ...] = field(default=())
    complete: bool = True


def depth_cases(
    pattern: str | float | Schedule,
    model: nn.Module | Layout,
    *,
    cycles: int = 6,
    shuffles: int = 1,
    seed: int = 0,
    stack: str | None = None,
) -> list[Case]:
    """The cases of a study: 1..cycles cycles over all layers, and sub-stacks of 1/2, 1/4, ...

    Parameters
    ----------
    pattern: relative temperatures over depth, with its amplitude.
    model: the model, or its layout.
    stack: of a model of several stacks the one to study ("encoder", "decoder", "cross", or a
        tower's, such as "vision"); the others keep T = 1.
    cycles: the most cycles; fewer where a cycle would have more stages than layers.
    shuffles: controls for each case, 1 or more. seed: of their orders.

    Raises ScheduleError when the stack has fewer layers than the pattern has stages, InputError
    for a model of two stacks of which none is named.
    """
    plan = model if isinstance(model, Layout) else layout(model)
    course = as_schedule(pattern)
    parts = plan.parts_called(stack)
    if len(parts) != 1:
        raise InputError(
            f"a study of depth is of one stack; this model has {', '.join(parts)}: name one of "
            "them (stack='encoder', on the command line --stack)"
        )
    if cycles < 1 or shuffles < 1:
        raise InputError(
            f"a study of depth has at least one cycle and one shuffle, not {cycles} and {shuffles}"
        )
    depth = plan.depths[parts[0]]
    stages = max(course.stages, 2)
    if depth < stages:
        raise ScheduleError(
            f"{course} has {stages} stages, the model {depth} layers; use a shorter pattern"
        )
    found: list[Case] = []

    def add(family: str, place: str, times: int, first: int, last: int) -> None:
        whole = course if times == 1 else course.repeat(times)
        with warnings.catch_warnings():
            # Few layers a stage are the subject of the study, and the results state their number.
            warnings.simplefilter("ignore", DepthWarning)
            values = whole.sample(last - first + 1)
        generator = torch.Generator().manual_seed(whole_number(seed, "seed") + len(found))
        orders = [torch.randperm(len(values), generator=generator) for _ in range(shuffles)]
        found.append(
            Case(
                family, place, times, first, last, course.stages * times,
                _profile_from(plan, model, values, first, parts[0]),
                tuple(
                    _profile_from(plan, model, values[order], first, parts[0]) for order in orders
                ),
            )
        )  # fmt: skip

    for times in range(1, min(cycles, depth // stages) + 1):
        add("cycles", "whole", times, 0, depth - 1)
    size = depth // 2
    while size >= stages:
        starts = dict(zip(PLACES, (0, (depth - size) // 2, depth - size), strict=True))
        for place, first in starts.items():
            add("sub-stack", place, 1, first, first + size - 1)
        size //= 2
    return found


def _profile_from(
    plan: Layout, model: nn.Module | Layout, values: Tensor, first: int, part: str
) -> Profile:
    """values[i] in layer first + i of a part, T = 1 elsewhere."""
    rows = []
    for layer in plan.layers:
        inside = layer.part == part and 0 <= layer.index - first < len(values)
        value = float(values[layer.index - first]) if inside else 1.0
        rows.append(torch.full((layer.heads,), value, dtype=torch.float64))
    return Profile._for(plan, rows, model)


def study_depth(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"] | Any,
    cases: Sequence[Case],
    *,
    samples: int = 0,
    prompts: int = 4,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> DepthStudy:
    """Cost of every case and of its controls on chunks of text; with `samples` also its benefit.

    Parameters
    ----------
    chunks: token ids, or what the model's processor gives (`tempering.inputs.as_inputs`); without
        token ids there is no diversity to sample.
    cases: of `depth_cases`. samples: k samples for each of `prompts` prompts cut from the chunks,
        and of the untempered model; 0 leaves diversity out. seed: of sampling and bootstrap.
    journal: keeps finished pieces for a later run. progress: (stage, done, total).

    Ctrl-C returns the study over the chunks that were finished, with `complete` False.
    """
    if not cases:
        raise InputError("a study of depth needs at least one case")
    if samples:
        check_samples(samples, prompts, new_tokens)
        check_prompts(chunks)
    variants = [Variant(case.label, case.profile) for case in cases]
    controls = [
        [
            Variant(f"{case.label}, shuffle {i}", profile, family="control")
            for i, profile in enumerate(case.controls)
        ]
        for case in cases
    ]

    def report(stage: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(stage, done, total)

    every = [*variants, *(item for group in controls for item in group)]
    found = cost_rows(model, chunks, every, journal=journal, progress=report("cost"))
    rows, complete = found.rows, found.complete
    base = torch.tensor([row[""][0] for row in rows], dtype=torch.float64)
    shuffled, difference = [], []
    for variant, group in zip(variants, controls, strict=True):
        own = torch.tensor([row[variant.label][0] for row in rows], dtype=torch.float64)
        others = torch.tensor(
            [[row[item.label][0] for item in group] for row in rows], dtype=torch.float64
        ).mean(1)
        shuffled.append(mean_estimate(others - base))
        difference.append(paired_difference(own, others))
    benefits: list[Benefit] = []
    if samples and complete:
        benefits, complete = measure_benefits(
            model,
            cut_prompts(chunks, prompts, prompt_tokens),
            [Variant("untempered"), *variants],
            k=samples,
            tokens=new_tokens,
            seed=seed,
            journal=journal,
            progress=report("samples"),
        )
    return DepthStudy(
        tuple(cases),
        tuple(summarised(rows, variants, found.counts, found.unit)),
        tuple(shuffled),
        tuple(difference),
        tuple(benefits),
        complete,
    )
