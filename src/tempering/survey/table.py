"""The table of verdicts as Markdown, the same on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tempering.attention.baking.foldable import PER_HEAD, PER_LAYER
from tempering.survey.families import (
    AUDIO,
    CAUSAL,
    ENCODER,
    ENCODER_DECODER,
    MULTIMODAL,
    OTHER,
    VIDEO,
    VISION,
)
from tempering.survey.judge import (
    EXACT,
    NO_SOFTMAX,
    NOT_BUILT,
    NOT_RUN,
    REFUSED,
    UNSUPPORTED,
    WRONG,
    Verdict,
)

COLUMNS = ("Type", "Class", "eager", "sdpa", "Decoding", "Bakes", "Attention", "Why not more")
_TITLES = {
    CAUSAL: "Causal language models",
    ENCODER: "Text encoders and other text models",
    ENCODER_DECODER: "Text encoder-decoders",
    VISION: "Images",
    AUDIO: "Sound and speech",
    VIDEO: "Video",
    MULTIMODAL: "Text with images, sound or video",
    OTHER: "Series, decisions and the rest",
}
_HEAD = """# Architectures

Made by `make architectures`, which builds a tiny random model of every class that an auto class of
transformers {transformers} knows, and tries it (torch {torch}, float32, CPU). The same tries run on
your own model, with its weights and configuration, when it is first tempered.

**exact**: at every attention call of a forward pass and of a decoding step, random temperatures
per head give softmax(logits / T) V of a float64 reference to float32 rounding; T = 1 reproduces
the original bit for bit; every layer is reached; and rows of a batch with profiles of their own
come out as each does alone. **refused**: `tempered` raises an error with the reason. **no
softmax**: it calls none over tokens, so there is nothing to temper, and `tempered` says so.
**unsupported**: transformers offers no such implementation for it. **not built**: transformers
itself can't make it here. **not run**: no inputs made here (images, sound, frames, series, tokens)
make it run, so nothing is known about it.

**Class**: the main class of a model type, and the heads (+) that gave the same verdict. Heads
attend by the modules of the main class; decoding and baking were tried on that one alone.
**Decoding**: greedy decoding with a cache gives the logits of full forward passes, under random
temperatures. **Bakes**: what `tempering bake` folds into the weights, verified by folding random
temperatures. **Attention**: the route (transformers' attention interface, or the model's own
softmax calls), what else its logits hold, "one profile" where rows of a batch can't be told apart
(attention in windows, frames or packed inputs), so that all share one, and "+ n left alone" where n
layers or modules have no softmax over tokens or are not reached by the inputs.
"""


def document(verdicts: Sequence[Verdict], versions: dict[str, str]) -> str:
    """The whole page: what the words mean, counts, and a table for each family."""
    parts = [_HEAD.format(**versions)]
    groups = grouped(verdicts)
    for family, title in _TITLES.items():
        rows = [group for group in groups if group[0].family == family]
        if rows:
            header = [_cells(COLUMNS), _cells(["---"] * len(COLUMNS))]
            table = "\n".join([*header, *(row(*group) for group in rows)])
            classes = [verdict for group in rows for verdict in group]
            parts.append(f"## {title}\n\n{summary(classes)}\n\n{table}\n")
    return "\n".join(parts)


def grouped(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    """Verdicts of one row each: a main class with the heads of its type that agree with it."""
    groups: list[list[Verdict]] = []
    for verdict in verdicts:
        alike = None
        if not verdict.whole:
            alike = next((group for group in groups if _agree(group[0], verdict)), None)
        if alike is None:
            groups.append([verdict])
        else:
            alike.append(verdict)
    return groups


def _agree(main: Verdict, head: Verdict) -> bool:
    """Whether the verdict on a head says nothing that the row of another class doesn't."""
    told = ("model_type", "eager", "sdpa", "reason", "route", "features", "rows")
    return all(getattr(main, name) == getattr(head, name) for name in told)


def summary(verdicts: Sequence[Verdict]) -> str:
    """Counts in words."""
    eager = Counter(verdict.eager for verdict in verdicts)
    sdpa = Counter(verdict.sdpa for verdict in verdicts)
    main = [verdict for verdict in verdicts if verdict.eager == EXACT and verdict.whole]
    bakes = Counter(verdict.bake for verdict in main)
    per_layer = bakes[PER_HEAD] + bakes[PER_LAYER]
    offered = eager[EXACT] - sdpa[UNSUPPORTED]
    return (
        f"{len(verdicts)} classes: {eager[EXACT]} exact in eager attention, "
        f"{eager[REFUSED]} refused, {eager[WRONG]} wrong, {eager[NO_SOFTMAX]} without softmax, "
        f"{eager[NOT_BUILT]} not built, {eager[NOT_RUN]} not run; {sdpa[EXACT]} exact in sdpa of "
        f"{offered} that offer it. Of {len(main)} main classes, {bakes[PER_HEAD]} bake per head, "
        f"{per_layer} at least per layer."
    )


def row(verdict: Verdict, *heads: Verdict) -> str:
    """One line of the table."""
    attention = " + ".join([verdict.route, *verdict.features]) if verdict.route else ""
    if not verdict.rows:
        attention += ", one profile"
    if verdict.untempered:
        attention += f" (+ {verdict.untempered} left alone)"
    bakes = verdict.bake if verdict.eager == EXACT and verdict.whole else ""
    names = verdict.model_class
    if heads:
        names += f" + {', '.join(sorted(_short(head, verdict) for head in heads))}"
    return _cells(
        [
            verdict.model_type,
            names,
            verdict.eager,
            verdict.sdpa,
            verdict.decoding,
            bakes,
            attention,
            why(verdict),
        ]
    )


def _short(head: Verdict, main: Verdict) -> str:
    """The name of a head less what it shares with the main class, e.g. ForTokenClassification."""
    stem = main.model_class.split("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
    name = head.model_class
    return name.removeprefix(stem) if name != stem else name


def why(verdict: Verdict) -> str:
    """Why a verdict is not all that it could be."""
    reasons = [verdict.reason]
    if verdict.eager == EXACT and verdict.whole and verdict.bake != PER_HEAD:
        reasons.append(f"bakes: {verdict.bake_reason}")
    return "; ".join(reason for reason in reasons if reason)


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |"
