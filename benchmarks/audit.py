"""What `tempering audit` finds: mistakes injected one at a time, false alarms, coverage, time.

    python benchmarks/audit.py tiny --draws 100      # random models; engines in other precisions
    python benchmarks/audit.py embedded --draws 10   # llama.cpp on the embedded model's GGUF
    python benchmarks/audit.py overhead              # of a policy, in decoding by llama.cpp

The last two need cyllama: pip install 'tempering[llamacpp]'. Each line of output is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from tempering.audit import ask, audit, cases, rounded
from tempering.audit.scores import Scored
from tests.integration import audit_tiny as tiny

KINDS = ("llama", "gemma3", "gemma2", "qwen3", "gpt_oss", "granite")


def said(network: Any, ids: torch.Tensor, precision: str, seed: int) -> list[Scored]:
    """An engine of that precision: bfloat16 and float16 run, q8 is rounded as llama.cpp does."""
    if precision in ("bfloat16", "float16"):
        return tiny.said_by(copy.deepcopy(network).to(getattr(torch, precision)), ids)
    with rounded(network, precision, seed + 1):
        return tiny.said_by(network, ids)


def draws(kind: str, precision: str, count: int, temperature: float) -> dict[str, Any]:
    """Verdicts and coverage over draws of prompts, of an engine at one temperature."""
    own = getattr(tiny, kind)().bfloat16().float()
    engine = copy.deepcopy(own)
    for layer in engine.model.layers:
        layer.self_attn.scaling /= temperature
    right = covered = 0
    widths = []
    for seed in range(count):
        found = audit(
            own, said(engine, tiny.prompts(2, 128, seed), precision, seed),
            precision=precision, layers=False, seed=seed,
        )  # fmt: skip
        right += found.right is True
        covered += found.temperature.low <= temperature <= found.temperature.high
        widths.append(found.temperature.high - found.temperature.low)
    return {
        "engine": kind,
        "precision": precision,
        "T": temperature,
        "draws": count,
        "called right": right,
        "interval covers": covered,
        "median width": float(torch.tensor(widths).median()),
    }


def named(kind: str) -> dict[str, Any]:
    """Every mistake of the catalogue, made and then looked for."""
    own = getattr(tiny, kind)()
    ids, wrong = tiny.prompts(2, 128), []
    known = cases(own)
    for case in known:
        with case.change():
            engine = tiny.said_by(own, ids)
        found = audit(own, engine, layers=False)
        if found.candidates[0].name != case.name:
            wrong.append([case.name, found.verdict])
    return {"engine": kind, "mistakes": len(known), "not named first": wrong}


def run_tiny(count: int) -> None:
    for kind in KINDS:
        print(json.dumps(named(kind)), flush=True)
    for kind in ("llama", "gemma3"):
        for precision, temperature in (
            ("float32", 1.0), ("bfloat16", 1.0), ("float16", 1.0), ("q8", 1.0),
            ("float32", 1.01), ("bfloat16", 1.03), ("q8", 1.03),
        ):  # fmt: skip
            print(json.dumps(draws(kind, precision, count, temperature)), flush=True)


def run_embedded(count: int, chunk: int, chunks: int) -> None:
    """llama.cpp on the embedded GGUF: right, and in contexts that are wrong."""
    from tempering.data import sample_text
    from tempering.engines.llamacpp.model import LlamaCpp
    from tempering.engines.loading.gguf_files import embedded_gguf
    from tempering.engines.loading.hub import load_model

    network, tokenizer = load_model("smollm2")
    ids = tokenizer(sample_text("fiction"), add_special_tokens=False).input_ids
    pieces = [ids[i : i + chunk] for i in range(0, len(ids) - chunk, chunk)]
    generator = torch.Generator().manual_seed(0)
    with LlamaCpp(embedded_gguf("smollm2"), length=chunk) as engine:
        for draw in range(count):
            chosen = torch.randperm(len(pieces), generator=generator)[:chunks].tolist()
            prompts = ask(engine, [pieces[i] for i in chosen])
            start = time.perf_counter()
            found = audit(network, prompts, name="llama.cpp", precision="q8", layers=False)
            took = time.perf_counter() - start
            print(
                json.dumps(
                    {
                        "draw": draw,
                        "verdict": found.verdict,
                        "covers 1": found.temperature.low <= 1 <= found.temperature.high,
                        "differences": found.scale,
                        "by rounding": found.null_scale,
                        "seconds": took,
                    }
                ),
                flush=True,
            )
    for name, change in _wrong(network):
        with change():
            prompts = tiny.said_by(network, torch.tensor(pieces[:chunks]))
        start = time.perf_counter()
        found = audit(network, prompts, layers=False)
        line = {"injected": name, "verdict": found.verdict, "seconds": time.perf_counter() - start}
        print(json.dumps(line), flush=True)


def _wrong(network: Any) -> list[tuple[str, Callable[[], Any]]]:
    return [(case.name, case.change) for case in cases(network)]


def run_overhead(tokens: int) -> None:
    """Processor time of decoding with a policy, over that at one temperature: medians of 5."""
    from tempering.engines.llamacpp.model import LlamaCpp
    from tempering.engines.llamacpp.writing import SampledToken, write
    from tempering.engines.loading.gguf_files import embedded_gguf
    from tempering.tokens import parse_policy

    with LlamaCpp(embedded_gguf("smollm2"), length=512, threads=1) as engine:
        prompt = engine.ids("Once upon a time there was")
        texts = ("constant(1)", "constant(0.7)", "schedule(linear(1.2,0.3), length=60)",
                 "entropy(T0=1.2, theta=0.5)", "support(8)")  # fmt: skip
        times: dict[str, list[float]] = {text: [] for text in texts}
        for trial in range(5):
            for text in texts:
                sample = SampledToken(parse_policy(text, engine.tokenizer), trial)
                start, count = time.process_time(), 0
                for _ in write(engine, prompt, [sample], tokens=tokens):
                    count += 1
                times[text].append((time.process_time() - start) / max(count, 1))
        medians = {text: sorted(found)[2] for text, found in times.items()}
    base = medians["constant(1)"]
    for text, value in medians.items():
        line = {"policy": text, "ms a token": 1e3 * value, "over constant(1)": value / base - 1}
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tiny", "embedded", "overhead"))
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=60)
    given = parser.parse_args()
    if given.what == "tiny":
        run_tiny(given.draws)
    elif given.what == "embedded":
        run_embedded(given.draws, given.chunk, given.chunks)
    else:
        run_overhead(given.tokens)


if __name__ == "__main__":
    main()
