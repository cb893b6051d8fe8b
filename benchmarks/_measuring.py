"""What contenders do to recall and to text, beside the untempered model, as rows of evidence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _recall import Packed, answered, pack
from _texts import cut, shares, testing, token_losses

from tempering.chunks import start_ids
from tempering.evaluation.clusters import cluster_bootstrap
from tempering.evaluation.evidence import Contender, EvidenceRow
from tempering.evaluation.recall import recall
from tempering.evaluation.recall_pools import WORDINGS

# Held back: wordings that no tuning here has seen. Five drawn by chance from the sentences that are
# asked about in their own words, five notations, and six that are asked about in other words.
HELD = {
    "sentence": ("score", "note", "said", "capital", "means"),
    "notation": ("xml", "csv", "arrow", "table", "python"),
    "rephrased": ("question", "belongs", "told", "badge", "ticket", "shelf"),
}
SINGLE = "recall, secret code"
NAMED = {wording[0]: place for place, wording in enumerate(WORDINGS)}
# Kinds of the first trials, to which the targets refer.
BASIC_VALUES, BASIC_KEYS = ("digits", "word", "two words", "code"), ("names", "things")
Tests = Mapping[str, Sequence[Any]]


def recall_tests(tokenizer: Any, contexts: int, single: int, seed: int = 0) -> dict[str, list[Any]]:
    """{test: packed contexts of 16 facts and 8 questions}: wordings held back, and the first one.

    contexts: of each held-back wording. single: of "The secret code for K is V.", with 4 digits.
    """
    found: dict[str, list[Any]] = {}
    for kind, name in ((kind, name) for kind, own in HELD.items() for name in own):
        for place in range(contexts):
            number = seed * 100_000 + place * 100 + NAMED[name]
            item = recall(
                number,
                wording=NAMED[name],
                value=BASIC_VALUES[place % 4],
                keys=BASIC_KEYS[place % 2],
            )
            found.setdefault(f"recall, {kind}, {name}", []).append(pack(tokenizer, item))
    for place in range(single):
        item = recall(
            seed * 100_000 + 70_000 + place, wording=0, value="digits", keys=BASIC_KEYS[place % 2]
        )
        found.setdefault(SINGLE, []).append(pack(tokenizer, item))
    return found


def text_tests(tokenizer: Any, length: int, chunks: int | None = None) -> dict[str, list[Any]]:
    """{test: chunks of token ids}; chunks: of each kind at most, spread evenly."""
    found = {}
    for kind, ids in testing(tokenizer).items():
        own = cut(ids, length, start_ids(tokenizer))
        if chunks == 0:
            continue
        if chunks is not None and chunks < len(own):
            own = [own[int(i)] for i in torch.linspace(0, len(own) - 1, chunks).round()]
        found[f"text, {length}, {kind}"] = own
    return found


class Measurer:
    """Runs contenders on tests; the untempered model's runs serve all of them.

    few: contexts or chunks of a test that controls are measured on; all without it.
    """

    def __init__(
        self,
        model: Any,
        tests: Tests,
        *,
        few: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.tests, self.few, self.say = model, tests, few, say
        self.before = self._seen(Contender("", "", 0, contextlib.nullcontext))

    def rows(self, rivals: Sequence[Contender]) -> list[EvidenceRow]:
        """Rows for every contender on every test, paired with the untempered model.

        Rows of text come for all tokens, and for the last eighth of a chunk.
        """
        found = []
        for rival in rivals:
            seen = self._seen(rival)
            for name in self.tests:
                for metric, after in seen[name].items():
                    before = self.before[name][metric][: len(after)]
                    found.append(_row(name, metric, rival, before, after))
        return found

    def _seen(self, rival: Contender) -> dict[str, Any]:
        count = self.few if rival.family == "control" else None
        with rival.active(), torch.no_grad():
            seen = {name: _run(self.model, own[:count]) for name, own in self.tests.items()}
        self.say(f"{rival.label or 'untempered'}: {_summary(seen)}")
        return seen


def measure(
    model: Any, tests: Tests, rivals: Sequence[Contender], *, few: int | None = None
) -> list[EvidenceRow]:
    """Rows for every contender on every test; see `Measurer`."""
    return Measurer(model, tests, few=few).rows(rivals)


def _run(model: Any, items: Sequence[Any]) -> dict[str, torch.Tensor]:
    if isinstance(items[0], Packed):
        both = torch.tensor([answered(model, item) for item in items], dtype=torch.float64)
        return {"loss": both[:, 0], "accuracy": both[:, 1]}
    losses = torch.stack([token_losses(model, ids) for ids in items]).double()
    parts = shares(losses)
    return {"loss": parts["all"], "loss, last eighth": parts["last eighth"]}


def _summary(found: dict[str, Any]) -> str:
    told = []
    for name, parts in found.items():
        metric = "accuracy" if "accuracy" in parts else "loss"
        told.append(f"{name} {float(parts[metric].mean()):.3f}")
    return "; ".join(told)


def _row(name: str, metric: str, rival: Contender, before: Any, after: Any) -> EvidenceRow:
    last = metric == "loss, last eighth"
    return EvidenceRow(
        label=rival.label,
        family=rival.family,
        numbers=rival.numbers,
        test=f"last eighth of {name}" if last else name,
        metric="loss" if last else metric,
        untempered=float(before.mean()),
        value=float(after.mean()),
        change=cluster_bootstrap(
            after - before, torch.ones_like(after), torch.arange(len(after)), seed=0
        ),
        targets=len(after),
        seed=0,
    )


def pooled(
    rows: Sequence[EvidenceRow], label: str, tests: str, metric: str
) -> tuple[float, float, float, float]:
    """Mean change over all tests whose names start so, each counting alike; interval; mean value.

    The interval is normal, from the tests' own standard errors; NaN where one has a single cluster.
    """
    own = [
        row
        for row in rows
        if row.label == label and row.metric == metric and row.test.startswith(tests)
    ]
    mean = sum(row.change.value for row in own) / len(own)
    error = sum(row.change.se**2 for row in own) ** 0.5 / len(own)
    value = sum(row.value for row in own) / len(own)
    return mean, mean - 1.96 * error, mean + 1.96 * error, value
