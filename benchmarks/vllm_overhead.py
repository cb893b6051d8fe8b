"""What tempering adds to vLLM: engines with and without the plugin, side by side, in turns.

Run it in the environment of `make test-vllm`:

    .venv-vllm/bin/python benchmarks/vllm_overhead.py [--tokens 64] [--batch 8] [--repeats 9]

All engines live at once, idle while another works. Throughput is measured of decoding (new tokens
a second, short prompts) and of prefill (prompt tokens a second, one new token). The engine that
everything is compared with has the same entry points installed, with nothing configured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from _bench import interleave, ratios, show, write

from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rules import PerHead
from tempering.engines.loading.catalogue import MODELS
from tempering.engines.loading.embedded import embedded_directory

BASE = "nothing configured"
POLICIES = (
    "constant(0.7)",
    "support(12)",
    "phases(thinking=1, answer=0.2)",
    "schedule(throb(1.3,1,0.8,1.3), length=64)",
    "phases(thinking=sampler(T=1, top_p=0.95, top_k=20), answer=sampler(T=0.3, min_p=0.05))",
    "constant(0.7)|loops(heat=1.4, ngram=8, window=256)",
)


def profiles(layers: int, heads: int, home: Path) -> dict[str, str]:
    """Three random profiles of numbers and one with a law of length, as files."""
    import torch

    draw = torch.Generator().manual_seed(0)
    paths = {}
    for name in ("own", "hot", "cold"):
        matrix = torch.empty(layers, heads).uniform_(0.8, 1.25, generator=draw)
        paths[name] = str(Profile.from_matrix(matrix).save(home / f"{name}.json"))
    rules = [
        Power(PerHead(torch.empty(heads).uniform_(-0.1, 0.1, generator=draw).tolist()), 256.0)
        for _ in range(layers)
    ]
    law = Profile.load(paths["own"]).with_rules(rules)
    paths["law"] = str(law.save(home / "law.json"))
    return paths


def engine(directory: str, room: int, options: Any, tempering: dict[str, Any] | None) -> Any:
    """An engine; `tempering` is what --additional-config holds, None for nothing at all."""
    from vllm import LLM

    return LLM(
        directory,
        dtype=options.dtype,
        max_model_len=room,
        max_num_seqs=max(8, options.batch),
        enforce_eager=options.eager,
        # Repeated prompts would be read from the cache.
        enable_prefix_caching=False,
        additional_config={} if tempering is None else {"tempering": tempering},
    )


def runs(
    llm: Any, room: int, options: Any, extra: dict[str, Any] | None
) -> dict[str, Callable[[], object]]:
    """The two measures of one engine and one kind of request."""
    from vllm import SamplingParams

    def work(length: int, tokens: int) -> Callable[[], object]:
        prompts = [
            {"prompt_token_ids": [9 + (7 * i + 13 * j) % 200 for j in range(length)]}
            for i in range(options.batch)
        ]
        params = SamplingParams(
            temperature=1, max_tokens=tokens, ignore_eos=True, seed=0, extra_args=extra
        )
        return lambda: llm.generate(prompts, params, use_tqdm=False)

    return {"decoding": work(8, options.tokens), "prefill": work(room // 2, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="or a directory in transformers' format")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    known = options.model in MODELS
    directory = str(embedded_directory(MODELS[options.model])) if known else options.model
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    room = min(1024, config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as home:
        paths = profiles(config.num_hidden_layers, config.num_attention_heads, Path(home))
        own, law = paths.pop("own"), paths.pop("law")
        base = engine(directory, room, options, None)
        one = engine(directory, room, options, {"profile": own})
        named = engine(directory, room, options, {"profile": own, "profiles": paths})
        lengths = engine(directory, room, options, {"profile": law})
    measured = {
        BASE: runs(base, room, options, None),
        "a profile": runs(one, room, options, None),
        "a law of length": runs(lengths, room, options, None),
        "named profiles": runs(named, room, options, {"tempering_profile": "hot"}),
        "a room of one": runs(
            named, room, options, {"tempering_profile": "hot", "tempering_room": 0.5}
        ),
        **{text: runs(base, room, options, {"tempering": text}) for text in POLICIES},
    }
    results: dict[str, Any] = {"settings": vars(options)}
    for what in ("decoding", "prefill"):
        fns = {name: own_runs[what] for name, own_runs in measured.items()}
        report = ratios(interleave(fns, options.repeats), BASE)
        done = options.batch * (options.tokens if what == "decoding" else room // 2)
        for row in report.values():
            row["tokens_per_second"] = done / row["seconds"]
        print(f"\n{what}, {options.batch} requests: time over that with {BASE}")
        show(report, BASE)
        share = report["a law of length"]["median"] / report["a profile"]["median"]
        print(f"a law of length: {share:.3f} times a profile of numbers; the claim is at most 1.05")
        results[what] = report
    for llm in (base, one, named, lengths):
        llm.llm_engine.engine_core.shutdown()
    print(f"\nwritten: {write('vllm_overhead', results)}")


if __name__ == "__main__":
    main()
