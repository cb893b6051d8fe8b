"""tempering generate: the untempered and the tempered continuation, side by side."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from tempering.cli import common

EPILOG = """Examples:

  tempering generate "Why is the sky blue?" --pattern 'throb(12,3,1,12)' --amplitude 1.3

  tempering generate "Once upon a time" --raw --profile hot.json --max-tokens 80 --json
"""


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to answer or continue.")],
    pattern: Annotated[
        str | None, typer.Option(help="Schedule over depth, e.g. throb(12,3,1,12).")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Profile file, instead.")] = None,
    amplitude: common.Amplitude = None,
    reading: common.Reading = "temperature",
    layers: common.Layers = None,
    heads: common.Heads = None,
    model: common.Model = "smollm2",
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 for the likeliest.")] = 0.7,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat turn.")] = False,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Continue a prompt with and without a temperature pattern, from the same random numbers."""
    common.check_out(out)
    network, tokenizer = common.open_model(model, device, dtype)
    chosen = common.chosen_profile(
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
        temperature=temperature,
        chat=not raw,
        seed=seed,
        show=not as_json,
    )
    from tempering.reports import Record

    record = Record.new(
        "generate",
        settings={
            "prompt": prompt,
            "pattern": chosen.pattern,
            "tokens": max_tokens,
            "temperature": temperature,
            "chat": not raw,
        },
        results=results,
        model=common.model_section(network, model),
        seed=seed,
        device=device or "cpu",
    )
    common.finish(record, out, as_json)


def side_by_side(
    network: Any,
    tokenizer: Any,
    prompt: str,
    profile: Any,
    *,
    tokens: int,
    temperature: float,
    chat: bool,
    seed: int,
    show: bool,
) -> dict[str, Any]:
    """Generate both rows, live on a terminal; the sections pattern, generations and support."""
    import torch

    from tempering.attention.layout import layout
    from tempering.attention.measure import measure_tokens
    from tempering.attention.profile import Profile
    from tempering.cli.sections import UNTEMPERED, pattern_section, support_section
    from tempering.engines.generation import prompt_ids, stream

    label = profile.pattern or "profile"
    ids = prompt_ids(tokenizer, prompt, chat=chat)
    rows = [Profile.neutral(layout(network)), profile]
    found: list[list[int]] = [[], []]
    texts = ["", ""]
    with _Live((UNTEMPERED, label), show) as update:
        for step in stream(
            network,
            tokenizer,
            ids,
            rows,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
        ):
            found[step.row].append(step.token)
            texts[step.row] += step.text
            update(texts)
    full = torch.cat([ids, torch.tensor(found[0], dtype=ids.dtype)])[None]
    return {
        "pattern": pattern_section({label: profile}),
        "generations": {
            "prompt": prompt,
            "samples": [
                {
                    "label": name,
                    "seed": seed,
                    "text": text,
                    "tokens": len(own),
                    "finish": "length" if len(own) == tokens else "end",
                }
                for name, text, own in zip((UNTEMPERED, label), texts, found, strict=True)
            ],
        },
        "support": support_section(
            measure_tokens(network, full),
            {label: measure_tokens(network, full, profile=profile)},
            ("sink_share",),
        ),
    }


class _Live:
    """Two columns that grow as tokens come, on a terminal; nothing elsewhere."""

    def __init__(self, labels: tuple[str, str], show: bool) -> None:
        self.labels = labels
        self.show = show and sys.stdout.isatty()

    def __enter__(self) -> Any:
        if not self.show:
            return lambda texts: None
        from rich.live import Live

        self.display = Live(self._table(["", ""]), refresh_per_second=12, transient=True)
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
