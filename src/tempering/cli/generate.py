"""tempering generate: the untempered and the tempered continuation, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import common, profiles

EPILOG = """Examples:

  tempering generate "Why is the sky blue?" --pattern 'throb(12,3,1,12)' --amplitude 1.3

  tempering generate "Plan a day in Rome" --tokens 'schedule(linear(1.2,0.3),length=60)'

  tempering generate "Who came to dinner?" --context letters.txt --fit 20s

  tempering generate "Why?" --engine llamacpp --model FILE.gguf --tokens 'support(8)'

  tempering generate "Once upon a time" --raw --profile hot.json --max-tokens 80 --json
"""


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to answer or continue; - reads standard input.")
    ] = None,
    file: common.FromFile = None,
    pattern: Annotated[
        str | None, typer.Option(help="Schedule over depth, e.g. throb(12,3,1,12).")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Profile: file or name.")] = None,
    context: Annotated[
        Path | None, typer.Option(help="A text that the prompt asks about; it comes first.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Fit temperatures to the context, for so long, e.g. 20s or 1.5m."),
    ] = None,
    amplitude: common.Amplitude = None,
    reading: common.Reading = "temperature",
    layers: common.Layers = None,
    heads: common.Heads = None,
    model: common.Model = "smollm2",
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.", min=1)] = 64,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling, 0.7 by default; 0 for the likeliest.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Policy of the sampling temperature, e.g. phases(thinking=1,answer=0.2)."
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write every sampled token to this Parquet file.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat turn.")] = False,
    engine: Annotated[
        str, typer.Option(help="transformers, or llamacpp: --model is a GGUF file, T one for all.")
    ] = "transformers",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Continue a prompt with and without a temperature pattern.

    Both continuations use the same random numbers.
    """
    from tempering.attention.examining.layout_of import layout
    from tempering.attention.profiles.profile import Profile
    from tempering.cli.shared.context import duration, fitted
    from tempering.errors import InputError
    from tempering.files import read_text
    from tempering.reports import Record
    from tempering.tokens import parse_policy
    from tempering.tokens.policy import ConstantPolicy

    prompt = common.text_argument(prompt, file, "prompt")
    if not prompt:
        raise InputError('give a prompt: tempering generate "Why is the sky blue?"')
    if tokens is not None and temperature is not None:
        raise InputError("--tokens says the temperature of every token; leave --temperature out")
    sampled = 0.7 if temperature is None else temperature
    if not 0 <= sampled < float("inf"):
        raise InputError(f"--temperature is 0 or more and finite, not {sampled:g}")
    if pattern is None and profile is None:
        profiles.only_patterns(amplitude, reading, layers, heads)
    seconds = None if fit is None else duration(fit)
    if seconds is not None and (context is None or pattern is not None or profile is not None):
        raise InputError(
            "--fit finds the temperatures for a context: give --context FILE, and neither "
            "--pattern nor --profile"
        )
    if seconds is not None and engine != "transformers":
        raise InputError(f"--fit takes gradients of the model, which --engine {engine} has not")
    given = "" if context is None else read_text(context).strip()
    prompt = f"{given}\n\n{prompt}" if given else prompt
    common.check_file(trace, "--trace", ".parquet")
    common.check_out(out)
    if engine not in ("transformers", "llamacpp"):
        raise InputError(f"--engine is transformers or llamacpp, not '{engine}'")
    if engine == "llamacpp":
        from tempering.cli.shared.llamacpp_runs import uniform_temperature

        profiles.only_patterns(amplitude, reading, layers, heads)
        plan = (max_tokens, tokens, sampled, uniform_temperature(pattern, profile))
        _on_llamacpp(prompt, model, plan, raw, seed, trace, out, as_json)
        return
    network, tokenizer = common.open_model(model, device, dtype)
    policy = ConstantPolicy(sampled) if tokens is None else parse_policy(tokens, tokenizer)
    if policy.samples is not None:
        raise InputError(
            f"--tokens {policy} has a temperature for each of {policy.samples} samples of a "
            "prompt; this command writes one with each attention, to be compared at one temperature"
        )
    section: dict[str, Any] = {}
    if seconds is not None:
        _check_length(network, tokenizer, prompt, max_tokens, not raw)
        chosen, section["context"] = fitted(network, tokenizer, given, seconds, seed)
    elif tokens is not None and pattern is None and profile is None:
        # A policy alone: the attention stays untouched, and there is one row.
        chosen = Profile.neutral(layout(network))
    else:
        chosen = profiles.chosen_profile(
            network,
            tokenizer,
            pattern,
            profile,
            amplitude=amplitude,
            reading=reading,
            layers=layers,
            heads=heads,
        )
    results = side_by_side(
        network,
        tokenizer,
        prompt,
        chosen,
        tokens=max_tokens,
        policy=policy,
        chat=not raw,
        seed=seed,
        show=not as_json,
    )
    if trace is not None:
        token_trace(results, tokenizer).to_parquet(trace)
        common.note(f"trace: {trace}")
    record = Record.new(
        "generate",
        settings={
            "prompt": prompt,
            "pattern": chosen.pattern,
            "tokens": max_tokens,
            "token policy": str(policy),
            "chat": not raw,
            **({"fit": fit} if fit else {}),
        },
        results=results | section,
        model=common.model_section(network, model),
        seed=seed,
        device=device or "cpu",
    )
    common.finish(record, out, as_json)


def _on_llamacpp(
    prompt: str,
    model: str,
    plan: tuple[int, str | None, float, float],
    raw: bool,
    seed: int,
    trace: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """One continuation by llama.cpp; plan: new tokens, policy, temperatures of sampling and of
    attention."""
    from tempering.cli.shared.llamacpp_runs import generate_llamacpp
    from tempering.reports import Record

    max_tokens, tokens, sampled, attention = plan
    found, tokenizer, policy, section = generate_llamacpp(
        model,
        prompt,
        attention=attention,
        tokens=max_tokens,
        policy_text=tokens,
        temperature=sampled,
        chat=not raw,
        seed=seed,
    )
    results = {"generations": found}
    if trace is not None:
        token_trace(results, tokenizer).to_parquet(trace)
        common.note(f"trace: {trace}")
    settings = {
        "prompt": prompt,
        "engine": "llamacpp",
        "attention temperature": attention,
        "tokens": max_tokens,
        "token policy": policy,
        "chat": not raw,
    }
    record = Record.new("generate", settings=settings, results=results, model=section, seed=seed)
    common.finish(record, out, as_json)


def _check_length(network: Any, tokenizer: Any, prompt: str, tokens: int, chat: bool) -> Any:
    """The prompt's ids; InputError where they and the new tokens are more than the model reads."""
    from tempering.engines.generating.side_by_side import prompt_ids

    ids = prompt_ids(tokenizer, prompt, chat=chat)
    common.check_context(
        network, len(ids) + tokens, f"a prompt of {len(ids)} tokens and {tokens} new ones"
    )
    return ids


def side_by_side(
    network: Any,
    tokenizer: Any,
    prompt: str,
    profile: Any,
    *,
    tokens: int,
    policy: Any,
    chat: bool,
    seed: int,
    show: bool,
) -> dict[str, Any]:
    """Generate both rows, live on a terminal; the sections pattern, generations and support."""
    import torch

    from tempering.attention.examining.layout_of import layout
    from tempering.attention.measuring.measure import measure_tokens
    from tempering.attention.profiles.profile import UNTEMPERED, Profile
    from tempering.cli.shared.sections import pattern_section, support_section, traced
    from tempering.engines.generating.side_by_side import stream

    labels: tuple[str, ...] = (UNTEMPERED, profile.pattern or "profile")
    neutral = Profile.neutral(layout(network))
    if profile.changes_nothing:
        labels = labels[:1]
    ids = _check_length(network, tokenizer, prompt, tokens, chat)
    found: list[list[Any]] = [[] for _ in labels]
    texts = ["" for _ in labels]
    with _Live(labels, show) as update:
        for step in stream(
            network,
            tokenizer,
            ids,
            [neutral, profile][: len(labels)],
            tokens=tokens,
            policy=policy,
            seed=seed,
        ):
            found[step.row].append(step)
            texts[step.row] += step.text
            update(texts)
    full = torch.cat([ids, torch.tensor([s.token for s in found[0]], dtype=ids.dtype)])[None]
    after = {} if len(labels) == 1 else {labels[1]: measure_tokens(network, full, profile=profile)}
    return {
        "pattern": pattern_section({} if len(labels) == 1 else {labels[1]: profile}, neutral),
        "generations": {
            "prompt": prompt,
            "samples": [
                {
                    "label": name,
                    "seed": seed,
                    "text": text,
                    "tokens": len(own),
                    "finish": "length" if len(own) == tokens else "end",
                    "trace": [traced(step) for step in own],
                }
                for name, text, own in zip(labels, texts, found, strict=True)
            ],
        },
        "support": support_section(measure_tokens(network, full), after, ("sink_share",)),
    }


def token_trace(results: dict[str, Any], tokenizer: Any) -> Any:
    """The traces of all samples as one table of tokens."""
    from tempering.tokens import Trace, TraceRow

    found = Trace()
    for sequence, sample in enumerate(results["generations"]["samples"]):
        found.add(
            TraceRow(
                sequence,
                position,
                row["token_id"],
                tokenizer.decode([row["token_id"]]),
                row["phase"],
                row["temperature"],
                row["entropy_before"],
                row["entropy"],
                row["support"],
                row["log_probability_raw"],
                row["log_probability"],
            )
            for position, row in enumerate(sample["trace"])
        )
    return found


class _Live:
    """Two columns that grow as tokens come, on a terminal; nothing elsewhere."""

    def __init__(self, labels: tuple[str, ...], show: bool) -> None:
        self.labels = labels
        self.show = show and sys.stdout.isatty()

    def __enter__(self) -> Any:
        if not self.show:
            return lambda texts: None
        from rich.live import Live

        self.display = Live(
            self._table(["" for _ in self.labels]), refresh_per_second=12, transient=True
        )
        self.display.__enter__()
        return lambda texts: self.display.update(self._table(texts))

    def _table(self, texts: list[str]) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(expand=True)
        for label in self.labels:
            table.add_column(Text(label), ratio=1)
        table.add_row(*(Text(text) for text in texts))
        return table

    def __exit__(self, *exception: Any) -> None:
        if self.show:
            self.display.__exit__(*exception)
