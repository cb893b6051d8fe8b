"""Does a closed form of the best temperature hold in context, for regression and for few shots?

    python benchmarks/in_context.py [--model smollm2 gemma3-270m] [--only regression] [--keep FILE]

regression: the experiments of arXiv 2511.01292 (see `_regression`): attention pretrained on one
setting and tested on another; T* in closed form beside a search over fresh prompts, and the error
at T = 1, at either, and of ridge regression that knows the new setting. Intervals over seeds.

few shots: "which kind of text is this?" with four labels and passages of 12 words of the package's
texts, eight examples in a context, of which a share has a wrong label. One temperature for all
heads, from prompts of the texts' first halves, tested on those of their second halves:

    ratio     T = sum Var(l) / sum mean(l), over heads and answering queries, of the logits l before
              the softmax, each visible key alike: the rule that the paper's reviewers describe. It
              needs no label. It isn't gauge invariant: a constant added to l changes it.
    posterior the same moments with each key weighted as the head attends to it
    labels    the paper's T* for this loss: 1/T = 1 - g/h with z' = dz/d(1/T) the change of the
              label logits z, g = mean sum (p - y) z', h = mean Var_p(z'), one Gauss-Newton step
    search    the best of a grid by loss
    output    no temperature of attention, but one that divides the scores, best by loss

Changes of loss and accuracy are paired with T = 1 by context. Finished cells are kept. Writes
benchmarks/results/in_context.json, a record for each model.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import _bench
import torch
from _lengths import Cells, spread
from _recall import Packed, answer_logits, pack
from _regression import Setting, drawn, moments, pretrained
from scipy.optimize import minimize_scalar
from torch import Tensor

from tempering import Profile, load_model, sample_text, tempered
from tempering.attention import layout
from tempering.attention.hooks import interface_patch
from tempering.attention.logits import sliced_logits
from tempering.evaluation.paired import mean_estimate
from tempering.evaluation.recall import Recall
from tempering.posterior import heat_capacity, mean_energy

KINDS = ("fiction", "play", "code", "reference")
WORDS = 12  # of a passage
STEP = 0.1  # of 1/T, for the change of the logits
BELOW, ABOVE = 1 / (1 + STEP), 1 / (1 - STEP)
GRID = (0.75, BELOW, 1.0, ABOVE, 1.3, 1.6, 2.0, 2.5, 3.2)
SMALLEST = 0.02  # of temperatures that are measured; 1/SMALLEST is the largest
WIDEST = math.log(100)  # of log T, searched to either side


def settings(size: int, examples: int) -> tuple[Setting, dict[str, Setting]]:
    """What weights are pretrained on, and what they are tested on; w x has variance 1 at first."""
    ones = torch.ones(size, dtype=torch.float64)
    base = Setting(ones, ones / size, 0.1, examples)
    uneven = torch.logspace(-0.6, 0.6, size, dtype=torch.float64)
    return base, {
        "none": base,
        "inputs, twice the covariance": Setting(2 * ones, base.tasks, 0.1, examples),
        "inputs, uneven covariance": Setting(uneven, base.tasks, 0.1, examples),
        "tasks, three times the covariance": Setting(ones, 3 * base.tasks, 0.1, examples),
        "noise, 0.1 to 1": Setting(ones, base.tasks, 1.0, examples),
        "noise, 0.1 to 3": Setting(ones, base.tasks, 3.0, examples),
        "examples, four times as many": Setting(ones, base.tasks, 0.1, 4 * examples),
        "examples, half as many": Setting(ones, base.tasks, 0.1, examples // 2),
    }


def regression(size: int, examples: int, prompts: int, seeds: int) -> dict[str, Any]:
    """For each shift: T in closed form, by search and from measured moments; errors."""
    base, shifts = settings(size, examples)
    weights = pretrained(base)
    found = {}
    for name, setting in shifts.items():
        exact = moments(weights, setting)
        each: dict[str, list[float]] = {}
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            first, second = (drawn(weights, setting, prompts, generator) for _ in range(2))
            seen, test = first.measured(), second.measured()
            sharpness = 0.5 / float(first.scores.std())
            ways = {
                "": (seen.error, test.error),
                "softmax ": (
                    partial(first.softmax_error, sharpness=sharpness),
                    partial(second.softmax_error, sharpness=sharpness),
                ),
            }
            row = {"error of ridge": float(second.bayes.mean())}
            for way, (searched, tested) in ways.items():
                best = by_search(searched)
                row |= {
                    f"{way}T by search": best,
                    f"{way}error at 1": tested(1.0),
                    f"{way}error at closed form": tested(exact.best),
                    f"{way}error by search": tested(best),
                }
            for key, value in row.items():
                each.setdefault(key, []).append(value)
        found[name] = {"T in closed form": exact.best, "error expected at 1": exact.error(1.0),
                       "error expected at closed form": exact.error(exact.best)}  # fmt: skip
        for key, values in each.items():
            mean = mean_estimate(values)
            found[name][key] = [mean.value, mean.low, mean.high]
        own = found[name]
        print(f"{name:36} T {exact.best:7.3f}  search {_told(own['T by search'])}  softmax "
              f"{_told(own['softmax T by search'])}\n{'':36} error at 1 {_told(own['error at 1'])}"
              f"  closed form {_told(own['error at closed form'])}  ridge "
              f"{_told(own['error of ridge'])}", flush=True)  # fmt: skip
    return found


def by_search(error: Callable[[float], float]) -> float:
    """The temperature of the least error."""
    found = minimize_scalar(
        lambda log_t: error(math.exp(log_t)), bounds=(-WIDEST, WIDEST), method="bounded"
    )
    return math.exp(found.x)


def _told(value: Sequence[float]) -> str:
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def check_closed_form() -> None:
    """The closed form beside a mean over drawn prompts, within 4 standard errors at every T."""
    base, shifts = settings(6, 12)
    weights = pretrained(base)
    generator = torch.Generator().manual_seed(0)
    for name, setting in shifts.items():
        prompts = drawn(weights, setting, 60_000, generator)
        exact = moments(weights, setting)
        for temperature in (0.5, 1.0, exact.best, 4.0):
            errors = (prompts.left - prompts.shift / temperature).square()
            gap = float(errors.mean()) - exact.error(temperature)
            room = 4 * float(errors.std()) / len(errors) ** 0.5
            if not abs(gap) < room:
                raise SystemExit(f"{name}, T {temperature:g}: {gap:+.4f} is beyond {room:.4f}")
    best = moments(weights, base).best
    if not math.isclose(best, 1.0, rel_tol=1e-9):
        raise SystemExit(f"weights pretrained at T = 1 have their best T at {best:g}")
    print("the closed form agrees with means over prompts")


@cache
def passages(kind: str, part: str) -> list[str]:
    """Consecutive passages of a half of a text."""
    words = sample_text(kind).split()
    half = len(words) // 2
    own = words[:half] if part == "learn" else words[half:]
    return [" ".join(own[i : i + WORDS]) for i in range(0, len(own) - WORDS, WORDS)]


def context(tokenizer: Any, part: str, wrong: float, number: int, seed: int) -> Packed:
    """Eight examples, two of a kind, of which a share has another label; eight questions."""
    rng = random.Random(f"{part} {number} {seed}")  # the same passages with every share
    shown = [kind for kind in KINDS for _ in range(2)]
    asked = [kind for kind in KINDS for _ in range(2)]
    rng.shuffle(shown)
    rng.shuffle(asked)
    drawn_of = {kind: rng.sample(passages(kind, part), 4) for kind in KINDS}
    bad = set(rng.sample(range(len(shown)), len(shown))[: round(wrong * len(shown))])
    others = [rng.choice([k for k in KINDS if k != kind]) for kind in shown]
    lines = [
        f"Text: {drawn_of[kind].pop()}\nKind: {others[i] if i in bad else kind}"
        for i, kind in enumerate(shown)
    ]
    pairs = tuple((f"Text: {drawn_of[kind].pop()}\nKind:", f" {kind}") for kind in asked)
    return pack(tokenizer, Recall("\n\n".join(lines), pairs, "kinds", "labels"))


class Moments:
    """Sums of Var(l) and mean(l) over heads and answering queries; of each key, or as attended."""

    def __init__(self, model: Any, sources: Tensor) -> None:
        self.modules = {id(model.get_submodule(x.name)) for x in layout(model).layers}
        self.sources = sources
        self.sums = torch.zeros(2, 2, dtype=torch.float64)  # [uniform or attended, Var or mean]

    def wrap(self, function: Any, eager: Any) -> Any:
        def attention(module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kwargs):
            if id(module) in self.modules:
                for part in sliced_logits(module, query, key, mask, kwargs, self.sources):
                    self.add(part.double())
            return function(module, query, key, value, mask, **kwargs)

        return attention

    def add(self, logits: Tensor) -> None:
        seen = logits.isfinite()
        count = seen.sum(-1)
        mean = logits.masked_fill(~seen, 0).sum(-1) / count
        gaps = (logits - mean[..., None]).masked_fill(~seen, 0)
        self.sums[0] += torch.stack([(gaps.square().sum(-1) / count).sum(), mean.sum()])
        attended = torch.stack([heat_capacity(-logits).sum(), -mean_energy(-logits).sum()])
        self.sums[1] += attended


@torch.no_grad()
def scores(model: Any, item: Packed, labels: Tensor) -> list[list[float]]:
    """The logits of the labels, [questions][labels]."""
    return answer_logits(model, item)[:, labels].double().tolist()


@torch.no_grad()
def measured(model: Any, item: Packed) -> list[list[float]]:
    found = Moments(model, item.sources)
    with interface_patch.watched(found.wrap):
        answer_logits(model, item)
    return found.sums.tolist()


def calibrated(z: Tensor) -> Tensor:
    """Log-probabilities less their means over the questions of a context, [.., questions, labels].

    It needs no label, and takes out what a context makes likely whatever is asked.
    """
    z = z.log_softmax(-1)
    return z - z.mean(-2, keepdim=True)


def losses(z: Tensor, goals: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(z, goals, reduction="none")


def loss_at(z: Tensor, goals: Tensor, temperature: float) -> float:
    return float(losses(z / temperature, goals).mean())


def positive(temperature: float) -> float | None:
    """A temperature that a formula gave; None where it gave none."""
    return temperature if 0 < temperature < math.inf else None


def from_labels(colder: Tensor, z: Tensor, hotter: Tensor, goals: Tensor) -> float | None:
    """1/T = 1 - g/h; colder and hotter: z at 1/T = 1 + STEP and 1 - STEP."""
    slope = (colder - hotter) / (2 * STEP)
    p = z.softmax(-1)
    y = torch.nn.functional.one_hot(goals, z.shape[-1])
    g = ((p - y) * slope).sum(-1).mean()
    h = ((p * slope.square()).sum(-1) - (p * slope).sum(-1).square()).mean()
    beta = 1 - float(g / h)
    return positive(1 / beta) if beta else None


def few_shots(name: str, options: Any) -> dict[str, Any]:
    """For each share of wrong labels: T by each rule, and what it does on held-out prompts."""
    model, tokenizer = load_model(name)
    ids = [tokenizer(f" {kind}", add_special_tokens=False).input_ids for kind in KINDS]
    if any(len(own) != 1 for own in ids):
        raise SystemExit(f"{name} cuts a label into several tokens: {ids}")
    labels = torch.tensor([own[0] for own in ids])
    cells = Cells(options.keep.with_suffix(f".{name}.json"), {"seed": options.seed})
    made = cache(lambda part, wrong, i: context(tokenizer, part, wrong, i, options.seed))

    def raw(part: str, wrong: float, temperature: float, count: int) -> tuple[Tensor, Tensor]:
        """Logits of the labels as they are."""
        z, goals = [], []
        with tempered(model, Profile.from_schedule(temperature, model)):
            for i in range(count):
                item = made(part, wrong, i)
                key = f"{part} {wrong:g} T {temperature:.4f} | {i}"
                z.append(cells.get(key, partial(scores, model, item, labels)))
                goals.append([int((labels == goal).nonzero()) for goal in item.goals])
        return torch.tensor(z, dtype=torch.float64), torch.tensor(goals)

    def answers(part: str, wrong: float, temperature: float, count: int) -> tuple[Tensor, Tensor]:
        """Scores [contexts, questions, labels] and goals [contexts, questions] at a T."""
        z, goals = raw(part, wrong, temperature, count)
        return calibrated(z), goals

    found = {}
    for wrong in options.wrong:
        seen = {T: answers("learn", wrong, T, options.learn) for T in GRID}
        mean_loss = {
            T: float(losses(z.flatten(0, 1), goals.flatten()).mean())
            for T, (z, goals) in seen.items()
        }
        sums = torch.zeros(2, 2, dtype=torch.float64)
        for i in range(options.learn):
            item = made("learn", wrong, i)
            key = f"learn {wrong:g} moments | {i}"
            sums += torch.tensor(
                cells.get(key, partial(measured, model, item)), dtype=torch.float64
            )
        near = [seen[T][0].flatten(0, 1) for T in (BELOW, 1.0, ABOVE)]
        chosen = {
            "ratio": positive(float(sums[0, 0] / sums[0, 1])),
            "posterior": positive(float(sums[1, 0] / sums[1, 1])),
            "labels": from_labels(*near, seen[1.0][1].flatten()),
            "search": min(mean_loss, key=mean_loss.__getitem__),
        }
        plain = answers("test", wrong, 1.0, options.test)
        base = of_contexts(*plain)
        own: dict[str, Any] = {
            "moments": sums.tolist(), "loss by T": {f"{T:.3f}": v for T, v in mean_loss.items()},
            "untempered": {m: v.mean().item() for m, v in base.items()},
            "not calibrated": {m: v.mean().item() for m, v in of_contexts(
                *raw("test", wrong, 1.0, options.test)).items()},
        }  # fmt: skip
        print(f"\n{name}, {wrong:.0%} wrong: {own['untempered']}", flush=True)
        for rule, temperature in chosen.items():
            if temperature is not None and SMALLEST <= temperature <= 1 / SMALLEST:
                after = of_contexts(*answers("test", wrong, temperature, options.test))
                own[rule] = compared(rule, temperature, after, base)
            else:
                own[rule] = {"T": temperature}
                print(f"  {rule:10} T {temperature}: not measured", flush=True)
        z, goals = (item.flatten(0, 1) for item in seen[1.0])
        level = by_search(partial(loss_at, z, goals))
        own["output"] = compared("output", level, of_contexts(plain[0] / level, plain[1]), base)
        found[f"{wrong:g}"] = own
    return found


def compared(
    rule: str, temperature: float, after: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Any]:
    """T, and {metric: value, change from T = 1 with its interval}, printed and returned."""
    found: dict[str, Any] = {"T": temperature}
    for metric, values in after.items():
        gaps = (values - base[metric]).tolist()
        found[metric] = [values.mean().item(), *spread(gaps, range(len(gaps)))]
    told = (f"{m} {v[1]:+.3f} [{v[2]:+.3f}, {v[3]:+.3f}]" for m, v in found.items() if m != "T")
    print(f"  {rule:10} T {temperature:.3f}  " + "  ".join(told), flush=True)
    return found


def of_contexts(z: Tensor, goals: Tensor) -> Mapping[str, Tensor]:
    """Loss and accuracy of each context."""
    each = losses(z.flatten(0, 1), goals.flatten()).view(goals.shape)
    return {"loss": each.mean(1), "accuracy": (z.argmax(-1) == goals).double().mean(1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["smollm2", "gemma3-270m"])
    parser.add_argument("--only", choices=["regression", "few shots"])
    parser.add_argument("--size", type=int, default=16, help="dimensions of the inputs")
    parser.add_argument("--examples", type=int, default=48, help="of regression, in a prompt")
    parser.add_argument("--prompts", type=int, default=4000, help="of each seed")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--wrong", type=float, nargs="+", default=[0.0, 0.25, 0.5])
    parser.add_argument("--learn", type=int, default=8, help="contexts of 8 questions")
    parser.add_argument("--test", type=int, default=16, help="contexts of 8 questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("runs/in_context.json"))
    parser.add_argument("--quick", action="store_true", help="a check and a few prompts; no record")
    options = parser.parse_args()
    check_closed_form()
    if options.quick:
        options.prompts, options.seeds, options.model = 500, 3, options.model[:1]
        options.wrong, options.learn, options.test = [0.25], 2, 2
        options.keep = options.keep.with_suffix(".quick.json")
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    named = {k: v for k, v in vars(options).items() if k not in ("keep", "model", "only", "quick")}
    if options.only != "few shots":
        closed = regression(options.size, options.examples, options.prompts, options.seeds)
        if not options.quick:
            _bench.write("in_context", {"settings": named, "shifts": closed}, "regression")
    for name in options.model if options.only != "regression" else []:
        shots = few_shots(name, options)
        if not options.quick:
            _bench.write("in_context", {"settings": named, "wrong labels": shots}, name)


if __name__ == "__main__":
    main()
