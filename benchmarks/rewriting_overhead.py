"""What a profile costs where a model calls softmax itself, and that call is rewritten.

    python benchmarks/rewriting_overhead.py [--repeats 9] [--device cuda]

Models with attention code of their own, of random weights and in the shape of a published one
but for fewer layers and a small vocabulary (both hide nothing of what attention costs): prefill
of 512 and 2048 tokens, and single-token decoding with 512 tokens in the cache, interleaved in
one run. The claim: at most 1.10. "plain again" is the untempered model a second time: its ratio
is the noise. Writes benchmarks/results/rewriting_overhead.json.
"""

from __future__ import annotations

import argparse
import copy

import _bench
import attention_overhead
import torch

from tempering import layout, tempered

LAYERS, VOCABULARY = 8, 2048


def bloom():
    """Bloom-560m: alibi, and its own softmax."""
    from transformers import BloomConfig, BloomForCausalLM

    sizes = {"hidden_size": 1024, "n_head": 16, "n_layer": LAYERS, "vocab_size": VOCABULARY}
    return BloomForCausalLM(BloomConfig(**sizes))


def gpt_neo():
    """GPT-Neo-125m: its own softmax, in whole and local layers by turns."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"hidden_size": 768, "num_heads": 12, "num_layers": LAYERS, "vocab_size": VOCABULARY}
    kinds = [[["global", "local"], LAYERS // 2]]
    return GPTNeoForCausalLM(GPTNeoConfig(attention_types=kinds, **sizes))


def falcon():
    """Falcon-rw-1b without alibi: its own scaled dot products, in a fused kernel."""
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": LAYERS}
    config = FalconConfig(vocab_size=VOCABULARY, alibi=False, multi_query=False, **sizes)
    return FalconForCausalLM._from_config(config, attn_implementation="sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    works = {
        "prefill 512": lambda own: attention_overhead.prefill(own, 512, options.device),
        "prefill 2048": lambda own: attention_overhead.prefill(own, 2048, options.device),
        "decode": lambda own: attention_overhead.decoding(own, options.device),
    }
    results = {}
    for make in (bloom, gpt_neo, falcon):
        torch.manual_seed(0)
        model = make().eval().to(options.device)
        assert {layer.route for layer in layout(model).layers} == {"softmax"}
        given = attention_overhead.profiles(model)
        # A copy for each variant, so that attaching is not timed.
        models = {label: (copy.deepcopy(model), item) for label, item in given.items()}
        handles = [tempered(*pair, check=False) for pair in models.values() if pair[1] is not None]
        with torch.no_grad():
            for name, work in works.items():
                jobs = {label: work(own) for label, (own, _) in models.items()}
                repeats = max(3, options.repeats // 3) if "2048" in name else options.repeats
                report = _bench.ratios(_bench.interleave(jobs, repeats), "plain")
                print(f"\n{make.__name__}, {name} ({options.device})")
                _bench.show(report, "plain")
                results[f"{make.__name__}, {name}"] = report
        for handle in handles:
            handle.remove()
    _bench.write("rewriting_overhead", {"device": options.device, "ratios": results})


if __name__ == "__main__":
    main()
