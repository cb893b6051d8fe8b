"""Thousands of requests drawn to break a vLLM server with policies; what came of them.

    python benchmarks/vllm_fuzz.py --requests 10000 --seconds 3000

Starts `tempering serve` with a tiny random model on a free port of this machine, and prints how
many requests of each kind were sent, every answer that was wrong, the slowest /health, and the
memory of the server's processes as it went. Exits with 1 where anything was wrong. Needs vLLM.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

from tempering.engines.loading.hub import load_model
from tests.tiny import save_tiny_llama
from tests.vllm.fuzzing import REASONING, Fuzz
from tests.vllm.serving import serving


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3000, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="no policies, to compare memory")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        directory = save_tiny_llama(home / "tiny", layers=4, width=128, spread=0.12)
        model, tokenizer = load_model(str(directory))
        with serving(directory, home, "--reasoning-config", REASONING) as server:
            fuzz = Fuzz(server, model, tokenizer, given.seed, given.plain)
            report = fuzz.run(given.requests, given.seconds)
            print("\n".join(report.lines()))
            errors = [line for line in server.log.read_text().splitlines() if "Traceback" in line]
    print(f"tracebacks in the server's log: {len(errors)}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
