"""Threads over one model, each with temperatures of its own that come and go.

    python benchmarks/attention_threads.py [--threads 32] [--turns 1000] [--route softmax]

Every thread attaches its profile, runs the model, and removes the profile, so many times. The
claim: each output is that thread's own to the last bit, the untempered one afterwards too, and
the model is left as it was. Writes benchmarks/results/attention_threads.json.
"""

from __future__ import annotations

import argparse
import threading
import time

import torch
from _bench import write

from tempering import Profile, layout, tempered


def models():
    """A tiny llama (the attention interface), and a tiny bloom (a softmax of its own)."""
    from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "initializer_range": 0.3}
    llama = LlamaConfig(intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **sizes)
    return {
        "interface": LlamaForCausalLM(llama).eval(),
        "softmax": BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, **sizes)).eval(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--route", choices=("interface", "softmax"), default="interface")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = models()[options.route]
    ids = torch.arange(3, 11)[None]
    shape = (len(layout(model).layers), 4)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(options.threads, *shape, generator=generator, dtype=torch.float64)
    profiles = [Profile.from_matrix(torch.exp(2 * draw - 1), model) for draw in draws]

    def run():
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    plain, alone = run(), []
    for profile in profiles:
        with tempered(model, profile):
            alone.append(run())
    assert min(float((own - plain).abs().max()) for own in alone) > 1e-2
    wrong: list[str] = []
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def work(index: int) -> None:
        try:
            for turn in range(options.turns):
                with tempered(model, profiles[index]):
                    if not torch.equal(run(), alone[index]):
                        wrong.append(f"thread {index}, turn {turn}: tempered")
                if turn % 10 == 0 and not torch.equal(run(), plain):
                    wrong.append(f"thread {index}, turn {turn}: untempered")
        except Exception as error:
            wrong.append(f"thread {index}: {error!r}")

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(options.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    untouched = all(
        before[name].keys() == after[name].keys()
        and all(before[name][key] is after[name][key] for key in before[name])
        for name in before
    )
    report = {
        "settings": vars(options),
        "wrong": wrong[:10],
        "untouched": untouched,
        "plain again": bool(torch.equal(run(), plain)),
        "seconds": took,
    }
    print(
        f"{options.threads} threads x {options.turns} turns in {took:.0f} s: {len(wrong)} wrong, "
    )
    print(f"model untouched: {untouched}, untempered output as before: {report['plain again']}")
    print(write("attention_threads", report))


if __name__ == "__main__":
    main()
