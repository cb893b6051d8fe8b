"""What token policies add to decoding: the embedded model in transformers, policy against none.

Two measures, because the first is honest and noisy, the second sharp: whole generate() runs, and
the policy's own time on the model's own logits over the time of a decoding step; all in turns.

    python benchmarks/token_policies.py [--tokens 48] [--batch 1 8] [--repeats 9] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from _bench import interleave, ratios, show, write

from tempering.engines.loading.hub import load_model
from tempering.tokens import TemperingLogitsProcessor, Trace

POLICIES = (
    "constant(0.7)",
    "schedule(throb(1.3,1,0.8,1.3), length=64)",
    "phases(thinking=1, answer=0.2)",
    "phases(thinking=1, answer=0.2, tool=0.1, code=0.3)",
    "entropy(T0=1, theta=0.1)",
    "dynatemp(0.5, exponent=1, temperature=0.8)",
    "support(12)",
    "phases(thinking=sampler(T=1, top_p=0.95, top_k=20), answer=sampler(T=0.3, min_p=0.05))",
    "sampler(T=0.8, top_p=0.95)|order(top_p, temperature)",
    "constant(0.7)|loops(heat=1.4, ngram=8, window=256)",
    'constant(1)|after("Wait", 3, 0.5)',
    "phases(thinking=1, answer=0.2)|budget(thinking=512)",
)
PROMPT = "<|im_start|>user\nTell me a story about a river.<|im_end|>\n<|im_start|>assistant\n"


def runner(model: Any, tokenizer: Any, text: str | None, batch: int, tokens: int, traced: bool):
    """A function that generates `batch` x `tokens` tokens, with a policy or without."""
    inputs = tokenizer([PROMPT] * batch, return_tensors="pt").to(model.device)

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        trace = Trace() if traced else None
        processors = []
        if text is not None:
            processors = [TemperingLogitsProcessor(text, tokenizer, trace=trace)]
        out = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            logits_processor=processors,
        )
        if trace is not None:
            trace.complete(out)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return out

    return run


def own_steps(model: Any, tokenizer: Any, text: str, batch: int, tokens: int) -> Callable:
    """A function that calls a fresh processor for each token, on the logits of the model itself."""
    inputs = tokenizer([PROMPT] * batch, return_tensors="pt").to(model.device)
    rows = runner(model, tokenizer, None, batch, tokens, False)()
    prompt = inputs.input_ids.shape[1]
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits[:, prompt - 1 :].float().unbind(1)

    def steps() -> None:
        processor = TemperingLogitsProcessor(text, tokenizer, prompt_length=prompt)
        for index, scores in enumerate(logits):
            processor(rows[:, : prompt + index], scores)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return steps


def shares(
    times: Mapping[str, Sequence[float]], texts: Sequence[str], tokens: int
) -> dict[str, dict[str, float]]:
    """The policy's own time for a token over that of a decoding step, turn by turn.

    A step is what generate() takes for `tokens` tokens less what it takes for one, so that the
    prompt counts for nothing.
    """
    report = {}
    for text in texts:
        each = sorted(
            (own / tokens) / ((whole - first) / (tokens - 1))
            for own, whole, first in zip(
                times[f"own: {text}"], times["no policy"], times["one token"], strict=True
            )
        )
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each * 3)
        own = statistics.median(times[f"own: {text}"]) / tokens
        report[text] = {"share": statistics.median(each), "q25": low, "q75": high, "seconds": own}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    model, tokenizer = load_model("smollm2", dtype=dtype, device=options.device)
    results: dict[str, Any] = {"settings": vars(options)}
    for batch in options.batch:
        fns = {
            "no policy": runner(model, tokenizer, None, batch, options.tokens, False),
            "one token": runner(model, tokenizer, None, batch, 1, False),
        }
        for text in POLICIES:
            fns[text] = runner(model, tokenizer, text, batch, options.tokens, False)
            fns[f"own: {text}"] = own_steps(model, tokenizer, text, batch, options.tokens)
        traced = f"{POLICIES[2]}, traced"
        fns[traced] = runner(model, tokenizer, POLICIES[2], batch, options.tokens, True)
        times = interleave(fns, options.repeats)
        whole = {name: seconds for name, seconds in times.items() if name in (*POLICIES, traced)}
        report = ratios({"no policy": times["no policy"], **whole}, "no policy")
        print(f"\nbatch {batch}: generate() of {options.tokens} tokens, policy over none")
        show(report, "no policy")
        own = shares(times, POLICIES, options.tokens)
        print(f"\nbatch {batch}: the policy's own share of a decoding step, quartiles")
        for text, row in own.items():
            print(
                f"{text:56s} {row['seconds'] * 1e3:7.3f} ms  {row['share']:7.2%}  "
                f"{row['q25']:.2%}-{row['q75']:.2%}"
            )
        results[f"batch {batch}"] = {"generate": report, "own": own}
    print(f"\nwritten: {write('token_policies', results)}")


if __name__ == "__main__":
    main()
