"""Twelve rows with twelve profiles in one batch, against the same batch without profiles.

    python benchmarks/rows_overhead.py [--tokens 48] [--repeats 15] [--device cuda]

Target: 1.05. Both generate the same number of tokens, from the same prompt and seeds, in turns.
Writes benchmarks/results/rows_overhead.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from _bench import interleave, ratios, show, write

from tempering import Profile, load_model, schedule
from tempering.engines.rows import Row, generate_rows

PROMPT = "<|im_start|>user\nName twelve uses of a brick.<|im_end|>\n<|im_start|>assistant\n"
TARGET = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model, tokenizer = load_model(
        "smollm2", device=options.device, dtype=getattr(torch, options.dtype)
    )
    # Rows that end early would end at different tokens: compare the same work.
    model.generation_config.eos_token_id = None
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    plain = [Row(prompt, 0.8, seed=i, tokens=options.tokens) for i in range(options.rows)]
    amplitudes = [1 + 0.3 * (i + 1) / options.rows for i in range(options.rows)]
    pattern = schedule("throb(12,3,1,12)")
    profiles = [Profile.from_schedule(pattern.amplitude(a), model) for a in amplitudes]
    alike = [replace(row, profile=profiles[0]) for row in plain]
    apart = [replace(row, profile=own) for row, own in zip(plain, profiles, strict=True)]

    def runner(rows):
        def run():
            found = generate_rows(model, rows)
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            assert found is not None and all(len(own.tokens) == options.tokens for own in found)

        return run

    report = ratios(
        interleave(
            {
                "no profiles": runner(plain),
                "one profile, all rows": runner(alike),
                "a profile for each row": runner(apart),
            },
            options.repeats,
        ),
        "no profiles",
    )
    show(report, "no profiles")
    ratio = report["a profile for each row"]["median"]
    print(f"target {TARGET}: {'met' if ratio <= TARGET else 'missed'} at {ratio:.3f}")
    print(write("rows_overhead", {"settings": vars(options), "target": TARGET, "report": report}))


if __name__ == "__main__":
    main()
