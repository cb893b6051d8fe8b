"""`audit`: at which temperature does an engine run a model, and if it is wrong, how?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.audit.candidates import ALIKE, MARGIN, Candidate, Court, TemperatureEstimate
from tempering.audit.mistakes.base import Mistake, MistakeCase, cases
from tempering.audit.reference import Reference
from tempering.audit.rounding import check_precision, rounded
from tempering.audit.scores import Scored, once
from tempering.errors import DataError, RefusedError

# Fewer log probabilities than this say nothing about their own errors.
_LEAST = 100
# Half an interval of T wider than this tells nothing: the coarsest mistake that counts is 3%.
_WIDEST = 0.03
# Of half the 95% interval: a T further from what it should be is not called right, even where it is
# not far enough for an alarm (3.3 standard errors, which one right engine in a thousand exceeds).
_DOUBT = 1.7
_COMMON = 0.3  # correlation, below which two models have nothing in common
_PARTINGS = 12


@dataclass(frozen=True)
class Parting:
    """A token where engine and reference differ most; log probabilities in nats."""

    prompt: str
    place: int
    token: int
    engine: float
    reference: float


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    right: whether the engine runs as it should; None where these prompts can't tell.
    verdict: in words. temperature: of the whole model. kinds, layers: of each kind of layer, of
    each layer. candidates: hypotheses, the likeliest first. scale: of the differences between
    engine and reference, nats, and null_scale: of those that the engine's precision explains.
    tokens: log probabilities that were compared. partings: where the two differ most.
    """

    right: bool | None
    verdict: str
    temperature: TemperatureEstimate
    kinds: tuple[TemperatureEstimate, ...]
    layers: tuple[TemperatureEstimate, ...]
    candidates: tuple[Candidate, ...]
    scale: float
    null_scale: float
    tokens: int
    prompts: int
    precision: str
    partings: tuple[Parting, ...]
    untold: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 right, 1 wrong, 2 can't be told."""
        return {True: 0, False: 1, None: 2}[self.right]


Progress = Callable[[str, int, int], None]


def audit(
    model: nn.Module,
    prompts: Sequence[Scored],
    *,
    name: str = "the engine",
    precision: str = "float32",
    profile: Profile | None = None,
    mistakes: Sequence[Mistake] | None = None,
    layers: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Compare an engine's log probabilities with those of a reference, by likelihood.

    The hypotheses: the engine is right; one of the known mistakes; another temperature of the
    whole model, of each kind of layer, of each layer, or one that changes with position. An
    engine is wrong where one of them beats "right" beyond chance, or where it differs by more
    than its precision explains; else it is right.

    Parameters
    ----------
    model: the reference, float32, with the weights that the engine has.
    prompts: what the engine said; see `tempering.audit.scores`. Tokens that prompts share, from
        their beginning on, count once.
    name: of the engine, for the verdict.
    precision: that the engine computes in; see `tempering.audit.rounding`.
    profile: that the engine was given; temperatures are then compared with it.
    mistakes: the catalogue by default; add one of your own with `[*KNOWN, mine]`.
    layers: also fit each layer, which takes a run of the model for each.
    seed: of the rounding's random part.

    Raises DataError for prompts that are too short, RefusedError for an engine that has nothing in
    common with the reference.
    """
    check_precision(precision)
    kept = [item for item in once(prompts) if item.places]
    tokens = sum(len(item.places) for item in kept)
    if tokens < _LEAST:
        twice = sum(len(item.places) for item in prompts) - tokens
        beside = f" ({twice} more repeat a prompt, or the beginning of one)" if twice else ""
        raise DataError(f"it can't be told from {tokens} tokens{beside}; give 2,000")
    reference = Reference(model, profile)
    reference.check(kept)
    say = progress or (lambda stage, done, total: None)
    known = [*cases(model, mistakes), *_profile_cases(model, profile)]
    with reference.told():
        refuse_strangers(reference, kept[0], known, name)
        say("reference", 0, 2)
        own = reference.scores(kept)
        with rounded(model, precision, seed):
            null = reference.scores(kept)
        say("reference", 2, 2)
        court = Court(reference, kept, own, null)
        found, untold = [court.right], []
        for done, case in enumerate(known, 1):
            judged = court.case(case)
            if judged is None:
                untold.append(case.name)
            else:
                found.append(judged)
            say("mistakes", done, len(known))
        fitted = _fitted(court, layers, say)
        found += fitted.values()
        if reference.slopes and not any(court.agrees(item) for item in found):
            found.append(court.slope())
        say("temperatures", 1, 1)
        found = court.ordered(found, fitted["model"])
        right, verdict = _verdict(court, found, fitted, name)
    return Audit(
        right=right,
        verdict=verdict,
        temperature=fitted["model"].temperatures[0],
        kinds=fitted["type"].temperatures if "type" in fitted else (),
        layers=fitted["layer"].temperatures if "layer" in fitted else (),
        candidates=tuple(found),
        scale=court.right.scale,
        null_scale=court.null_scale,
        tokens=tokens,
        prompts=len(kept),
        precision=precision,
        partings=_partings(court),
        untold=tuple(untold),
    )


def check_kinship(
    model: nn.Module, prompt: Scored, name: str, profile: Profile | None = None
) -> None:
    """`refuse_strangers` by one prompt, before more are asked for."""
    reference = Reference(model, profile)
    reference.check([prompt])
    with reference.told():
        refuse_strangers(reference, prompt, cases(model), name)


def refuse_strangers(
    reference: Reference, prompt: Scored, known: Sequence[MistakeCase], name: str
) -> None:
    """RefusedError where neither the reference nor any mistake resembles an engine on a prompt."""
    y = torch.tensor(prompt.values, dtype=torch.float64)
    if len(y) < 20:
        return
    together = _correlation(y, reference.scores([prompt]))
    if together >= _COMMON:
        return
    for case in known:
        with case.change():
            if _correlation(y, reference.scores([prompt])) >= _COMMON:
                return
    raise RefusedError(
        f"{name} and the reference have nothing in common: their log probabilities of "
        f"{prompt.origin} correlate by {together:.2f}, and no known mistake explains it. Does it "
        "serve another model, other weights, or cut the prompt? Name the model that it serves"
    )


def _correlation(one: Tensor, other: Tensor) -> float:
    if float(one.std()) == 0 or float(other.std()) == 0 or not bool(other.isfinite().all()):
        return 0.0
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


def _profile_cases(model: nn.Module, profile: Profile | None) -> list[MistakeCase]:
    """What an engine does to a profile that it was given."""
    if profile is None:
        return []
    return [
        MistakeCase(f"the profile {what}", partial(tempered, model, profile.scaled(power)))
        for what, power in (
            ("were not applied", -1.0),
            ("were applied twice", 1.0),
            ("were applied upside down (1/T)", -2.0),
        )
    ]


def _fitted(court: Court, layers: bool, say: Progress) -> dict[str, Candidate]:
    bases = court.reference.bases()
    if not layers:
        bases.pop("layer", None)
    found: dict[str, Candidate] = {}
    for done, (per, basis) in enumerate(bases.items()):
        say("temperatures", done, len(bases) + 1)
        whole = found["model"].temperatures[0] if found else None
        start = 0.0 if whole is None else math.log(whole.value / whole.said)
        found[per] = court.temperatures(per, basis, _said(court.reference, basis), start)
    return found


def _said(reference: Reference, basis: Any) -> list[float]:
    """What each number of a basis should be: 1, or the profile's geometric mean over its heads."""
    if reference.profile is None:
        return [1.0] * basis.matrix.shape[1]
    rows = reference.profile.resolve(reference.plan, rules=True)
    logs = torch.cat([row.double().log() for row in rows])
    return ((basis.matrix.T @ logs) / basis.matrix.sum(0)).exp().tolist()


def _verdict(
    court: Court, found: Sequence[Candidate], fitted: dict[str, Candidate], name: str
) -> tuple[bool | None, str]:
    right, whole = court.right, fitted["model"].temperatures[0]
    better = [item for item in found if item.kind != "right" and item.stands_out]
    best = better[0] if better else None
    if best is not None and best.numbers:
        # Of fitted hypotheses that all agree the simplest is told: one T, not the same T 30 times.
        alike = [item for item in better if item.numbers and court.agrees(item)]
        best = min(alike, key=lambda item: item.numbers, default=best)
    if best is None and court.agrees(right):
        half = (whole.high - whole.low) / 2 / whole.value
        away = abs(math.log(whole.value / whole.said))
        doubtful = away > max(MARGIN, _DOUBT * half)
        if half > _WIDEST or doubtful:
            tokens = len(court.y)
            # An alarm is raised at twice the distance, in standard errors, at which doubt begins.
            wanted = away / (2 * _DOUBT) if doubtful else _WIDEST
            needed = math.ceil(tokens * max((half / wanted) ** 2, 2.0 * doubtful) / 100) * 100
            return None, (
                f"it can't be told from {tokens} tokens ({whole.text()}); give {needed:,}"
            )
        if court.reference.profile is not None:
            return True, f"{name} applies the profile: {_over(whole)} times what it says"
        return True, f"{name} runs at {whole.text()}"
    if best is not None and (court.agrees(best) or best.scale <= right.scale / 10):
        return False, _named(best, found, fitted, name)
    where = court.culprit()
    near = ""
    if best is not None:
        near = f"; nearest is as if {best.name}" if best.kind == "mistake" else ""
        near += f", which leaves {best.scale:.2g} of {right.scale:.2g} nats" if near else ""
    more = f"(it differs by {right.scale:.2g} nats, its precision explains {court.null_scale:.2g})"
    return False, (
        f"{name} is wrong, and none of the known mistakes explains it: something else differs "
        f"from {where} on {more}{near}"
    )


def _over(item: TemperatureEstimate) -> str:
    return TemperatureEstimate(
        item.name, item.value / item.said, item.low / item.said, item.high / item.said
    ).text()


def _named(
    best: Candidate, found: Sequence[Candidate], fitted: dict[str, Candidate], name: str
) -> str:
    whole = fitted["model"].temperatures[0]
    if best.kind == "mistake":
        tied = [
            item.name
            for item in found
            if item.kind == "mistake" and item is not best and best.gain - item.gain < 3
        ]
        also = f"; these prompts don't tell it from: {'; '.join(tied)}" if tied else ""
        at = ""
        for candidate in (fitted["model"], fitted.get("type")):
            if candidate is not None and candidate.scale <= max(1.5 * best.scale, ALIKE):
                at = f" ({_moved(candidate)})"
                break
        return f"{name} is wrong: it runs as if {best.name}{at}{also}"
    if best.kind == "model":
        return f"{name} is wrong: it runs at {whole.text()}, not at T = {whole.said:.4g}"
    if best.kind == "position":
        level, slope = best.temperatures
        return (
            f"{name} is wrong: its temperature changes with position, {level.text()} {level.name}, "
            f"times {slope.value:.3f} [{slope.low:.3f}, {slope.high:.3f}] for e times as many keys"
        )
    return f"{name} is wrong: {_moved(best)}"


def _moved(candidate: Candidate) -> str:
    """The temperatures that are not what they should be."""
    if candidate.kind == "model":
        return candidate.temperatures[0].text()
    moved = [item for item in candidate.temperatures if item.significant]
    moved.sort(key=lambda item: -abs(math.log(item.value / item.said)))
    shown = [
        f"{item.name.replace('_attention', ' attention')} at {item.text()}"
        + ("" if item.said == 1 else f" where the profile says {item.said:.4g}")
        for item in moved[:4]
    ]
    more = f", and {len(moved) - 4} more" if len(moved) > 4 else ""
    return ", ".join(shown) + more


def _partings(court: Court) -> tuple[Parting, ...]:
    places = [(item, place) for item in court.prompts for place in item.places]
    far = (court.y - court.own).abs()
    chosen = far.topk(min(_PARTINGS, len(far))).indices.tolist()
    found = []
    for i in chosen:
        item, place = places[i]
        engine, reference = float(court.y[i]), float(court.own[i])
        found.append(Parting(item.origin, place, item.tokens[place], engine, reference))
    return tuple(found)
