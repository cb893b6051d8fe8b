"""What `support(N)` costs for a batch of vocabularies, before and after, in one run.

Before: three passes that count ties and masked tokens, then `temperature_for`. After: the policy as
it is, which starts from a sample of each row (`posterior/wide.py`). In turns, with a softmax as the
unit, and the largest error of N against float64.

    python benchmarks/support_policy.py               # made-up logits, and the embedded model's
    python benchmarks/support_policy.py --repeats 3 --kinds head     # does it run?
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import _bench
import torch

from tempering.errors import SupportError
from tempering.posterior import solve, support, temperature_for
from tempering.tokens import Policy, parse_policy
from tempering.tokens.temper import certain, token_energies

TARGETS = (2.0, 3.0, 12.0, 100.0)


def head(rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """A normal bulk, and up to forty likely tokens above it."""
    logits = 2.2 * torch.randn(rows, vocabulary, generator=generator)
    for row in logits:
        count = int(torch.randint(1, 40, (1,), generator=generator))
        places = torch.randperm(vocabulary, generator=generator)[:count]
        row[places] = 10 - torch.empty(count).exponential_(0.6, generator=generator)
    return logits


def bulk(rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """A normal bulk alone: a token that could be anything."""
    return 2.5 * torch.randn(rows, vocabulary, generator=generator)


def heavy(rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """Exponential logits: as in the tail of language models' own."""
    return 2 * torch.empty(rows, vocabulary).exponential_(1.0, generator=generator)


def embedded(rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """The embedded model's own logits, spread over a text."""
    from tempering.engines.loading.hub import load_model

    model, tokenizer = load_model("smollm2")
    ids = tokenizer("Hot layers explore, cold layers execute. " * 40, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids[:, :256]).logits[0].float()
    return logits[torch.linspace(8, len(logits) - 1, rows).long()]


KINDS: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "head": head,
    "bulk": bulk,
    "heavy": heavy,
    "embedded": embedded,
}


def before(energies: torch.Tensor, wanted: float) -> torch.Tensor:
    """The policy as it was: `certain` and `SupportPolicy.temperatures`, with what they counted."""
    bool(((energies <= 104).sum(-1) == 1).any())
    target = torch.full((len(energies),), wanted, dtype=torch.float64)
    ties = (energies == 0).sum(-1)
    unmasked = (energies < math.inf).sum(-1)
    limit = torch.where(target <= ties, 0.0, math.inf)
    torch.where(ties == unmasked, 1.0, limit).double()
    target = target.to(energies.dtype)
    bool(((target > ties) & (target < unmasked)).all())
    try:
        return temperature_for(energies, target).double()
    except SupportError:
        return temperature_for(energies.double(), target.double())


def after(energies: torch.Tensor, policy: Policy) -> torch.Tensor:
    """The policy as it is, with `certain`."""
    bool(certain(energies).any())
    return policy.temperatures(energies, [policy.state([])] * len(energies))


def readings(run: Callable[[], object]) -> int:
    """How often a run evaluates S on its rows."""
    from tempering.posterior import wide

    count, original = 0, solve.entropy_and_slope

    def counted(*given: object) -> object:
        nonlocal count
        count += 1
        return original(*given)

    solve.entropy_and_slope = wide.entropy_and_slope = counted
    try:
        run()
    finally:
        solve.entropy_and_slope = wide.entropy_and_slope = original
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    import time

    clock = time.perf_counter if options.clock == "wall" else time.process_time
    runs = []
    for kind in options.kinds:
        for rows in options.rows:
            generator = torch.Generator().manual_seed(0)
            logits = KINDS[kind](rows, options.vocabulary, generator)
            energies = token_energies(logits)
            for wanted in TARGETS:
                policy = parse_policy(f"support({wanted!r})")
                jobs = {
                    "softmax": lambda logits=logits: torch.softmax(logits, -1),
                    "before": lambda e=energies, n=wanted: before(e, n),
                    "after": lambda e=energies, p=policy: after(e, p),
                }
                report = _bench.ratios(
                    _bench.interleave(jobs, options.repeats, clock=clock), "softmax"
                )
                errors, passes = {}, {}
                for name in ("before", "after"):
                    found = jobs[name]()
                    met = support(energies.double(), found)
                    errors[name] = float((met / wanted - 1).abs().max())
                    passes[name] = readings(jobs[name])
                print(f"\n{kind}, {rows} x {logits.shape[1]}, support({wanted:g})")
                _bench.show(report, "softmax")
                print(f"evaluations: {passes}; largest relative error of N: {errors}")
                runs.append(
                    {
                        "kind": kind,
                        "rows": rows,
                        "target": wanted,
                        "ratios": report,
                        "evaluations": passes,
                        "relative_error": errors,
                    }
                )
    print(f"\nwritten: {_bench.write('support_policy', {'settings': vars(options), 'runs': runs})}")


if __name__ == "__main__":
    main()
