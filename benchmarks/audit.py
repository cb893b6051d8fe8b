"""What `tempering audit` finds: mistakes injected one at a time, false alarms, coverage, time.

    python benchmarks/audit.py embedded              # llama.cpp on the embedded model; 20 minutes
    python benchmarks/audit.py tiny --draws 100      # random models; engines in other precisions

`embedded` needs cyllama: pip install 'tempering[llamacpp]'. Its parts, each resumable (what the
engines said and what the reference computed is kept in --keep):

    q8        llama.cpp on the embedded file (Q4_1): right, and at T = 1.03 by its own option
    q8_0      the same on a Q8_0 file made from it
    float32   the reference's own forward in another order of sums: right, and at T = 1.01
    bfloat16  the model run in bfloat16: right, and at T = 1.03
    named     every mistake of the catalogue, made by llama.cpp's own options
    time      one audit as a user runs it

Each draw takes --prompts of the pool's prompts. Draws share prompts: the pool holds some five
draws' worth of them. Prints one table; writes benchmarks/results/audit.json after each part.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _bench
import torch
from _audit_pool import Pool, StoredReference, stored_audit

from tempering.audit import Audit, Scored, audit, cases, rounded, scored
from tests.integration import audit_tiny as tiny

KINDS = ("llama", "qwen2", "gemma3", "gemma2", "qwen3", "gpt_oss", "granite", "mistral", "phi3")
PARTS = ("q8", "q8_0", "float32", "bfloat16", "named", "time")
Row = dict[str, Any]


def judged(engine: str, precision: str, temperature: float, found: Sequence[Audit]) -> Row:
    """Verdicts and coverage over draws of prompts, of an engine at one temperature."""
    widths = torch.tensor([item.temperature.high - item.temperature.low for item in found])
    covered = [item.temperature.low <= temperature <= item.temperature.high for item in found]
    return {
        "engine": engine,
        "precision": precision,
        "T": temperature,
        "draws": len(found),
        "called right": sum(item.right is True for item in found),
        "called wrong": sum(item.right is False for item in found),
        "interval covers T": sum(covered),
        "median width": float(widths.median()),
        "tokens": found[0].tokens,
        "a verdict": found[0].verdict,
    }


# Random models


def said(network: Any, ids: torch.Tensor, precision: str, seed: int) -> list[Scored]:
    """An engine of that precision: bfloat16 and float16 run, q8 is rounded as llama.cpp does."""
    if precision in ("bfloat16", "float16"):
        return tiny.said_by(copy.deepcopy(network).to(getattr(torch, precision)), ids)
    with rounded(network, precision, seed + 1):
        return tiny.said_by(network, ids)


def tiny_draws(kind: str, precision: str, count: int, temperature: float) -> Row:
    own = getattr(tiny, kind)().bfloat16().float()
    engine = copy.deepcopy(own)
    for layer in engine.model.layers:
        layer.self_attn.scaling /= temperature
    found = []
    for seed in range(count):
        prompts = said(engine, tiny.prompts(2, 128, seed), precision, seed)
        found.append(audit(own, prompts, precision=precision, layers=False, seed=seed))
    return judged(f"random {kind}", precision, temperature, found)


def tiny_named(kind: str) -> Row:
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
    return {"engine": f"random {kind}", "mistakes": len(known), "not named first": wrong}


def run_tiny(count: int) -> None:
    for kind in KINDS:
        print(json.dumps(tiny_named(kind)), flush=True)
    for kind in ("llama", "gemma3"):
        for precision, temperature in (
            ("float32", 1.0), ("bfloat16", 1.0), ("float16", 1.0), ("q8", 1.0),
            ("float32", 1.01), ("bfloat16", 1.03), ("q8", 1.03),
        ):  # fmt: skip
            print(json.dumps(tiny_draws(kind, precision, count, temperature)), flush=True)


# The embedded model


class Embedded:
    """The embedded model, its pool of prompts, and the parts of the benchmark."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tempering.engines.loading.gguf_files import embedded_gguf
        from tempering.engines.loading.hub import load_model

        self.options = options
        self.path = embedded_gguf("smollm2")
        self.network, tokenizer = load_model("smollm2")
        self.pool = Pool(tokenizer, options.pool, options.chunk, Path(options.keep))
        self.reference = StoredReference(self.network, self.pool, "embedded")

    def part(self, name: str) -> list[Row]:
        found: list[Row] = getattr(self, f"part_{name}")()
        return found

    def draws(
        self,
        engine: str,
        precision: str,
        temperature: float,
        reference: Any,
        told: Any,
        **more: Any,
    ) -> Row:
        chosen = self.pool.draws(told, self.options.draws, self.options.prompts)
        audits = [stored_audit(reference, x, precision=precision, **more) for x in chosen]
        return judged(engine, precision, temperature, audits)

    def part_q8(self) -> list[Row]:
        return [
            self.draws("llama.cpp, Q4_1", "q8", T, self.reference, self._llamacpp(self.path, T))
            for T in (1.0, 1.03)
        ]

    def part_q8_0(self) -> list[Row]:
        from _compressed import quantised_file

        from tempering.engines.loading.gguf_files import load_gguf

        path = Path(self.options.keep) / "Q8_0.gguf"
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=self.options.keep) as folder:
                quantised_file("Q8_0", Path(folder)).replace(path)
        reference = StoredReference(load_gguf(path)[0], self.pool, "Q8_0")
        return [
            self.draws("llama.cpp, Q8_0", "q8", T, reference, self._llamacpp(path, T), mistakes=[])
            for T in (1.0, 1.03)
        ]

    def part_float32(self) -> list[Row]:
        rows = []
        for T in (1.0, 1.01):

            def rows_of(T: float = T) -> list[list[float | None]]:
                with rounded(self.network, "float32", 1), scaled(self.network, T):
                    return in_process(self.network, self.pool.prompts)

            told = self.pool.said(f"float32 at {T}", rows_of)
            rows.append(self.draws("in process", "float32", T, self.reference, told))
        return rows

    def part_bfloat16(self) -> list[Row]:
        engine = copy.deepcopy(self.network).bfloat16()
        reference = StoredReference(copy.deepcopy(engine).float(), self.pool, "bfloat16")
        rows = []
        for T in (1.0, 1.03):

            def rows_of(T: float = T) -> list[list[float | None]]:
                with scaled(engine, T):
                    return in_process(engine, self.pool.prompts)

            told = self.pool.said(f"bfloat16 at {T}", rows_of)
            rows.append(self.draws("in process", "bfloat16", T, reference, told, mistakes=[]))
        return rows

    def part_named(self) -> list[Row]:
        """llama.cpp with each mistake; a few prompts, spread over the texts, for each."""
        few = self.pool.prompts[:: max(len(self.pool.prompts) // self.options.named, 1)]
        few = few[: self.options.named]
        rows = []
        for says, change in self._mistakes():
            answers = zip(few, change(few), strict=True)
            wrong = [scored(ids, row, f"prompt {i}") for i, (ids, row) in enumerate(answers)]
            found = stored_audit(self.reference, wrong, precision="q8", name="llama.cpp")
            first = found.candidates[0]
            rows.append(
                {
                    "injected": says,
                    "named first": says in first.name and found.right is False,
                    "verdict": found.verdict,
                    "tokens": found.tokens,
                }
            )
        return rows

    def part_time(self) -> list[Row]:
        told = next(self.pool.draws(self._llamacpp(self.path, 1.0), 1, self.options.prompts))
        start = time.perf_counter()
        found = audit(self.network, told, precision="q8", layers=False)
        return [
            {
                "audit of": "llama.cpp, Q4_1, without layers",
                "tokens": found.tokens,
                "seconds": time.perf_counter() - start,
                "verdict": found.verdict,
            }
        ]

    def _llamacpp(self, path: Path, temperature: float) -> list[Scored]:
        return self.pool.said(
            f"llama.cpp {path.name} at {temperature}",
            lambda: self._run(self.pool.prompts, path=path, temperature=temperature),
        )

    def _run(
        self, prompts: Sequence[Sequence[int]], *, path: Path | None = None,
        temperature: float = 1.0, **settings: Any,
    ) -> list[list[float | None]]:  # fmt: skip
        """llama.cpp's answers, with options of its own."""
        from tempering.engines.llamacpp.model import LlamaCpp

        with llamacpp_options(**settings):
            engine = LlamaCpp(path or self.path, length=len(prompts[0]), temperature=temperature)
        with engine:
            return engine.logprobs(prompts)

    def _mistakes(self) -> list[tuple[str, Callable[[Any], Any]]]:
        """What the verdict should say, and llama.cpp's answers to prompts with that mistake."""
        size = self.network.config.hidden_size // self.network.config.num_attention_heads
        padded, bos = (96 / size) ** 0.5, self.network.config.bos_token_id
        rows: list[tuple[str, Callable[[Any], Any]]] = [
            (f"the base of its rotation were {base:g}", self._with(rope_freq_base=base))
            for base in (10000.0, 500000.0, 1000000.0)
        ]
        rows += [
            (f"its positions were stretched by {factor} ", self._with(rope_freq_scale=1 / factor))
            for factor in (2, 4, 8, 16)
        ]
        return [
            *rows,
            ("padded to 96", self._with(temperature=padded)),
            ("its scale were applied twice", self._with(temperature=size**0.5)),
            ("not scaled", self._with(temperature=size**-0.5)),
            ("a BOS", lambda ids: [
                [None, *row[2:]] for row in self._run([[bos, *item] for item in ids])
            ]),
            ("the first token of the prompt", lambda ids: [
                [None, -1.0, *row[1:]] for row in self._run([item[1:] for item in ids])
            ]),
        ]  # fmt: skip

    def _with(self, **options: Any) -> Callable[[Any], Any]:
        return lambda ids: self._run(ids, **options)


@contextlib.contextmanager
def llamacpp_options(**values: Any) -> Iterator[None]:
    """llama.cpp's contexts start with these options."""
    from unittest import mock

    from cyllama.llama import llama_cpp

    own = llama_cpp.LlamaContextParams

    def settings() -> Any:
        found = own()
        for name, value in values.items():
            setattr(found, name, value)
        return found

    with mock.patch.object(llama_cpp, "LlamaContextParams", settings):
        yield


@contextlib.contextmanager
def scaled(network: Any, temperature: float) -> Iterator[None]:
    """The model's own 1/sqrt(d) over T, by hand."""
    modules = [layer.self_attn for layer in network.model.layers]
    for module in modules:
        module.scaling /= temperature
    try:
        yield
    finally:
        for module in modules:
            module.scaling *= temperature


@torch.no_grad()
def in_process(network: Any, prompts: Sequence[Sequence[int]]) -> list[list[float | None]]:
    found = []
    for ids in prompts:
        row = torch.tensor([list(ids)])
        logits = network(input_ids=row, use_cache=False).logits[0, :-1].float()
        values = logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
        found.append([None, *values.tolist()])
    return found


def run_embedded(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    bench = Embedded(options)
    kept = Path(options.keep) / "rows.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    size = {"pool": options.pool, "chunk": options.chunk, "prompts": options.prompts}
    for name in options.parts:
        asked = {**size, "draws": options.draws, "named": options.named}
        if name in done and done[name]["of"] == asked:
            continue
        start = time.perf_counter()
        rows = bench.part(name)
        took = time.perf_counter() - start
        done[name] = {"of": asked, "rows": rows, "seconds": took}
        kept.write_text(json.dumps(done))
        if not options.dry:
            _bench.write("audit", {"threads": options.threads, "parts": done})
    for name in options.parts:
        print(f"\n{name} ({done[name]['seconds']:.0f} s)")
        for row in done[name]["rows"]:
            print("   ", ", ".join(f"{key}: {_short(value)}" for key, value in row.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tiny", "embedded"))
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--pool", type=int, default=50, help="prompts in all")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=10, help="of a draw")
    parser.add_argument("--named", type=int, default=3, help="prompts for each injected mistake")
    parser.add_argument("--threads", type=int, default=2)
    keep = Path(tempfile.gettempdir()) / "tempering-audit"
    parser.add_argument("--keep", default=str(keep), help="folder of what was computed")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    if options.what == "tiny":
        run_tiny(options.draws)
    else:
        run_embedded(options)


if __name__ == "__main__":
    main()
