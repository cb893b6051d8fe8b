"""One architecture, tried: is attention temperature exact on it, and does it fold?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.baking.foldable import NO
from tempering.attention.control.self_check import self_check
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.sample import run, sample_inputs
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import Profile
from tempering.errors import ArchitectureError, CheckError, NoSoftmaxError
from tempering.survey.families import Task
from tempering.survey.models import small_model

EXACT, REFUSED, WRONG, NO_SOFTMAX, UNSUPPORTED, NOT_BUILT = (
    "exact",
    "refused",
    "wrong",
    "no softmax",
    "unsupported",
    "not built",
)
# Differences of logits allowed, in standard deviations of them: float32, sums in another order.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What a tiny random model of an architecture showed.

    eager, sdpa: "exact", "refused", "wrong", "no softmax", "unsupported" (by transformers) or
        "not built". Exact means per head, at every attention call of a forward pass and of a
        decoding step, and each row of a batch as if it were alone.
    bake: "per head", "per layer" or "no".
    reason, bake_reason: why not more.
    layers, heads, untempered: attention layers, their heads, layers and modules left alone.
    route: "interface", "softmax" or both. features: what joins the products in the logits.
    decoding: whether decoding with a cache agrees with the full forward pass ("yes", or why not).
    """

    family: str
    model_type: str
    model_class: str
    eager: str
    sdpa: str = UNSUPPORTED
    reason: str = ""
    layers: int = 0
    heads: str = ""
    untempered: int = 0
    route: str = ""
    features: tuple[str, ...] = ()
    decoding: str = ""
    bake: str = NO
    bake_reason: str = ""

    @property
    def task(self) -> Task:
        """What was tried."""
        return Task(self.family, self.model_type, self.model_class)

    def to_json(self) -> dict[str, Any]:
        """Plain fields, for a record."""
        return asdict(self)


def judge(task: Task) -> Verdict:
    """Build a tiny random model of an architecture and try it."""
    known: dict[str, Any] = task._asdict()
    with _quiet():
        try:
            model = small_model(task, "eager")
        except Exception as error:
            return Verdict(**known, eager=NOT_BUILT, sdpa=NOT_BUILT, reason=_first(error))
        eager, reason = _control(model)
        if eager != EXACT:
            return Verdict(**known, eager=eager, sdpa=eager, reason=reason)
        known |= _description(layout(model))
        known["decoding"] = _decoding(model)
        known["bake"], known["bake_reason"] = _bake(model)
        try:
            model = small_model(task, "sdpa")
        except (ValueError, ImportError):
            return Verdict(**known, eager=eager)
        sdpa, reason = _control(model)
        return Verdict(**known, eager=eager, sdpa=sdpa, reason=reason)


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


def _control(model: nn.Module) -> tuple[str, str]:
    """The self-check, and rows of a batch against each of them alone."""
    try:
        self_check(model)
        problem = _rows(model, layout(model))
    except NoSoftmaxError:
        return NO_SOFTMAX, ""
    except (ArchitectureError, CheckError) as error:
        return REFUSED, _first(error)
    except Exception as error:
        return WRONG, f"fails: {_first(error)}"
    return (WRONG, problem) if problem else (EXACT, "")


def _description(plan: Layout) -> dict[str, Any]:
    return {
        "layers": len(plan.layers),
        "heads": plan.describe().split(" x ")[1].removesuffix(" heads"),
        "untempered": len(plan.untempered),
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


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits, or the last hidden state, as float64."""
    result = run(model, inputs)
    logits = getattr(result, "logits", None)
    return (result.last_hidden_state if logits is None else logits).double()


def _rows(model: nn.Module, plan: Layout) -> str:
    """Why rows with profiles of their own differ from each row alone; empty if they agree."""
    profiles = [random_profile(plan, 0), Profile.neutral(plan), random_profile(plan, 1)]
    inputs = sample_inputs(model, rows=len(profiles))
    with tempered(model, profiles, check=False):
        together = outputs(model, inputs)
    each = len(together) // len(profiles)
    worst, moved = 0.0, together[:each].sub(together[-each:]).abs().max().item()
    for row, profile in enumerate(profiles):
        # The same batch, so that only the temperatures differ.
        with tempered(model, profile, check=False):
            alone = outputs(model, inputs)
        part = slice(row * each, (row + 1) * each)
        worst = max(worst, ((together - alone)[part].abs().max() / alone.std()).item())
    if worst > _ROUNDING:
        return f"rows with profiles of their own are off by {worst:.2g} standard deviations"
    return "" if moved > 0 else "rows with different profiles give the same output"


def _decoding(model: Any) -> str:
    """Whether decoding with a cache agrees with full forward passes, under a profile.

    "yes"; "as untempered" where the model itself disagrees as much; else what went wrong.
    """
    if not model.can_generate():
        return "generates nothing"
    try:
        own = _cache_error(model)
    except Exception as error:
        return f"fails in transformers: {_first(error)}"
    with tempered(model, random_profile(layout(model), 2), check=False):
        off = _cache_error(model)
    if off <= _ROUNDING:
        return "yes"
    if off <= 3 * own:
        return f"as untempered (off by {own:.1g} standard deviations)"
    return f"off by {off:.2g} standard deviations (untempered: {own:.2g})"


@torch.no_grad()
def _cache_error(model: Any, tokens: int = 4) -> float:
    """Largest difference of greedy decoding's logits with and without a cache, over their std."""
    inputs = sample_inputs(model)
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


def _bake(model: nn.Module) -> tuple[str, str]:
    from tempering.attention.baking.verdict import bake_verdict

    try:
        found = bake_verdict(model)
    except Exception as error:
        return NO, f"fails: {_first(error)}"
    return found.verdict, found.reason
