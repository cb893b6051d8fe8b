"""What compression takes from the embedded model, and how much of it temperatures give back.

    python benchmarks/repair.py [FORM ...] [--chunks 36] [--passes 1] [--long] [--why]

For each form of compression (benchmarks/_compressed.py lists them and what they need): nats per
token lost on text of four kinds, one of them like nothing that is learned from; the share of it
that comes back by one temperature a head, learned from the uncompressed model; by these and output
scales; by one temperature a layer, by one for all, and by heads' support alone; and under the same
numbers negated and shuffled.
Shares have 95% intervals of a bootstrap over chunks. A form that loses less than --least is only
measured.

--parts: which of these to make anew; the rest stays as it is in the results. --long: also at 2048
tokens, and recall of facts. --why: each head's support before, after, and after repair. --foreign:
forms whose profiles are controls of the part "foreign". Writes benchmarks/results/repair.json, form
by form, and profiles to --keep. Without computing anything, --draw makes the figure and the table
of docs/repair.md from the results, and --gallery puts the forms' profiles with their evidence into
the package.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import _bench
import torch
from _compressed import FORMS, compressed
from _texts import LONG, SHORT, as_objective, calibration, cut, testing
from recall_tuning import GALLERY
from torch import Tensor

from tempering import Profile, load_model, tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.layout import Layout
from tempering.attention.measuring.measure import measure_tokens
from tempering.attention.tuning import Objective, from_pairs
from tempering.attention.tuning.basis import uniform_basis
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.passes import loss_pass
from tempering.attention.tuning.repair import repair, repair_by_support
from tempering.attention.tuning.teacher import teach
from tempering.evaluation.recall import recall
from tempering.evaluation.returned import PieceScores, returned, score
from tempering.reports import Record, figure_repair, save_figure

# Of the one temperature for all heads.
LEVELS = (0.85, 0.95, 1.05, 1.1, 1.2, 1.3)
SUPPORT_CHUNKS = 4
PARTS = ["temperatures", "scales", "layers", "simple", "foreign"]
SCALED = "with output scales"
FIGURE = Path(__file__).parents[1] / "docs/images/repair.svg"
_QUANTISED = "llama-quantize --allow-requantize SmolLM2-135M-Instruct.Q4_1.gguf OUT.gguf "
# Profiles that come with the package: their folder there, the form, and how the model is made. The
# rows of 576 don't divide into K-quants' blocks of 256: Q2_K falls back to the types of Q3_K_S.
RECIPES = {
    "smollm2-3bit": ("round 3 bits", "tempering: --model smollm2-3bit"),
    "smollm2-q2_k": ("Q3_K_S", _QUANTISED + "Q2_K"),
    "smollm2-q3_k_s": ("Q3_K_S", _QUANTISED + "Q3_K_S"),
}


def learned(tokenizer: Any, count: int, seed: int) -> list[Tensor]:
    chunks = [ids for text in calibration(tokenizer).values() for ids in cut(text, SHORT)]
    random.Random(seed).shuffle(chunks)
    return chunks[:count]


def tests_of(tokenizer: Any, chunks: int, long: int) -> dict[str, Objective]:
    """Text of four kinds in one test a length; recall beside the longer one."""
    found = {}
    for length, count in ((SHORT, chunks), (LONG, long)):
        rows = []
        for ids in testing(tokenizer).values() if count else ():
            own = cut(ids, length)
            places = torch.linspace(0, len(own) - 1, min(count, len(own))).round().int().tolist()
            rows += [own[place] for place in places]
        if rows:
            found[f"text, {length} tokens"] = as_objective(f"text, {length} tokens", rows)
    if long:
        pairs = [p for s in range(3) for p in recall(s, wording=0, value="digits").pairs()]
        found["recall of facts"] = from_pairs(tokenizer, pairs, name="recall of facts")
    return found


def kinds_of(tokenizer: Any, chunks: int) -> dict[str, list[int]]:
    """Places of each kind's chunks in the test of short chunks."""
    found, place = {}, 0
    for kind, ids in testing(tokenizer).items():
        count = min(chunks, len(cut(ids, SHORT)))
        found[kind] = list(range(place, place + count))
        place += count
    return found


class Subject:
    """One compressed model, with what is known of the reference and of itself."""

    def __init__(
        self, model: Any, tests: dict[str, Objective], known: dict[str, PieceScores]
    ) -> None:
        self.model, self.tests, self.known = model, tests, known
        self.before = score(model, list(tests.values()), label="compressed")

    def under(self, profile: Profile, names: list[str]) -> dict[str, PieceScores]:
        with tempered(self.model, profile):
            return score(self.model, [self.tests[name] for name in names], label="tempered")

    def rows(self, found: dict[str, PieceScores]) -> dict[str, Any]:
        return {
            name: returned(self.tests[name], self.known[name], self.before[name], scores).row()
            for name, scores in found.items()
        }

    def part(self, found: PieceScores, places: list[int]) -> dict[str, Any]:
        """A row of some of the short chunks."""
        name = next(iter(self.tests))

        def taken(scores: PieceScores) -> PieceScores:
            return PieceScores(*([own[place] for place in places] for own in scores))

        some = self.tests[name].having([self.tests[name].pieces[place] for place in places])
        known, before = taken(self.known[name]), taken(self.before[name])
        return returned(some, known, before, found).row()

    def few(self, profile: Profile, places: list[int]) -> dict[str, Any]:
        """Measured on some of the short chunks only."""
        name = next(iter(self.tests))
        some = self.tests[name].having([self.tests[name].pieces[place] for place in places])
        with tempered(self.model, profile):
            return self.part(score(self.model, [some], label="control")[some.name], places)


def uniform(model: Any, goal: Objective, plan: Layout) -> float:
    """Of LEVELS, the one that is nearest to the teacher on the goal."""
    with live_temperatures(model, uniform_basis(plan), (0.2, 5.0), checkpoint=False) as tunable:
        values = {
            T: loss_pass(tunable, torch.tensor([T]).double().log(), goal.pieces).mean
            for T in (1.0, *LEVELS)
        }
    return min(values, key=values.__getitem__)


def why(reference: Tensor, model: Any, profile: Profile, ids: Tensor) -> dict[str, Any]:
    """What compression does to each head's entropy, and how far it predicts log T."""
    harmed = measure_tokens(model, ids).entropy
    mended = measure_tokens(model, ids, profile=profile).entropy
    change, left = harmed - reference, mended - reference
    log_T = torch.as_tensor(profile.temperature).log()
    pair = torch.stack([log_T.flatten(), -change.flatten()])
    return {
        "change of log support": {"mean": float(change.mean()), "sd": float(change.std())},
        "left after repair": {"mean": float(left.mean()), "sd": float(left.std())},
        "correlation of log T with the loss of log support": float(torch.corrcoef(pair)[0, 1]),
    }


def say(stage: str, done: int, total: int) -> None:
    """A line for every eighth of a stage of the fit."""
    if done % max(1, total // 8) == 0 and not stage.startswith("held"):
        print(f"    {stage}: {done} of {total}", flush=True)


def show(name: str, row: dict[str, Any]) -> None:
    def plain(value: float | None) -> str:
        return "    ?" if value is None else f"{value:+.3f}"

    print(
        f"  {name:28s} lost {row['damage']:+.4f}  share {plain(row['share'])} "
        f"[{plain(row['low'])}, {plain(row['high'])}]  agreement {row['agreement_before']:.3f} -> "
        f"{row['agreement_after']:.3f}",
        flush=True,
    )


def measured(
    name: str, options: Any, stock: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    """What was found of a form before, with the parts that are asked for made anew."""
    reference, tests, known = stock["reference"], stock["tests"], stock["known"]
    model = compressed(name, reference, stock["ids"])
    subject, main = Subject(model, tests, known), next(iter(tests))
    damage = subject.rows(subject.before)
    found = found | {"damage": found.get("damage", {}) | damage}
    for test, row in damage.items():
        print(f"{name}: {test}: {row['reference']:.4f} -> {row['compressed']:.4f}", flush=True)
    if found["damage"][main]["damage"] < options.least:
        return found
    if "temperatures" in options.parts:
        profile = learn(name, model, found, options, stock, output_scales=False)
        found |= under_profile(subject, profile, options, stock)
    if "scales" in options.parts:
        own: dict[str, Any] = {}
        profile = learn(f"{name} with scales", model, own, options, stock, output_scales=True)
        found[SCALED] = own | under_profile(subject, profile, options, stock)
    if "layers" in options.parts:
        goal = stock["goal"].having(stock["goal"].pieces[: options.layers])
        by_layer = repair(
            model, reference, goal, lessons=options.keep / "lessons", passes=1, rows=2, per="layer",
            held_out=options.held_out, output_scales=False,
        )  # fmt: skip
        found["per layer"] = subject.rows(subject.under(by_layer.profile, [main]))[main]
        show("per layer", found["per layer"])
    if "foreign" in options.parts:
        few = [own[0] for own in stock["kinds"].values()]
        for other in options.foreign:
            profile = Profile.load(kept(f"{other} with scales", options.keep))
            row = subject.few(replace(profile, model=None), few)
            found.setdefault(SCALED, {}).setdefault("foreign", {})[other] = row
            show(f"profile of {other}", row)
    if "simple" in options.parts:
        simple(name, model, subject, found, options, stock)
    return found


def learn(
    name: str, model: Any, found: dict[str, Any], options: Any, stock: dict[str, Any], **more: Any
) -> Profile:
    """The profile that is learned, kept under the name; how it went goes into `found`."""
    start = time.monotonic()
    tuned = repair(
        model,
        stock["reference"],
        stock["goal"],
        lessons=options.keep / "lessons",
        passes=options.passes,
        rows=options.rows,
        held_out=options.held_out,
        progress=say,
        **more,
    )
    profile = tuned.profile
    found["learned"] = {
        "seconds": time.monotonic() - start,
        "chunks": options.chunks,
        "passes": options.passes,
        "numbers": len(tuned.theta),
        "held out": [tuned.before, tuned.after],
        "extent": [float(profile.temperature.min()), float(profile.temperature.max())],
        "history": [[step.step, step.held_out] for step in tuned.history],
    }
    print(f"  learned in {found['learned']['seconds']:.0f} s", found["learned"]["history"])
    profile.save(kept(name, options.keep))
    return profile


def under_profile(
    subject: Subject, profile: Profile, options: Any, stock: dict[str, Any]
) -> dict[str, Any]:
    """Rows of every test under a profile, by kind of text, and of its controls."""
    main = next(iter(subject.tests))
    found: dict[str, Any] = {}
    under = subject.under(profile, list(subject.tests))
    found["per head"] = subject.rows(under)
    for test, row in found["per head"].items():
        show(f"per head, {test}", row)
    found["kinds"] = {
        kind: subject.part(PieceScores(*([own[i] for i in places] for own in under[main])), places)
        for kind, places in stock["kinds"].items()
    }
    few = [own[0] for own in stock["kinds"].values()]
    for label, control in (("negated", profile.scaled(-1.0)), ("shuffled", profile.shuffled(0))):
        found[label] = subject.few(control, few)
        show(label, found[label])
    return found


def simple(
    name: str, model: Any, subject: Subject, found: dict[str, Any], options: Any, stock: Any
) -> None:
    """One temperature for the whole model, and temperatures solved from support."""
    main = next(iter(subject.tests))
    T = uniform(model, stock["taught"], layout(model))
    flat = Profile.from_schedule(T, model)
    found["uniform"] = {"T": T} | subject.rows(subject.under(flat, [main]))[main]
    show(f"uniform, T = {T}", found["uniform"])
    try:
        start = time.monotonic()
        solved = repair_by_support(model, stock["entropy"], stock["ids"][:SUPPORT_CHUNKS])
        seconds = time.monotonic() - start
        found["by support"] = subject.rows(subject.under(solved, [main]))[main] | {
            "seconds": seconds
        }
        show("by support", found["by support"])
        if options.why:
            profile = Profile.load(kept(name, options.keep))
            found["why"] = why(stock["entropy"], model, profile, stock["ids"][:SUPPORT_CHUNKS])
            print(" ", found["why"])
    except Exception as error:  # a form that changes attention itself
        found["by support"] = {"refused": str(error)[:200]}
        print(" ", found["by support"])


def draw() -> None:
    """The figure of the docs, and its table on standard output; forms by what they lose."""
    forms = json.loads((_bench.RESULTS / "repair.json").read_text())["forms"]
    main = f"text, {SHORT} tokens"
    order = sorted(forms, key=lambda name: -forms[name]["damage"][main]["damage"])
    rows = []
    print(
        "| form | lost | with output scales | per head | per layer | one T | by support | chunks |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in order:
        found = forms[name]
        lost = found["damage"][main]["damage"]
        cells = [name, f"{lost:.3f}"]
        ways = {
            "temperatures and output scales": found.get(SCALED, {}).get("per head", {}).get(main),
            "one temperature a head": found.get("per head", {}).get(main),
            **{key: found.get(key) for key in ("per layer", "uniform", "by support")},
        }
        for label, own in ways.items():
            share = None if own is None else own.get("share")
            cells.append(
                "" if share is None else f"{share:.2f} [{own['low']:.2f}, {own['high']:.2f}]"
            )
            if share is not None and label == next(iter(ways)):
                text = f"{name}, lost {lost:.2f}"
                rows.append({**own, "label": label, "test": text, "level": 0.95})
        learned_from = [
            str(item["learned"]["chunks"])
            for item in (found.get(SCALED), found)
            if item and "learned" in item
        ]
        cells.append(", ".join(dict.fromkeys(learned_from)) or "not learned")
        print("| " + " | ".join(cells) + " |")
    record = Record.new("repair", settings={}, results={"repair": rows})
    print(save_figure(figure_repair(record), FIGURE))


def to_gallery(folder: str, keep: Path) -> Path:
    """A form's profile, with what it is for and what was measured."""
    name, recipe = RECIPES[folder]
    found = json.loads((_bench.RESULTS / "repair.json").read_text())["forms"][name][SCALED]
    rows = [{"label": "repaired", **row} for row in found["per head"].values()]
    for kind, row in found["kinds"].items():
        rows.append({"label": "repaired", **row, "test": f"{kind}, {SHORT} tokens"})
    for label in ("negated", "shuffled"):
        rows.append({"label": label, **found[label]})
    evidence = {
        "made by": "benchmarks/repair.py",
        "repairs": folder,
        "recipe": recipe,
        "reference": "smollm2",
        "learned": found["learned"],
        "repair": rows,
    }
    profile = replace(Profile.load(kept(f"{name} with scales", keep)), evidence=evidence)
    return profile.save(GALLERY / folder / "repair.json")


def kept(name: str, keep: Path) -> Path:
    return keep / f"{name.replace(' ', '-').replace('%', '')}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("forms", nargs="*", default=list(FORMS))
    parser.add_argument("--chunks", type=int, default=36, help="of 512 tokens to learn from")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--held-out", type=float, default=0.12)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, default=18, help="chunks for one T a layer")
    parser.add_argument("--test-chunks", type=int, default=3, help="of each kind")
    parser.add_argument("--least", type=float, default=0.05)
    parser.add_argument("--long", type=int, default=0, help="chunks of 2048 tokens of each kind")
    parser.add_argument("--why", action="store_true")
    parser.add_argument("--foreign", nargs="*", default=[], choices=list(FORMS))
    parser.add_argument("--keep", type=Path, default=Path("runs/repair"))
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--gallery", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw()
        return
    if options.gallery:
        for folder in RECIPES:
            print(to_gallery(folder, options.keep))
        return
    unknown = [name for name in options.forms if name not in FORMS]
    if unknown:
        raise SystemExit(f"no form {', '.join(unknown)}; there are {', '.join(FORMS)}")
    options.keep.mkdir(parents=True, exist_ok=True)
    if options.measure_only:
        options.least = float("inf")
    reference, tokenizer = load_model("smollm2")
    chunks = learned(tokenizer, options.chunks, 0)
    goal = as_objective("text", chunks)
    tests = tests_of(tokenizer, options.test_chunks, options.long)
    ids = torch.stack(chunks[: 4 * SUPPORT_CHUNKS])
    stock = {
        "reference": reference,
        "goal": goal,
        "taught": teach(reference, goal.having(goal.pieces[:4]), options.keep / "lessons"),
        "tests": tests,
        "kinds": kinds_of(tokenizer, options.test_chunks),
        "known": score(reference, list(tests.values()), label="reference"),
        "ids": ids,
        "entropy": measure_tokens(reference, ids[:SUPPORT_CHUNKS]).entropy,
    }
    path = _bench.RESULTS / "repair.json"
    for name in options.forms:
        known = json.loads(path.read_text())["forms"] if path.exists() else {}
        found = measured(name, options, stock, known.get(name, {}))
        # Another run may have written meanwhile.
        forms = json.loads(path.read_text())["forms"] if path.exists() else {}
        forms[name] = found | {"settings": {"test chunks": options.test_chunks}}
        _bench.write("repair", {"forms": forms})


if __name__ == "__main__":
    main()
