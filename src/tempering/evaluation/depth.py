"""How much depth a pattern needs: the same pattern repeated over depth, and in parts of the stack.

Two families of cases share the values of one pattern. In `cycles` it runs 1, 2, 3, .. times from
the first layer to the last, so that each stage has ever fewer layers; in `sub-stack` it runs once
over part of the layers, in the lower, middle or upper part, and the others keep T = 1.

Every case stands beside its own controls, the same values in the same layers in other orders.
The difference of the costs is paired over chunks; its interval knows nothing of how far random
orders lie from each other, so that few shuffles show that orders differ, not which course is good.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import Profile
from tempering.counts import whole_number
from tempering.errors import DepthWarning, InputError, ScheduleError
from tempering.evaluation.benefit import Benefit, check_samples, cut_prompts, measure_benefits
from tempering.evaluation.cost import Cost, Variant, cost_rows, summarised
from tempering.evaluation.journal import Journal
from tempering.evaluation.paired import Estimate, mean_estimate, paired_difference
from tempering.schedules import Schedule, as_schedule

Progress = Callable[[str, int, int], None]
PLACES = ("lower", "middle", "upper")


@dataclass(frozen=True, eq=False)
class Case:
    """One way to lay a pattern over depth.

    family: "cycles" or "sub-stack". place: "whole", "lower", "middle" or "upper".
    cycles: how often the pattern runs. first, last: the layers that it runs over.
    profile: its temperatures; controls: the same values in other orders.
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
        """A name that no other case of a study has."""
        if self.family == "cycles":
            return f"{self.cycles} cycle{'s' * (self.cycles > 1)}"
        return f"{self.layers} layers, {self.place}"


@dataclass(frozen=True, eq=False)
class DepthStudy:
    """What a study found; all in the order of `cases`.

    costs: against the untempered model. shuffled: mean cost of the controls, and
    difference: cost less that, paired over chunks. benefits: diversity of samples, if asked for.
    complete: False after Ctrl-C; then the numbers rest on the chunks that were finished.
    """

    cases: tuple[Case, ...]
    costs: tuple[Cost, ...]
    shuffled: tuple[Estimate, ...]
    difference: tuple[Estimate, ...]
    benefits: tuple[Benefit, ...] = field(default=())
    complete: bool = True


def depth_cases(
    pattern: str | float | Schedule,
    model: nn.Module | Layout,
    *,
    cycles: int = 6,
    shuffles: int = 1,
    seed: int = 0,
) -> list[Case]:
    """The cases of a study: 1..cycles cycles over all layers, and sub-stacks of 1/2, 1/4, ...

    Parameters
    ----------
    pattern: relative temperatures over depth, with its amplitude.
    model: the model, or its layout; of one stack of layers.
    cycles: at most so many; fewer where a cycle would have more stages than layers.
    shuffles: controls for each case, 1 or more. seed: of their orders.

    Raises ScheduleError when the stack has fewer layers than the pattern has stages, InputError
    for a model of two stacks.
    """
    plan = model if isinstance(model, Layout) else layout(model)
    course = as_schedule(pattern)
    if len(plan.depths) != 1:
        raise InputError(
            f"a study of depth needs a model of one stack; this has {', '.join(plan.depths)}"
        )
    if cycles < 1 or shuffles < 1:
        raise InputError(
            f"a study of depth has at least one cycle and one shuffle, not {cycles} and {shuffles}"
        )
    (depth,) = plan.depths.values()
    stages = max(course.stages, 2)
    if depth < stages:
        raise ScheduleError(
            f"{course} has {stages} stages, the model {depth} layers; use a shorter pattern"
        )
    found: list[Case] = []

    def add(family: str, place: str, times: int, first: int, last: int) -> None:
        whole = course if times == 1 else course.repeat(times)
        with warnings.catch_warnings():
            # Too few layers a stage is what is being studied; the number stands in the results.
            warnings.simplefilter("ignore", DepthWarning)
            values = whole.sample(last - first + 1)
        generator = torch.Generator().manual_seed(whole_number(seed, "seed") + len(found))
        orders = [torch.randperm(len(values), generator=generator) for _ in range(shuffles)]
        found.append(
            Case(
                family, place, times, first, last, course.stages * times,
                _profile(plan, model, values, first),
                tuple(_profile(plan, model, values[order], first) for order in orders),
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


def _profile(plan: Layout, model: nn.Module | Layout, values: Tensor, first: int) -> Profile:
    """values[i] in layer first + i, T = 1 elsewhere."""
    rows = []
    for layer in plan.layers:
        inside = 0 <= layer.index - first < len(values)
        value = float(values[layer.index - first]) if inside else 1.0
        rows.append(torch.full((layer.heads,), value, dtype=torch.float64))
    return Profile._for(plan, rows, model)


def study_depth(
    model: nn.Module,
    chunks: Int[Tensor, "chunks length"],
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
    """Cost of every case and of its controls on chunks of text, and with `samples` what it buys.

    Parameters
    ----------
    cases: of `depth_cases`. samples: k samples for each of `prompts` prompts cut from the chunks,
        and of the untempered model; 0 leaves diversity out. seed: of sampling and bootstrap.
    journal: keeps finished pieces for a later run. progress: (stage, done, total).

    Ctrl-C returns what is finished (`complete` is False then).
    """
    if not cases:
        raise InputError("a study of depth needs at least one case")
    if samples:
        check_samples(samples, prompts, new_tokens)
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
    rows, complete = cost_rows(model, chunks, every, journal=journal, progress=report("cost"))
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
        tuple(summarised(rows, variants, chunks.shape[1] - 1)),
        tuple(shuffled),
        tuple(difference),
        tuple(benefits),
        complete,
    )
