"""Adam on the loss of recall under a limit on what text may lose, with little noise in the limit.

The limit is on c = E[-log q_theta(token)] - E[-log q_0(token)]. Over few tokens its gradient is
mostly noise, so it is parted: at theta = 0, where the gradient g_0 is taken once from all
calibration text, c has no other; further out,

    c(theta) ~ 2/3 g_0 theta + KL(untempered || tempered)

whose second term needs no sampled tokens and is small near 0 (both have the same curvature, the
Fisher matrix, where the model is calibrated). The 2/3 is what was left of g_0's slope along its
own Newton step on text that it was not taken from: the rest was noise.

The loss of the answers plus m times this estimate goes down from the temperatures that are best for
text, with m fixed: one that follows the limit swings for a hundred steps. A step is shortened by
how much text feels it, sqrt(2 median(F)/(F + median(F))), F the Fisher diagonal.

The estimate is good to some .008, so the cost is measured at the end, on chunks that g_0 was not
taken from, and theta brought towards the start, or stretched from it, until it meets the limit.
These chunks are neighbours of those learned from: on other texts of these kinds and one more, the
cost came out higher by .010 to .012, which the limit allows for.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _passes import Text, best_for_text
from _recall import answer_loss, pack
from _texts import SHORT, calibration, cut
from torch import Tensor

from tempering.attention.tuning.passes import loss_pass
from tempering.chunks import start_ids
from tempering.evaluation.recall import recall

_AVERAGE = 0.8  # of the running mean of the divergence
_SIZES = (150, 280, 450)  # words of filler, in turn
_FACTS = (8, 12, 16)
_QUESTIONS = 10
_TEXTS = ("fiction", "play", "reference")  # that filler comes from
_POSITIONS = 128  # of a chunk of text at which the divergence is taken
_CHUNKS = 8  # of each kind of text, over and over
_WARM = 6  # steps of warm-up
_BETAS = (0.9, 0.98)
_TRUST = 2 / 3
_CLOSE = 0.001  # to the limit, nats per token
_FARTHEST = 1.3  # that theta is stretched from the best for text
_LEAVE = 6  # every so many short chunks of text are left for measuring the cost


@dataclass(frozen=True)
class Settings:
    """steps, rate: of Adam. limit: of the measured cost, nats per token. multiplier: of the
    estimated one. prior: of |theta|^2/2. wordings: indices that are learned from. value, keys: the
    kinds of the facts, any without."""

    wordings: tuple[int, ...]
    steps: int = 130
    rate: float = 0.03
    limit: float = -0.003
    multiplier: float = 8.0
    prior: float = 1e-3
    value: str | None = None
    keys: tuple[str, ...] | None = None
    seed: int = 0


class _Divergence:
    """KL(untempered || tempered) on chunks of text, whose untempered logits are kept."""

    def __init__(self, live: Any, tokenizer: Any, rng: random.Random) -> None:
        self.live = live
        self.chunks = []
        for ids in calibration(tokenizer).values():
            own = cut(ids, SHORT, start_ids(tokenizer))
            self.chunks += rng.sample(own, min(_CHUNKS, len(own)))
        rng.shuffle(self.chunks)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, step: int, theta: Tensor) -> Tensor:
        place = step % len(self.chunks)
        ids = self.chunks[place][None].to(self.live.model.get_input_embeddings().weight.device)
        if place not in self.kept:
            generator = torch.Generator().manual_seed(place)
            chosen = torch.randperm(SHORT - 1, generator=generator)[:_POSITIONS].sort().values
            self.live.untempered()
            with torch.no_grad():
                self.kept[place] = (chosen, self._log_p(ids, chosen))
        chosen, reference = self.kept[place]
        self.live.set(theta)
        tempered = self._log_p(ids, chosen)
        return F.kl_div(tempered, reference, reduction="none", log_target=True).sum(-1).mean()

    def _log_p(self, ids: Tensor, chosen: Tensor) -> Tensor:
        found = self.live.model(
            input_ids=ids, use_cache=False, logits_to_keep=chosen.to(ids.device)
        )
        return torch.log_softmax(found.logits[0].float(), -1)


def fit(
    live: Any, tokenizer: Any, text: Text, settings: Settings, state: Path | None = None
) -> tuple[Tensor, list]:
    """theta, brought back to where the limit holds, and a row for each step and measured cost.

    state: a file that keeps the run, for going on from it.
    """
    rng = random.Random(settings.seed)
    divergence = _Divergence(live, tokenizer, rng)
    order = list(settings.wordings)
    rng.shuffle(order)
    near = text.near(leave=_LEAVE)
    best = best_for_text(near, text.tokens)
    theta = best.clone().requires_grad_()
    slope, felt = _TRUST * near.gradient, near.curvature.diagonal()
    shorter = (2 * felt.median() / (felt + felt.median())).sqrt()
    momentum, spread = torch.zeros_like(shorter), torch.zeros_like(shorter)
    average, rows, start = None, [], time.perf_counter()
    if state is not None and state.exists():
        kept = torch.load(state)
        if kept["settings"] | {"limit": settings.limit} == asdict(settings):  # limits come after
            theta.data.copy_(kept["theta"])
            momentum, spread, rows = kept["momentum"], kept["spread"], kept["rows"]
            average = kept["average"]
    for step in range(len(rows), settings.steps):
        item = _context(settings, step, order[step % len(order)])
        live.set(theta)
        loss = answer_loss(live.model, pack(tokenizer, item))
        (gain,) = torch.autograd.grad(loss, theta)
        far = divergence(step, theta)
        (away,) = torch.autograd.grad(far, theta)
        here = float(far.detach())
        average = here if average is None else _AVERAGE * average + (1 - _AVERAGE) * here
        with torch.no_grad():
            cost = float(slope @ theta) + average
            gradient = gain + settings.multiplier * (slope + away) + settings.prior * theta
            momentum = _BETAS[0] * momentum + (1 - _BETAS[0]) * gradient
            spread = _BETAS[1] * spread + (1 - _BETAS[1]) * gradient**2
            mean = momentum / (1 - _BETAS[0] ** (step + 1))
            size = (spread / (1 - _BETAS[1] ** (step + 1))).sqrt() + 1e-8
            decay = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            rate = settings.rate * min(1.0, (step + 1) / _WARM) * decay
            theta -= rate * shorter * mean / size
        rows.append(
            {
                "step": step,
                "wording": item.wording,
                "loss": float(loss.detach()),
                "divergence": here,
                "cost": cost,
                "coldest": float(theta.detach().min().exp()),
                "hottest": float(theta.detach().max().exp()),
            }
        )
        print(
            f"step {step}: {item.wording}, loss {float(loss.detach()):.3f}, divergence {here:.4f}, "
            f"cost {cost:+.4f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if state is not None:
            kept = {"settings": asdict(settings), "theta": theta.detach(), "rows": rows}
            kept |= {"momentum": momentum, "spread": spread, "average": average}
            torch.save(kept, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
    room, costs = _room(live, best, theta.detach(), text, settings.limit)
    return best + room * (theta.detach() - best), rows + costs


def _room(live: Any, best: Tensor, theta: Tensor, text: Text, limit: float) -> tuple[float, list]:
    """The largest r for which best + r (theta - best) costs no more than the limit, and
    what was measured; from the best for text, cost grows as a power of r, which is 2 at first and
    then that of the last two measurements."""
    places = text.short.left(_LEAVE)
    before = text.short.run.losses[places]
    pieces = [text.short.pieces[place] for place in places]
    found: list[dict] = []

    def cost(room: float) -> float:
        change = loss_pass(live, best + room * (theta - best), pieces).losses - before
        error = float(change.std() / len(change) ** 0.5)
        found.append({"room": room, "measured cost": float(change.mean()), "its error": error})
        print(found[-1], flush=True)
        return found[-1]["measured cost"]

    start, room, power = cost(0.0), 1.0, 2.0
    here = cost(room)
    if here <= min(start, limit):  # text gains all the way
        return room, found
    aim = limit - _CLOSE / 2 - start
    if aim <= 0:
        raise SystemExit(f"the best for text costs {start:+.4f} already; raise --limit")
    while here > limit or (here < limit - _CLOSE and room < _FARTHEST):
        rise, last = here - start, room
        room = min(_FARTHEST, room * (aim / rise) ** (1 / power)) if rise > 0 else _FARTHEST
        here = cost(room)
        if rise > 0 and here > start:
            power = max(1.0, math.log((here - start) / rise) / math.log(room / last))
    return room, found


def _context(settings: Settings, step: int, wording: int) -> Any:
    number = settings.seed * 100_003 + step
    rng = random.Random(f"choices learn {number}")
    place = step % len(_SIZES)
    return recall(
        number,
        part="learn",
        wording=wording,
        facts=_FACTS[place],
        questions=min(_QUESTIONS, _FACTS[place]),
        words=_SIZES[place],
        text=rng.choice(_TEXTS),
        value=settings.value,
        keys=settings.keys and rng.choice(settings.keys),
    )
