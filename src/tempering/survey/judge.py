"""One architecture, tried: is attention temperature exact on it, and does it fold?"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tempering.attention.baking.foldable import NO
from tempering.attention.control.self_check import self_check
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.sample import run, sample_inputs
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError, CheckError, NoSoftmaxError, ProfileError
from tempering.survey.configs import RUNGS
from tempering.survey.families import OTHER, Task, family_of
from tempering.survey.makers import ROWS
from tempering.survey.models import class_of, small_model
from tempering.survey.samples import Inputs, NoSampleError, find_samples

EXACT, REFUSED, WRONG, NO_SOFTMAX, UNSUPPORTED, NOT_BUILT, NOT_RUN = (
    "exact",
    "refused",
    "wrong",
    "no softmax",
    "unsupported",
    "not built",
    "not run",
)
# Differences of logits allowed, in standard deviations of them: float32, sums in another order.
_ROUNDING = 1e-4
# Samples that run and show nothing, before the search ends.
_MOST_SAMPLES = 6


@dataclass(frozen=True)
class Verdict:
    """What a tiny random model of an architecture showed.

    eager, sdpa: "exact", "refused", "wrong", "no softmax", "unsupported" (by transformers),
        "not built" or "not run". Exact means per head, at every attention call of a forward pass
        and of a decoding step, and each row of a batch as if it were alone, where rows can be told
        apart; where they can't, a profile for each row is refused.
    bake: "per head", "per layer" or "no".
    reason, bake_reason: why not more.
    layers, heads, untempered: attention layers, their heads, layers and modules left alone.
    inputs: what the model was run on, where it was more than tokens.
    rows: whether each row of a batch may have a profile of its own.
    route: "interface", "softmax" or both. features: what joins the products in the logits.
    decoding: whether decoding with a cache agrees with the full forward pass ("yes", or why not).
    """

    model_type: str
    model_class: str
    autos: tuple[str, ...]
    whole: bool
    family: str
    eager: str
    sdpa: str = UNSUPPORTED
    reason: str = ""
    layers: int = 0
    heads: str = ""
    untempered: int = 0
    inputs: tuple[str, ...] = ()
    rows: bool = True
    route: str = ""
    features: tuple[str, ...] = ()
    decoding: str = ""
    bake: str = NO
    bake_reason: str = ""

    @property
    def task(self) -> Task:
        """What was tried."""
        return Task(self.model_type, self.model_class, self.autos, self.whole)

    def to_json(self) -> dict[str, Any]:
        """Plain fields, for a record."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Verdict:
        """The verdict that `to_json` gave."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
        }
        return cls(**values)


def judge(task: Task) -> Verdict:
    """Build a tiny random model of an architecture and try it."""
    with _quiet():
        known: dict[str, Any] = {**task._asdict(), "family": OTHER}
        try:
            known["family"] = family_of(task, class_of(task))
        except Exception as error:
            return Verdict(**known, eager=NOT_BUILT, sdpa=NOT_BUILT, reason=_first(error))
        return _judge(task, known)


def _judge(task: Task, known: dict[str, Any]) -> Verdict:
    failed = NOT_BUILT
    reasons = []
    for rung in RUNGS:
        try:
            model = small_model(task, "eager", rung)
        except Exception as error:
            reasons.append(_first(error))
            continue
        try:
            sample, eager, reason = _first_that_tells(model)
            break
        except NoSampleError as error:
            failed = NOT_RUN
            reasons.append(_first(error))
    else:
        return Verdict(**known, eager=failed, sdpa=failed, reason=reasons[0])
    known["inputs"] = tuple(sorted(sample or ()))
    if eager != EXACT:
        return Verdict(**known, eager=eager, sdpa=eager, reason=reason)
    plan = layout(model, sample)
    known |= _description(plan)
    if task.whole:
        known["decoding"] = _decoding(model, sample)
        known["bake"], known["bake_reason"] = _bake(model, sample)
    try:
        model = small_model(task, "sdpa", rung)
    except (ValueError, ImportError):
        return Verdict(**known, eager=eager)
    sdpa, reason = _control(model, sample)
    return Verdict(**known, eager=eager, sdpa=sdpa, reason=reason)


def _first_that_tells(model: nn.Module) -> tuple[Inputs | None, str, str]:
    """The first sample that gives a verdict, or else that runs; and what `_control` says of it."""
    tried = []
    for sample in itertools.islice(find_samples(model), _MOST_SAMPLES):
        tried.append((sample, *_control(model, sample)))
        if tried[-1][1] != NOT_RUN:
            return tried[-1]
    return tried[0]


def _first(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "unknown")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    from transformers import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _control(model: nn.Module, sample: Inputs | None = None) -> tuple[str, str]:
    """The self-check, and rows of a batch against each of them alone."""
    try:
        self_check(model, sample)
        problem = _rows(model, layout(model, sample), sample)
    except NoSoftmaxError:
        return NO_SOFTMAX, ""
    except NoSampleError as error:
        return NOT_RUN, _first(error)
    except (ArchitectureError, CheckError) as error:
        return REFUSED, _first(error)
    except Exception as error:
        return WRONG, f"fails: {_first(error)}"
    if problem and sample is not None and _rows_mix(model, sample):
        return NOT_RUN, "the model puts one row's images among another's tokens on this sample"
    return (WRONG, problem) if problem else (EXACT, "")


def _description(plan: Layout) -> dict[str, Any]:
    return {
        "layers": len(plan.layers),
        "heads": plan.describe().split(" x ")[1].removesuffix(" heads"),
        "untempered": len(plan.untempered),
        "rows": all(layer.of_rows for layer in plan.layers),
        "route": " and ".join(sorted({layer.route for layer in plan.layers})),
        "features": tuple(sorted({item for layer in plan.layers for item in layer.features})),
    }


def random_profile(plan: Layout, seed: int) -> Profile:
    """A temperature for every head, log-uniform in 1/2..2."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.exp((torch.rand(layer.heads, generator=generator) * 2 - 1) * 0.7).double()
        for layer in plan.layers
    ]
    return Profile.from_rows(rows, plan)


def outputs(
    model: nn.Module, inputs: dict[str, Any], rows: int = ROWS, everything: bool = False
) -> Tensor:
    """The logits, or else the last hidden state, or all that a model returns row by row: float64.

    Its first axis holds the rows of the batch. everything: all that it returns in any case.
    """
    result = run(model, inputs)
    for name in () if everything else ("logits", "last_hidden_state"):
        found = getattr(result, name, None)
        if isinstance(found, Tensor) and found.ndim > 1 and len(found) % rows == 0:
            return found.double()
    named = dict(result) if isinstance(result, dict) else {"": result}
    # What compares rows with each other (logits_per_image, logits_audio_text) is of no row.
    own = {name: item for name, item in named.items() if not name.startswith("logits_")}
    parts = [
        item.double().flatten(1)
        for item in tree_flatten(own)[0]
        if isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 1
        if len(item) == rows
    ]
    return torch.cat(parts, 1)


def _rows(model: nn.Module, plan: Layout, sample: Inputs | None = None) -> str:
    """Why rows with profiles of their own differ from each row alone; empty if they agree.

    Where rows can't be told apart, profiles for each of them must be refused.
    """
    profiles = [random_profile(plan, 0), Profile.neutral(plan), random_profile(plan, 1)]
    if sample is not None:
        profiles = profiles[:ROWS]
    if not all(layer.of_rows for layer in plan.layers):
        try:
            tempered(model, profiles, check=False).remove()
        except ProfileError:
            return ""
        return "takes a profile for each row, though its rows can't be told apart"
    inputs = sample_inputs(model, rows=len(profiles)) if sample is None else sample
    problem, moved = _compared(model, inputs, profiles)
    if not problem and not moved:
        # A few give logits that come from before their attention, and its output besides.
        problem, moved = _compared(model, inputs, profiles, everything=True)
    if problem or moved:
        return problem
    if _moves(model, plan, inputs, profiles):
        raise NoSampleError(
            ["attention follows its temperatures, its output on the sample doesn't"]
        )
    return "rows with different profiles give the same output"


def _compared(
    model: nn.Module, inputs: Inputs, profiles: Sequence[Profile], everything: bool = False
) -> tuple[str, bool]:
    """How far rows with profiles of their own are off each row alone, and whether they differ."""
    with tempered(model, profiles, check=False):
        together = outputs(model, inputs, len(profiles), everything)
    each = len(together) // len(profiles)
    # Outputs of films have the frames of a row after each other, or the rows of a frame.
    orders = [
        [slice(row * each, (row + 1) * each) for row in range(len(profiles))],
        [slice(row, None, len(profiles)) for row in range(len(profiles))],
    ]
    worst, moved = [0.0, 0.0], together[:each].sub(together[-each:]).abs().max().item()
    for row, profile in enumerate(profiles):
        # The same batch, so that only the temperatures differ.
        with tempered(model, profile, check=False):
            alone = outputs(model, inputs, len(profiles), everything)
        if alone.shape != together.shape:
            continue  # speech is as long as its temperatures make it
        gap = (together - alone).abs() / alone.std()
        worst = [
            max(old, gap[parts[row]].max().item()) for old, parts in zip(worst, orders, strict=True)
        ]
    if min(worst) > _ROUNDING:
        off = f"{min(worst):.2g} standard deviations"
        return f"rows with profiles of their own are off by {off}", True
    return "", moved > 0


def _moves(model: nn.Module, plan: Layout, inputs: Inputs, profiles: Sequence[Profile]) -> bool:
    """Whether the attention modules themselves give other outputs under other temperatures."""
    seen: list[list[Tensor]] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        seen[-1] += [item for item in tree_flatten(output)[0] if isinstance(item, Tensor)]

    hooks = [model.get_submodule(name).register_forward_hook(keep) for name in plan.names]
    try:
        for profile in (profiles[0], profiles[-1]):
            seen.append([])
            with tempered(model, profile, check=False):
                run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    first, last = seen
    return any(
        a.shape == b.shape and not torch.equal(a, b) for a, b in zip(first, last, strict=False)
    )


def _rows_mix(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a row of the untempered output changes with the inputs of the others.

    Models that scatter images over the tokens that stand for them do so where a row has more
    or fewer such tokens than its image takes: rows can't be judged apart then.
    """
    plain = outputs(model, inputs)
    for kept, others in ((0, slice(1, None)), (ROWS - 1, slice(0, ROWS - 1))):
        changed = dict(inputs)
        for name, item in inputs.items():
            if isinstance(item, Tensor) and item.is_floating_point() and len(item) == ROWS:
                changed[name] = item.clone()
                changed[name][others] = 0
        again = outputs(model, changed)[kept]
        if bool((plain[kept] - again).abs().max() > _ROUNDING * plain.std()):
            return True
    return False


def _decoding(model: Any, sample: Inputs | None = None) -> str:
    """Whether decoding with a cache agrees with full forward passes, under a profile.

    "yes"; "as untempered" where the model itself disagrees as much; else what went wrong.
    """
    if not model.can_generate():
        return "generates nothing"
    try:
        own = _cache_error(model, sample)
    except Exception as error:
        return f"fails in transformers: {_first(error)}"
    with tempered(model, random_profile(layout(model), 2), check=False):
        off = _cache_error(model, sample)
    if off <= _ROUNDING:
        return "yes"
    if off <= 3 * own:
        return f"as untempered (off by {own:.1g} standard deviations)"
    return f"off by {off:.2g} standard deviations (untempered: {own:.2g})"


@torch.no_grad()
def _cache_error(model: Any, sample: Inputs | None, tokens: int = 4) -> float:
    """Largest difference of greedy decoding's logits with and without a cache, over their std."""
    inputs = sample_inputs(model) if sample is None else dict(sample)
    if inputs.pop("decoder_input_ids", None) is not None:
        inputs["decoder_start_token_id"] = 0
    steps = {}
    for cache in (True, False):
        result = model.generate(
            **inputs,
            use_cache=cache,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        steps[cache] = torch.stack(result.logits).double()
    return ((steps[True] - steps[False]).abs().max() / steps[False].std()).item()


def _bake(model: nn.Module, sample: Inputs | None = None) -> tuple[str, str]:
    from tempering.attention.baking.verdict import bake_verdict

    try:
        found = bake_verdict(model, sample)
    except Exception as error:
        return NO, f"fails: {_first(error)}"
    return found.verdict, found.reason
