"""Twelve rows with twelve profiles in one batch, against the same batch without profiles.

    python benchmarks/rows_overhead.py [--tokens 48] [--repeats 15] [--device cuda]

Target: 1.05. Both generate the same number of tokens, from the same twelve prompts and seeds, in
turns. The prompts differ: rows alike in prompt and profile are read once, so with one prompt for
all the batch without profiles has less to do; the last two lines show that case. Writes
benchmarks/results/rows_overhead.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from _bench import interleave, ratios, show, write

from tempering import Profile, load_model, schedule
from tempering.engines.generating.row_sampling import BatchRow
from tempering.engines.generating.rows import generate_rows

PROMPT = "<|im_start|>user\nName twelve uses of a {}.<|im_end|>\n<|im_start|>assistant\n"
THINGS = "brick rope spoon chair bottle ladder candle mirror bucket hammer needle carpet".split()
TARGET = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
    prompts = [
        tokenizer(PROMPT.format(thing), return_tensors="pt").input_ids[0] for thing in THINGS
    ]
    plain = [BatchRow(own, 0.8, seed=i, tokens=options.tokens) for i, own in enumerate(prompts)]
    amplitudes = [1 + 0.3 * (i + 1) / len(plain) for i in range(len(plain))]
    pattern = schedule("throb(12,3,1,12)")
    profiles = [Profile.from_schedule(pattern.amplitude(a), model) for a in amplitudes]
    alike = [replace(row, profile=profiles[0]) for row in plain]
    apart = [replace(row, profile=own) for row, own in zip(plain, profiles, strict=True)]
    same = [replace(row, prompt=prompts[0]) for row in plain]
    same_apart = [replace(row, prompt=prompts[0]) for row in apart]

    def runner(rows):
        def run():
            found = generate_rows(model, rows)
            if options.device.startswith("cuda"):
                torch.cuda.synchronize()
            assert all(len(own.tokens) == options.tokens for own in found)

        return run

    report = ratios(
        interleave(
            {
                "no profiles": runner(plain),
                "one profile, all rows": runner(alike),
                "a profile for each row": runner(apart),
                "one prompt, no profiles": runner(same),
                "one prompt, a profile each": runner(same_apart),
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
