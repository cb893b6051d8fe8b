"""llama.cpp on the embedded model, baked in place: its log probabilities, folded and not.

    pip install cyllama
    python benchmarks/in_place_llamacpp.py [FORMAT ...] [--turns 9]

Q4_1 is the file that the model comes in; the others are made from it by llama.cpp's quantiser. For
each: the mean and the largest difference, in nats, between llama.cpp's log probabilities and this
process's on 64 tokens of text, for the file as it is and for the folded file against the tempered
model; how far the temperatures move them; and the folded file's processor time for a prompt. The
temperatures are the gallery's repair of the format where there is one.
Writes benchmarks/results/in_place_llamacpp.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _bench
import torch
from _compressed import quantised_file
from cyllama.llama import llama_cpp as llama

from tempering.attention import Profile, tempered
from tempering.data import sample_text
from tempering.data.gallery import gallery
from tempering.engines.checkpoints.gguf import bake_gguf
from tempering.engines.loading.gguf_files import embedded_gguf, load_gguf

# Where llama.cpp gives up it would start a debugger on this process, which may never end.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
LENGTH = 64


class Model(llama.LlamaModel):
    """cyllama 0.2's contexts ask their model for `n_vocab`, which it lacks."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


def context_of(path: Path, length: int) -> Any:
    """A llama.cpp context on one thread; the model stays alive with it."""
    settings = llama.LlamaContextParams()
    settings.n_ctx = settings.n_batch = length
    settings.n_threads = settings.n_threads_batch = 1
    model = Model(str(path), llama.LlamaModelParams())
    return model, llama.LlamaContext(model, settings)


def logprobs(context: Any, ids: list[int]) -> torch.Tensor:
    batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for place, token in enumerate(ids):
        batch.add(token, place, [0], True)
    context.decode(batch)
    rows = [list(context.get_logits_ith(place)) for place in range(len(ids))]
    return torch.tensor(rows, dtype=torch.float64).log_softmax(-1)


def profile_for(name: str) -> tuple[Profile, str]:
    """The gallery's repair of this format, or temperatures drawn from [.67, 1.49]."""
    known = f"smollm2-{name.lower()}/repair"
    if known in gallery():
        return Profile.load(known), known
    share = torch.rand(30, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Profile.from_matrix(torch.exp((share * 2 - 1) * 0.4)), "drawn"


def prompts(paths: dict[str, Path], ids: list[int], turns: int) -> dict[str, dict[str, float]]:
    """Time of a prompt in llama.cpp, the files in turns; the work is the decoding alone."""
    runs: dict[str, Callable[[], object]] = {}
    held = []
    for label, path in paths.items():
        model, context = context_of(path, len(ids) * (turns + 1))
        held.append((model, context))
        places = iter(range(0, len(ids) * (turns + 1), len(ids)))

        def run(context: Any = context, places: Any = places) -> None:
            start = next(places)
            batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
            for place, token in enumerate(ids):
                batch.add(token, start + place, [0], False)
            context.decode(batch)

        runs[label] = run
    return _bench.ratios(_bench.interleave(runs, turns, clock=time.process_time), "as it is")


def measure(name: str, folder: Path, turns: int) -> dict[str, Any]:
    cold = embedded_gguf("smollm2") if name == "Q4_1" else quantised_file(name, folder)
    warm = folder / f"{name}-warm.gguf"
    profile, source = profile_for(name)
    result = bake_gguf(cold, profile, warm, in_place=True)
    model, tokenizer = load_gguf(cold)
    ids = tokenizer(sample_text("demo"))["input_ids"][:LENGTH]
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        with tempered(model, profile):
            wanted = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    errors = {}
    for label, path, exact in (("unfolded", cold, plain), ("folded", warm, wanted)):
        _held, context = context_of(path, LENGTH)
        errors[label] = (logprobs(context, ids) - exact).abs()
    return {
        "format": name,
        "profile": source,
        "types": result.kept,
        "same size": cold.stat().st_size == warm.stat().st_size,
        "rounding": result.rounding,
        **{
            f"{label}, {what}": float(getattr(error, what)())
            for label, error in errors.items()
            for what in ("mean", "max")
        },
        "moved by the temperatures": float((wanted - plain).abs().mean()),
        "time of a prompt, folded": prompts({"as it is": cold, "folded": warm}, ids, turns)[
            "folded"
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=["Q4_1", "Q2_K", "Q4_0", "Q4_K_M", "Q8_0"])
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    llama.disable_logging()
    rows = []
    for name in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder), options.turns))
            print(json.dumps(rows[-1]), flush=True)
    _bench.write("in_place_llamacpp", {"tokens": LENGTH, "rows": rows})


if __name__ == "__main__":
    main()
