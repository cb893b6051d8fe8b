"""What attaching a profile and taking it off again costs, beside one forward of one token.

    python benchmarks/attach.py [--repeats 40] [--before PATH]

Random models of 30 layers (the shape of SmolLM2-135M) and of 80, and each once more a quarter as
wide: the time goes with the number of modules and not with the number of parameters. --before: the
`src` of another version of tempering, timed in a process of its own, before and after the one
measured. Targets: a tenth of what it took before the model was described once (19 ms for 30 layers
on one core), and the same for both widths within a quarter. Times are the process's own, so that
what else runs counts little. Writes benchmarks/results/attach.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from _bench import interleave, threads, write

# name -> (layers, width)
MODELS = {
    "30 layers": (30, 576),
    "30 narrow": (30, 144),
    "80 layers": (80, 576),
    "80 narrow": (80, 144),
}
SHARE, ALIKE = 0.1, 1.25


def model_of(layers: int, width: int):
    """A random decoder of 9 heads and 3 key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).eval()


def times(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of attach + detach and of a forward of one token, for each model."""
    from tempering import Profile, tempered

    found = {}
    token = torch.ones(1, 1, dtype=torch.long)
    for name, shape in MODELS.items():
        model = model_of(*shape)
        profile = Profile.from_schedule("throb(12,3,1,12)|amplitude(1.3)", model)
        with threads(1), torch.no_grad():
            seconds = interleave(
                {
                    "attach": lambda m=model, p=profile: tempered(m, p).remove(),
                    "forward": lambda m=model: m(token, use_cache=False),
                },
                repeats,
                warmup=3,
                clock=time.process_time,
            )
        found[name] = {
            "attach": statistics.median(seconds["attach"]) * 1e3,
            "forward": statistics.median(seconds["forward"]) * 1e3,
            "parameters": sum(item.numel() for item in model.parameters()),
        }
    return found


def elsewhere(source: Path, repeats: int) -> dict[str, dict[str, float]]:
    """`times` under another version's source."""
    paths = [str(source), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__, "--repeats", str(repeats), "--alone"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(times(options.repeats)))
        return
    before = elsewhere(options.before, options.repeats) if options.before else {}
    now = times(options.repeats)
    titles = ("parameters", "forward", "attach", "before", "share")
    print(" " * 12 + "".join(f"{title:>11s}" for title in titles))
    for name, row in now.items():
        old = before.get(name, {}).get("attach")
        shown = "" if old is None else f"{old:7.2f} ms {row['attach'] / old:7.3f}"
        print(
            f"{name:12s} {row['parameters'] / 1e6:8.1f} M {row['forward']:7.2f} ms "
            f"{row['attach']:7.2f} ms {shown}"
        )
    for layers in (30, 80):
        ratio = now[f"{layers} layers"]["attach"] / now[f"{layers} narrow"]["attach"]
        print(f"{layers} layers, wide against narrow: {ratio:.2f} (target {ALIKE})")
    payload = {"settings": {"repeats": options.repeats}, "now": now, "before": before}
    print(write("attach", {**payload, "targets": {"share": SHARE, "wide to narrow": ALIKE}}))


if __name__ == "__main__":
    main()
