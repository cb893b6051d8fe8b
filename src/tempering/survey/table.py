"""The table of verdicts as Markdown, the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tempering.attention.baking.foldable import PER_HEAD, PER_LAYER
from tempering.survey.families import CAUSAL, ENCODER, ENCODER_DECODER
from tempering.survey.judge import (
    EXACT,
    NO_SOFTMAX,
    NOT_BUILT,
    REFUSED,
    UNSUPPORTED,
    WRONG,
    Verdict,
)

COLUMNS = ("Type", "Class", "eager", "sdpa", "Decoding", "Bakes", "Attention", "Why not more")
_TITLES = {
    CAUSAL: "Causal language models",
    ENCODER: "Encoders",
    ENCODER_DECODER: "Encoder-decoders",
}
_HEAD = """# Architectures

Made by `make architectures`, which builds a tiny random model of every architecture of
transformers {transformers} and tries it (torch {torch}, float32, CPU). The same tries run on your
own model, with its weights and configuration, when it is first tempered.

**exact**: at every attention call of a forward pass and of a decoding step, random temperatures
per head give softmax(logits / T) V of a float64 reference to float32 rounding; T = 1 reproduces
the original bit for bit; every layer is reached; and rows of a batch with profiles of their own
come out as each does alone. **refused**: `tempered` raises an error with the reason. **no
softmax**: it calls none over tokens, so there is nothing to temper, and `tempered` says so.
**unsupported**: transformers offers no such implementation for it. **not built**: transformers
itself can't make it here.

**Decoding**: greedy decoding with a cache gives the logits of full forward passes, under random
temperatures. **Bakes**: what `tempering bake` folds into the weights, verified by folding random
temperatures. **Attention**: the route (transformers' attention interface, or the model's own
softmax calls), what else its logits hold, and "+ n left alone" where n layers or modules have no
softmax over tokens or are not reached by text.
"""


def document(verdicts: Sequence[Verdict], versions: dict[str, str]) -> str:
    """The whole page: what the words mean, counts, and a table for each family."""
    parts = [_HEAD.format(**versions)]
    for family, title in _TITLES.items():
        rows = [verdict for verdict in verdicts if verdict.family == family]
        if rows:
            header = [_cells(COLUMNS), _cells(["---"] * len(COLUMNS))]
            table = "\n".join([*header, *(row(verdict) for verdict in rows)])
            parts.append(f"## {title}\n\n{summary(rows)}\n\n{table}\n")
    return "\n".join(parts)


def summary(verdicts: Sequence[Verdict]) -> str:
    """Counts in words."""
    eager = Counter(verdict.eager for verdict in verdicts)
    sdpa = Counter(verdict.sdpa for verdict in verdicts)
    bakes = Counter(verdict.bake for verdict in verdicts if verdict.eager == EXACT)
    per_layer = bakes[PER_HEAD] + bakes[PER_LAYER]
    offered = eager[EXACT] - sdpa[UNSUPPORTED]
    return (
        f"{len(verdicts)} architectures: {eager[EXACT]} exact in eager attention, "
        f"{eager[REFUSED]} refused, {eager[WRONG]} wrong, {eager[NO_SOFTMAX]} without softmax, "
        f"{eager[NOT_BUILT]} not built; {sdpa[EXACT]} exact in sdpa of {offered} that offer it; "
        f"{bakes[PER_HEAD]} bake per head, {per_layer} at least per layer."
    )


def row(verdict: Verdict) -> str:
    """One line of the table."""
    attention = " + ".join([verdict.route, *verdict.features]) if verdict.route else ""
    if verdict.untempered:
        attention += f" (+ {verdict.untempered} left alone)"
    bakes = verdict.bake if verdict.eager == EXACT else ""
    return _cells(
        [
            verdict.model_type,
            verdict.model_class,
            verdict.eager,
            verdict.sdpa,
            verdict.decoding,
            bakes,
            attention,
            why(verdict),
        ]
    )


def why(verdict: Verdict) -> str:
    """Why a verdict is not all that it could be."""
    reasons = [verdict.reason]
    if verdict.eager == EXACT and verdict.bake != PER_HEAD:
        reasons.append(f"bakes: {verdict.bake_reason}")
    return "; ".join(reason for reason in reasons if reason)


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"
