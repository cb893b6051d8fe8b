"""Whether speculation keeps the law of a policy in vLLM, by chi-square.

    .venv-vllm/bin/python benchmarks/vllm_speculation.py [--runs 5000]

A model with random weights and 12 words writes 4 tokens after one prompt, `--runs` times for each
policy and kind of speculation (none, n-grams, a draft model, a draft model that draws), in engines
of vLLM that really speculate. The law of the 4 tokens together is known: every text's probability
is the product of softmax(policy's logits) over its tokens, in float64 from transformers' logits of
the same model. As a control the same counts are held against the law of another policy, which they
must contradict.

Written to results/vllm_speculation.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

import _bench

from tempering.tokens.settings import RequestSettings
from tests.vllm.laws import (
    CASES,
    LENGTH,
    SPECULATION,
    fit,
    law,
    network_logits,
    save_early_copy,
    save_network,
    speculating,
    written,
)


def measured(kind: str, target: Path, draft: Path, runs: int) -> list[dict[str, Any]]:
    """Every policy in one engine."""
    logits = network_logits(target)
    llm = speculating(kind, target, draft)
    rows = []
    for policy, given, other in CASES.values():
        settings = RequestSettings(**given)
        counts, accepted = written(llm, policy, given, runs)
        rows.append(
            {
                "speculation": kind, "policy": policy, "tokens": LENGTH * counts.total(),
                "drafts accepted so far": accepted, **fit(counts, law(logits, policy, settings)),
                "control": other, "control p": fit(counts, law(logits, other, settings))["p"],
            }
        )  # fmt: skip
    llm.llm_engine.engine_core.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5000)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        target = save_network(Path(place) / "target", 0, 3)
        draft = save_early_copy(target, Path(place) / "draft", 2)
        for kind in SPECULATION:
            for row in measured(kind, target, draft, options.runs):
                rows.append(row)
                print(
                    f"{kind:26} {row['tokens']:6} tokens, {row['drafts accepted so far']:.0%} of "
                    f"drafts  chi2 {row['chi2']:7.1f} over {row['cells']:3} cells  p {row['p']:.3f}"
                    f"  control p {row['control p']:.1e}  {row['policy']:.40}",
                    flush=True,
                )
                _bench.write("vllm_speculation", {"rows": rows})


if __name__ == "__main__":
    main()
