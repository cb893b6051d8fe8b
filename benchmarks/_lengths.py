"""Texts, models and learned profiles that the benchmarks of length share."""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _texts import DOCS_TOKENS, language_reference, speeches, testing, token_ids
from torch import Tensor

from tempering import Profile, load_model
from tempering.attention.tuning import Objective, from_batches, tune
from tempering.attention.tuning.batches import text_batches
from tempering.chunks import mixed_chunks
from tempering.files import write_atomic

TRAINED = 8192  # tokens of SmolLM2's contexts
# Long texts of which nothing is learned from, by the package's profiles neither.
FAR_YEARS = (1835, 1847, 1858, 1891, 1906, 1911, 1946, 1981)
FAR_MODULES = ("difflib", "logging", "unittest.mock", "_pydecimal")


def testing_texts(tokenizer: Any) -> dict[str, Tensor]:
    """Token ids to test on: second halves, a reference work, more of Python's docs and modules.

    Of the kind of `reference` nothing is learned from.
    """
    import inspect
    from importlib import import_module

    found = testing(tokenizer)
    found["docs"] = token_ids(tokenizer, language_reference())[DOCS_TOKENS:]
    for name in ("argparse", "tarfile", "typing", "inspect"):
        found[name] = token_ids(tokenizer, inspect.getsource(import_module(name)))
    return found


def far_texts(tokenizer: Any) -> dict[str, Tensor]:
    """`testing_texts`, and those that are long: addresses to the Congress and other modules."""
    import inspect
    from importlib import import_module

    found = testing_texts(tokenizer)
    for year, text in zip(FAR_YEARS, speeches(FAR_YEARS), strict=True):
        found[str(year)] = token_ids(tokenizer, text)
    for name in FAR_MODULES:
        found[name] = token_ids(tokenizer, inspect.getsource(import_module(name)))
    return found


def chunks_of(texts: Mapping[str, Tensor], length: int, most: int) -> list[tuple[str, int, Tensor]]:
    """(text, place, ids): at most `most` chunks of each text, spread evenly over it."""
    found = []
    for name, ids in texts.items():
        count = len(ids) // length
        if count == 0:
            continue
        places = torch.linspace(0, count - 1, min(most, count)).round().long().unique().tolist()
        found += [(name, i, ids[i * length : (i + 1) * length]) for i in places]
    return found


def objective(texts: Mapping[str, Tensor], lengths: Sequence[int], rounds: int) -> Objective:
    """Next-token loss on chunks of mixed lengths, so many rounds of each text at most."""
    batches = []
    for name, ids in texts.items():
        wanted = [length for length in lengths if length * len(lengths) <= len(ids)]
        if not wanted:
            continue
        for place, chunk in enumerate(mixed_chunks(ids, wanted, rounds)):
            batches += text_batches(chunk[None], f"{name} {place}")
    # Neighbours of one length run side by side.
    batches.sort(key=lambda batch: batch.ids.shape[1])
    return from_batches("text", batches)


def learned(
    keep: Path,
    name: str,
    model: Any,
    goal: Objective,
    *,
    per: Any = "head",
    rule: str | None = None,
    rows: int,
    steps: int,
    prior_sd: float = 0.5,
) -> Profile:
    """A tuned profile, kept in a file; a run that was stopped goes on."""
    path = keep / f"{name}.json"
    if path.exists():
        print(f"kept: {path}", flush=True)
        return Profile.load(path)
    start = time.time()

    def say(step: Any) -> None:
        print(f"{name}, {time.time() - start:.0f} s: {step}", flush=True)

    found = tune(
        model,
        goal,
        per=per,
        rule=rule,
        rows=rows,
        steps=steps,
        prior_sd=prior_sd,
        damping=0.3,
        patience=2,
        state=keep / f"{name}.state",
        on_step=say,
    )
    found.profile.save(path)
    print(
        f"{name}: {found.before:.4f} -> {found.after:.4f}, {time.time() - start:.0f} s", flush=True
    )
    return found.profile


def opened(quick: bool, dtype: str = "float32") -> tuple[Any, Any]:
    """The embedded model and its tokenizer; its first three layers where only a look is wanted."""
    model, tokenizer = load_model("smollm2", dtype=getattr(torch, dtype))
    if quick:
        model.model.layers = model.model.layers[:3]
        model.config.num_hidden_layers = 3
    return model, tokenizer


def with_scaling(model: Any, rope_type: str, factor: float, trained: int) -> Any:
    """The same weights with positions scaled by one of transformers' methods."""
    if rope_type == "none":
        return model
    config = copy.deepcopy(model.config)
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": rope_type,
        "factor": factor,
        "original_max_position_embeddings": trained,
    }
    # Dynamic NTK takes the trained length from here.
    config.max_position_embeddings = trained if rope_type == "dynamic" else int(trained * factor)
    other = type(model)(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    return other


def position_edges(length: int) -> list[int]:
    """Edges of parts of a context: half octaves from 16 on."""
    edges, place = [0, 16], 16.0
    while place < length - 1:
        place *= math.sqrt(2)
        edges.append(min(round(place), length - 1))
    return sorted(set(edges))


def parts(losses: Tensor, length: int) -> dict[str, Any]:
    """Mean losses of a chunk: of all tokens, of parts, and by position."""
    edges = position_edges(length)
    return {
        "all": float(losses.mean()),
        "first 511": float(losses[:511].mean()),
        "second half": float(losses[length // 2 :].mean()),
        "last eighth": float(losses[-(length // 8) :].mean()),
        "by position": [float(losses[a:b].mean()) for a, b in itertools.pairwise(edges)],
    }


class Cells:
    """Results of many cells in one JSON file, written after each; a later run leaves them out."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.found = path, {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != dict(settings):
                raise SystemExit(f"{path} holds cells of other settings; give another --keep")
            self.found = kept["cells"]
        self.settings = dict(settings)

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of a cell, computed and kept if it is not known."""
        if key not in self.found:
            start = time.time()
            self.found[key] = make()
            write_atomic(
                self.path, json.dumps({"settings": self.settings, "cells": self.found}) + "\n"
            )
            print(f"{key}: {time.time() - start:.1f} s", flush=True)
        return self.found[key]


def spread(values: Sequence[float], clusters: Sequence[int], seed: int = 0) -> list[float]:
    """Mean and 95% interval of paired differences, by a bootstrap over clusters."""
    from tempering.evaluation.clusters import cluster_bootstrap

    table = torch.tensor(list(values), dtype=torch.float64)
    found = cluster_bootstrap(
        table, torch.ones_like(table), torch.tensor(list(clusters)), seed=seed
    )
    return [found.value, found.low, found.high]


def each_place(items: Sequence[Any]) -> Iterator[int]:
    """The number of the first equal item, for every item."""
    first: dict[Any, int] = {}
    for item in items:
        yield first.setdefault(item, len(first))
