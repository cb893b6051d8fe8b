"""`generate`, `compare` and `serve` on a GGUF file that llama.cpp runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tempering.cli.shared import common
from tempering.errors import InputError


def gguf_path(model: str) -> Path:
    """The GGUF file that --model names; of an embedded model, the one that it comes in."""
    from tempering.engines.loading.catalogue import MODELS
    from tempering.engines.loading.gguf_files import embedded_gguf

    if model in MODELS:
        if MODELS[model].bits is not None:
            raise InputError(f"{model} is rounded in memory and is no GGUF file; bake it first")
        return embedded_gguf(model)
    return Path(model).expanduser()


def uniform_temperature(pattern: str | None, profile: str | Path | None) -> float:
    """The one attention temperature of a pattern or profile that is the same in all heads.

    llama.cpp takes no other without a second file. 1 without both; InputError for any other.
    """
    import torch

    from tempering.attention.profiles.profile import Profile
    from tempering.attention.profiles.rules import is_rule
    from tempering.schedules import schedule

    if pattern is not None and profile is not None:
        raise InputError("give --pattern or --profile, one of the two")
    if pattern is None and profile is None:
        return 1.0
    values = None
    if pattern is not None:
        values = None if is_rule(pattern) else schedule(pattern).sample(64)
    elif profile is not None:
        kept = Profile.load(profile)
        more = any(kept.rules) or bool(kept.output_scale)
        values = None if more else torch.cat([row.flatten() for row in kept.rows])
    if values is None or not bool((values == values[0]).all()):
        raise InputError(
            "llama.cpp takes one attention temperature for the whole model, such as "
            "'constant(1.2)'; any other is folded into its file: tempering bake FILE.gguf "
            "--profile P --in-place-scales"
        )
    return float(values[0])


def generate_llamacpp(
    model: str,
    prompt: str,
    *,
    attention: float,
    tokens: int,
    policy_text: str | None,
    temperature: float,
    chat: bool,
    seed: int,
) -> tuple[dict[str, Any], Any, str, dict[str, Any]]:
    """The section `generations`, the tokenizer, the policy's text, the model's section."""
    from tempering.cli.shared.sections import traced
    from tempering.engines.generating.side_by_side import prompt_text
    from tempering.engines.llamacpp.model import LlamaCpp
    from tempering.engines.llamacpp.writing import SampledToken, write
    from tempering.tokens import parse_policy
    from tempering.tokens.policy import ConstantPolicy

    with LlamaCpp(gguf_path(model), temperature=attention) as engine:
        tokenizer = engine.tokenizer
        policy = (
            ConstantPolicy(temperature)
            if policy_text is None
            else parse_policy(policy_text, tokenizer)
        )
        if policy.samples is not None:
            raise InputError(
                f"--tokens {policy} has a temperature for each of {policy.samples} samples; this "
                "command writes one. tempering serve FILE.gguf gives n samples"
            )
        text, plain = prompt_text(tokenizer, prompt, chat=chat)
        ids = engine.ids(text, special=plain)
        steps = list(write(engine, ids, [SampledToken(policy, seed)], tokens=tokens))
        sample = {
            "label": "llama.cpp",
            "seed": seed,
            "text": "".join(step.text for step in steps),
            "tokens": len(steps),
            "finish": "length" if len(steps) == tokens else "end",
            "trace": [traced(step) for step in steps],
        }
        section = _section(engine, model)
    return {"prompt": prompt, "samples": [sample]}, tokenizer, str(policy), section


def compare_llamacpp(
    words: Any,
    patterns: list[str],
    profiles: list[Path],
    amplitude: float | None,
    controls: bool,
    *,
    model: str,
    chunk: int,
    limit: int | None,
) -> tuple[Any, dict[str, Any]]:
    """The comparison and the model's part of its record."""
    from tempering.attention.examining.layout_of import layout
    from tempering.attention.profiles.profile import Profile
    from tempering.chunks import token_chunks
    from tempering.engines.llamacpp.model import LlamaCpp
    from tempering.engines.llamacpp.scoring import costs
    from tempering.engines.loading.gguf_files import load_gguf
    from tempering.evaluation.compare import Comparison, pattern_variants
    from tempering.evaluation.cost import Variant
    from tempering.schedules import schedule

    path = gguf_path(model)
    wanted = [schedule(text) for text in patterns]
    if amplitude is not None:
        wanted = [pattern.amplitude(amplitude) for pattern in wanted]
    kept = [(item.stem, Profile.load(item)) for item in profiles]
    with LlamaCpp(path, length=chunk) as engine:
        section = _section(engine, model)
    network, tokenizer = load_gguf(path)
    plan = layout(network)
    depth = max(plan.depths.values())
    variants = [
        variant
        for pattern in wanted
        for variant in pattern_variants(pattern, plan, depth, controls)
    ]
    variants += [Variant(label, profile, text=profile.pattern or "") for label, profile in kept]
    chunks = token_chunks(tokenizer, words, chunk, limit)
    with common.staged() as report:
        found = costs(path, chunks, variants, lambda done, total: report("cost", done, total))
    return Comparison(tuple(variants), tuple(found), (), {}, len(chunks), chunk), section


def _section(engine: Any, name: str) -> dict[str, Any]:
    return {
        "name": Path(name).name,
        "architecture": engine.description,
        "layers": engine.layers,
        "heads": engine.heads,
        "dtype": "GGUF",
        "attn_implementation": "llama.cpp",
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; on a GGUF file `tempering serve` takes {_TAKEN}")


_TAKEN = (
    "--host, --port, --api-key, --max-model-len, --max-num-seqs, --served-model-name, --threads"
)


def serve_llamacpp(model: str, profile: Path | None, arguments: Sequence[str]) -> None:
    """Serve a GGUF file until interrupted; the names of arguments are vLLM's."""
    from tempering.engines.llamacpp.model import LlamaCpp
    from tempering.engines.llamacpp.server import make_server

    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--served-model-name")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(list(arguments))
    for name in ("max_model_len", "max_num_seqs", "threads"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is 1 or more, not {value}")
    if not 0 <= given.port < 65536:
        raise InputError(f"--port is a number from 0 to 65535, not {given.port}")
    path = gguf_path(model)
    name = given.served_model_name or (path.name if model.endswith(".gguf") else model)
    with LlamaCpp(
        path,
        length=given.max_model_len,
        rows=given.max_num_seqs,
        threads=given.threads,
        temperature=uniform_temperature(None, profile),
    ) as engine:
        server = make_server(engine, name, host=given.host, port=given.port, key=given.api_key)
        host, port = server.server_address[:2]
        common.note(f"serving {name} at http://{host!s}:{port}/v1 (Ctrl-C ends it)")
        try:
            server.serve_forever()
        finally:
            server.server_close()
