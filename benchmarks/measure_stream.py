"""What measuring attention costs beside a plain forward, and beside eager attention's weights.

    python benchmarks/measure_stream.py                # time and memory at 8192 tokens
    python benchmarks/measure_stream.py --long         # memory at 32768 tokens
    python benchmarks/measure_stream.py --agreement    # entropy against float64 at 2048 tokens

Time: `plain` is the model's forward with its logits, `layers` the same without the head over the
vocabulary, `measure` all statistics of
`tempering.attention.measuring`, interleaved in one process.
Memory: the peak of a process that does nothing else. Eager attention holds every layer's weights,
layers x heads x length^2 numbers: it is run at the longest length that fits --eager-gib, and its
memory at the full length is reckoned from there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _bench import interleave, ratios, show, write

EAGER = 1024


def sample(length: int, chunks: int = 1) -> tuple[Any, Any]:
    """The embedded model, and tokens of the package's texts, over again where they are short."""
    import torch

    from tempering.data import sample_text
    from tempering.engines.loading.hub import load_model

    model, tokenizer = load_model("smollm2")
    ids = torch.tensor(tokenizer(sample_text("demo"), verbose=False).input_ids)
    need = length * chunks
    return model, ids.repeat(need // len(ids) + 1)[:need].view(chunks, length)


def task(name: str, length: int) -> Any:
    """A function that does one thing once."""
    import torch

    from tempering.attention.measuring.measure import measure_tokens

    model, ids = sample(length)

    def plain() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    def layers() -> Any:
        with torch.no_grad():
            return model.model(ids, use_cache=False).last_hidden_state

    def measure() -> Any:
        return measure_tokens(model, ids)

    def eager() -> Any:
        """The entropies from the weights that eager attention hands out."""
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                found = model.model(ids, use_cache=False, output_attentions=True).attentions
            return [torch.special.entr(weights).sum(-1).mean((0, 2)) for weights in found]
        finally:
            model.set_attn_implementation("sdpa")

    return {"plain": plain, "layers": layers, "measure": measure, "eager": eager}[name]


def peak(name: str, length: int) -> dict[str, float]:
    """GiB of a process that does one task: its peak, and what stood before it began."""
    code = [sys.executable, __file__, "--child", name, "--length", str(length)]
    return json.loads(subprocess.run(code, check=True, capture_output=True, text=True).stdout)


def child(name: str, length: int) -> None:
    """In a process of its own: print GiB before and at the peak."""
    run = task(name, length)
    # Loading the model may have taken more than it keeps; the kernel forgets that peak here.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    run()
    print(json.dumps({"before": before, "peak": memory("VmHWM")}))


def memory(field: str) -> float:
    """A field of this process's status, in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 2**20
    raise SystemExit(f"no {field} in /proc/self/status: this needs Linux")


def timed(length: int, repeats: int) -> dict[str, Any]:
    """Interleaved times of a plain forward and of the measurement."""
    names = ("plain", "layers", "measure")
    times = interleave({name: task(name, length) for name in names}, repeats)
    for base in ("plain", "layers"):
        print(f"\n{length} tokens, time as a multiple of {base}")
        show(ratios(times, base), base)
    short = interleave({name: task(name, EAGER) for name in ("plain", "measure", "eager")}, repeats)
    print(f"\n{EAGER} tokens, eager with output_attentions beside them")
    show(ratios(short, "plain"), "plain")
    return {"seconds": times, "ratios": ratios(times, "plain"),
            "ratios_layers": ratios(times, "layers"),
            "at_eager_length": ratios(short, "plain")}  # fmt: skip


def memories(length: int, eager_gib: float) -> dict[str, Any]:
    """Peaks of processes of their own."""
    found = {name: peak(name, length) for name in ("plain", "layers", "measure")}
    weights = 30 * 9 * 4 / 2**30  # GiB of all layers' attention weights, a squared token
    fits = max(256, min(length, int((eager_gib / weights / 1.5) ** 0.5) // 256 * 256))
    eager = peak("eager", fits)
    scaled = eager["before"] + (eager["peak"] - eager["before"]) * (length / fits) ** 2
    print(f"\n{length} tokens, peak memory of the process")
    for name, item in found.items():
        print(f"{name:12s} {item['peak']:6.2f} GiB, {item['peak'] / found['plain']['peak']:5.2f} x "
              f"plain, {item['peak'] / found['layers']['peak']:5.2f} x layers")  # fmt: skip
    print(f"{'eager':12s} {eager['peak']:6.2f} GiB at {fits} tokens: {scaled:.0f} GiB reckoned")
    return {**found, "eager": {**eager, "length": fits, "reckoned_gib": scaled}}


def agreement(length: int) -> dict[str, float]:
    """Streamed entropy against float64, from the same queries and keys: the largest errors."""
    import torch

    from tempering.attention.examining.layout_of import layout
    from tempering.attention.logits import AttentionCall, sliced_logits
    from tempering.attention.measuring.measure import posteriors, watching

    model, ids = sample(length)

    class Compare:
        def __init__(self) -> None:
            self.worst = {"head mean": 0.0, "query": 0.0}

        def see_call(self, module: Any, query: Any, key: Any, mask: Any, kwargs: Any) -> None:
            found = posteriors(AttentionCall.of(module, query, key, mask, kwargs)).entropy
            exact = []
            for x in sliced_logits(module, query.double(), key.double(), mask, kwargs):
                log_r = x - x.logsumexp(-1, keepdim=True)
                exact.append(-(log_r.exp() * log_r.masked_fill(x == -torch.inf, 0)).sum(-1))
            entropy = torch.cat(exact, 2)
            head = (found.mean(2) / entropy.mean(2) - 1).abs().max()
            each = ((found - entropy).abs() / entropy.clamp(min=1e-3))[:, :, 1:].max()
            for name, value in (("head mean", head), ("query", each)):
                self.worst[name] = max(self.worst[name], float(value))

    with watching(model, layout(model), None, Compare()) as seen, torch.no_grad():
        model.model(ids, use_cache=False)
    print(f"{length} tokens, entropy against float64, largest relative error over 30 x 9 heads: "
          f"{seen.worst['head mean']:.1e} of a head's mean, {seen.worst['query']:.1e} of any "
          "query's (of at least 0.001 nats)")  # fmt: skip
    return seen.worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager-gib", type=float, default=4.0)
    parser.add_argument("--long", action="store_true", help="32768 tokens, memory only")
    parser.add_argument("--agreement", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given.child:
        child(given.child, given.length)
        return
    if given.agreement:
        write("measure_agreement", {"length": 2048, "largest": agreement(2048)})
        return
    if given.long:
        found = {"measure": peak("measure", 32768)}
        for name, item in found.items():
            print(f"32768 tokens, {name:8s} {item['peak']:.2f} GiB at the peak")
        write("measure_long", {"length": 32768, "memory": found})
        return
    payload: dict[str, Any] = {"length": given.length}
    if not given.no_time:
        payload |= timed(given.length, given.repeats)
    payload["memory"] = memories(given.length, given.eager_gib)
    write("measure_stream", payload)


if __name__ == "__main__":
    main()
