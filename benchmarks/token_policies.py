"""What token policies add to decoding: the embedded model in transformers, policy against none.

Two measures, because the first is honest and noisy, the second sharp: whole generate() runs in
turns, and the policy's own time for the same logits over the time of a decoding step.

    python benchmarks/token_policies.py [--tokens 48] [--batch 1 8] [--repeats 9] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from _bench import interleave, ratios, show, write

from tempering.engines.hub import load_model
from tempering.tokens import TemperingLogitsProcessor, Trace

POLICIES = (
    "constant(0.7)",
    "schedule(throb(1.3,1,0.8,1.3), length=64)",
    "phases(thinking=1, answer=0.2)",
    "phases(thinking=1, answer=0.2, tool=0.1, code=0.3)",
    "entropy(T0=1, theta=0.1)",
    "dynatemp(0.5, exponent=1, temperature=0.8)",
    "support(12)",
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


def own_time(model: Any, tokenizer: Any, text: str, batch: int, tokens: int, repeats: int) -> float:
    """Median seconds of one call of the processor, on logits of the model, as rows grow."""
    inputs = tokenizer([PROMPT] * batch, return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1].float()
    rows = runner(model, tokenizer, None, batch, tokens, False)()
    prompt = inputs.input_ids.shape[1]
    seconds = []
    for _ in range(repeats):
        processor = TemperingLogitsProcessor(text, tokenizer, prompt_length=prompt)

        def steps(processor: TemperingLogitsProcessor = processor) -> None:
            for length in range(prompt, rows.shape[1]):
                processor(rows[:, :length], logits)
            if model.device.type == "cuda":
                torch.cuda.synchronize()

        seconds.append(interleave({"own": steps}, repeats=1, warmup=0)["own"][0] / tokens)
    return statistics.median(seconds)


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
        fns = {"no policy": runner(model, tokenizer, None, batch, options.tokens, False)}
        for text in POLICIES:
            fns[text] = runner(model, tokenizer, text, batch, options.tokens, False)
        traced = f"{POLICIES[2]}, traced"
        fns[traced] = runner(model, tokenizer, POLICIES[2], batch, options.tokens, True)
        report = ratios(interleave(fns, options.repeats), "no policy")
        print(f"\nbatch {batch}: generate() of {options.tokens} tokens, policy over none")
        show(report, "no policy")
        step = report["no policy"]["seconds"] / options.tokens
        print(f"\nbatch {batch}: a decoding step takes {step * 1e3:.2f} ms; of that the policy")
        shares = {}
        for text in POLICIES:
            own = own_time(model, tokenizer, text, batch, options.tokens, options.repeats)
            shares[text] = {"seconds": own, "share": own / step}
            print(f"{text:56s} {own * 1e3:7.3f} ms  {own / step:7.2%}")
        results[f"batch {batch}"] = {"generate": report, "own": shares, "step_seconds": step}
    print(f"\nwritten: {write('token_policies', results)}")


if __name__ == "__main__":
    main()
