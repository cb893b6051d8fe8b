"""What a profile costs in time: tempered forwards beside the same forwards untempered.

    python benchmarks/attention_overhead.py [--repeats 12] [--device cuda]

The embedded model, one interleaved run: prefill of 512 and 4096 tokens, and single-token decoding
with 512 tokens in the cache. The claim: a profile per layer 1.00 within noise, per head at most
1.03. "plain again" is the untempered model a second time: its ratio is the noise.
Writes benchmarks/results/attention_overhead.json.
"""

from __future__ import annotations

import argparse
import copy

import _bench
import torch

from tempering import Profile, load_model, tempered

TOKENS_A_TURN = 16  # decoding steps timed together


def profiles(model) -> dict[str, Profile | None]:
    """The variants of one run."""
    layer = Profile.from_schedule("throb(12,3,1,12)|amplitude(1.3)", model)
    generator = torch.Generator().manual_seed(0)
    shape = layer.temperature.shape
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    head = Profile.from_matrix(torch.exp(0.5 * (noise - 0.5)), model)
    return {"plain": None, "per layer": layer, "per head": head, "plain again": None}


def prefill(model, length: int, device: str):
    """A function that runs one forward without the head over the vocabulary."""
    ids = torch.randint(5, 1000, (1, length), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)

    def run() -> None:
        model.base_model(input_ids=ids, use_cache=False)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def decoding(model, device: str):
    """A function that decodes some tokens from a cache of 512."""
    ids = torch.randint(5, 1000, (1, 512), generator=torch.Generator().manual_seed(2)).to(device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    token = ids[:, :1]

    def run() -> None:
        for _ in range(TOKENS_A_TURN):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-TOKENS_A_TURN)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model, _ = load_model("smollm2", device=options.device)
    # A copy for each variant, so that attaching is not timed.
    models = {label: (copy.deepcopy(model), item) for label, item in profiles(model).items()}
    handles = [tempered(*pair, check=False) for pair in models.values() if pair[1] is not None]
    few = max(3, options.repeats // 3)
    works = {
        "prefill 512": (lambda own: prefill(own, 512, options.device), options.repeats),
        "prefill 4096": (lambda own: prefill(own, 4096, options.device), few),
        "decode": (lambda own: decoding(own, options.device), options.repeats),
    }
    results = {}
    with torch.no_grad():
        for name, (work, repeats) in works.items():
            jobs = {label: work(own) for label, (own, _) in models.items()}
            report = _bench.ratios(_bench.interleave(jobs, repeats), "plain")
            print(f"\n{name} ({options.device})")
            _bench.show(report, "plain")
            results[name] = report
    for handle in handles:
        handle.remove()
    _bench.write("attention_overhead", {"device": options.device, "ratios": results})


if __name__ == "__main__":
    main()
