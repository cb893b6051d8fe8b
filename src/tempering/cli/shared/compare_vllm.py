"""`tempering compare --engine vllm`: costs through the log probabilities that engines give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.cli.shared import common
from tempering.cli.shared.engine_options import CONCURRENCY, TIMEOUT
from tempering.errors import InputError

if TYPE_CHECKING:
    from tempering.evaluation.journal import Journal


def compare_vllm(
    words: Any,
    patterns: list[str],
    profiles: list[Path],
    amplitude: float | None,
    controls: bool,
    *,
    model: str,
    chunk: int,
    limit: int | None,
    dtype: str,
) -> tuple[Any, dict[str, Any]]:
    """The comparison and the model's part of its record."""
    from tempering.attention.profiles.profile import Profile
    from tempering.chunks import token_chunks
    from tempering.engines.vllm.scoring import VllmScorer
    from tempering.evaluation.compare import Comparison, pattern_variants
    from tempering.evaluation.cost import Variant
    from tempering.schedules import schedule

    # All input is read first, since an engine takes minutes to start.
    wanted = [schedule(text) for text in patterns]
    if amplitude is not None:
        wanted = [pattern.amplitude(amplitude) for pattern in wanted]
    kept = [(path.stem, Profile.load(path)) for path in profiles]
    with VllmScorer(model, chunk, dtype=dtype) as engine:
        plan = engine.layout()
        chunks = token_chunks(engine.tokenizer, words, chunk, limit)
        depth = max(plan.depths.values())
        variants = [
            variant
            for pattern in wanted
            for variant in pattern_variants(pattern, plan, depth, controls)
        ]
        variants += [Variant(label, profile, text=profile.pattern or "") for label, profile in kept]
        with common.staged() as report:
            costs = engine.costs(chunks, variants, lambda done, total: report("cost", done, total))
        section = _model_section(engine, plan, model, dtype)
    return Comparison(tuple(variants), tuple(costs), (), {}, len(chunks), chunk), section


def compare_served(
    words: Any,
    patterns: list[str],
    profiles: list[Path],
    amplitude: float | None,
    controls: bool,
    *,
    spec: str,
    model: str,
    chunk: int,
    limit: int | None,
    out: Path,
    settings: dict[str, Any],
) -> tuple[Any, dict[str, Any], list[dict[str, Any]], Journal]:
    """The comparison on running servers, the model's part of its record, replicas, the journal."""
    from tempering.attention.profiles.profile import Profile
    from tempering.chunks import chunks_digest, token_chunks
    from tempering.cli.shared.keeping import resumable
    from tempering.engines.loading.hub import load_tokenizer
    from tempering.engines.providers.scoring import ServedScorer
    from tempering.evaluation.compare import Comparison, pattern_variants
    from tempering.evaluation.cost import Variant
    from tempering.evaluation.journal import Journal
    from tempering.schedules import schedule

    wanted = [schedule(text) for text in patterns]
    if amplitude is not None:
        wanted = [pattern.amplitude(amplitude) for pattern in wanted]
    kept = [(path.stem, Profile.load(path)) for path in profiles]
    scorer = ServedScorer(spec, concurrency=CONCURRENCY, timeout=TIMEOUT, note=common.note)
    plan = scorer.meet()
    chunks = token_chunks(load_tokenizer(model), words, chunk, limit)
    depth = max(plan.depths.values())
    variants = [
        variant
        for pattern in wanted
        for variant in pattern_variants(pattern, plan, depth, controls)
    ]
    variants += [Variant(label, profile, text=profile.pattern or "") for label, profile in kept]
    key = {
        **settings,
        "engine": "vllm served",
        "model": [Path(model).name, scorer.model],
        "text": chunks_digest(chunks),
        "profiles": [v.profile and v.profile.to_json() for v in variants],
    }
    journal = Journal(out, "compare", key)
    with resumable(journal) as report:
        costs = scorer.costs(
            chunks, variants, journal, lambda done, total: report("cost", done, total)
        )
    rows = list(journal.entries.values())
    replicas = [
        {
            "replica": place,
            "scored": sum(row["replica"] == place for row in rows),
            "left because": scorer.left.get(place),
        }
        for place in dict.fromkeys(
            [*(c.address for c in scorer.clients), *(row["replica"] for row in rows)]
        )
    ]
    section = {
        "name": Path(model).name,
        "shape": plan.describe(),
        "layers": len(plan.layers),
        "heads": max(plan.heads),
        "attn_implementation": "vllm",
    }
    comparison = Comparison(tuple(variants), tuple(costs), (), {}, len(chunks), chunk)
    return comparison, section, replicas, journal


def only_costs(
    budget: float | None, samples: int, reading: str, device: str | None, dtype: str, engine: str
) -> None:
    """InputError for an option that an engine which only scores prompts can't serve."""
    for asked, option, why in (
        (budget is not None, "--budget", "searches with an engine in process"),
        (samples > 0, "--samples", "samples with an engine in process"),
        (reading != "temperature", "--read-as", "needs attention weights, which it doesn't show"),
        (device is not None, "--device", "is the engine's to choose"),
        (engine == "llamacpp" and dtype != "float32", "--dtype", "is the file's"),
        (engine.startswith("vllm:") and dtype != "float32", "--dtype", "is the server's"),
    ):
        if asked:
            raise InputError(f"{option} {why}; leave it out, or leave out --engine {engine}")


def _model_section(engine: Any, plan: Any, name: str, dtype: str) -> dict[str, Any]:
    from tempering.engines.vllm.identity import checkpoint_directory, checkpoint_fingerprint

    config = engine.llm.llm_engine.model_config
    architecture = config.hf_config.architectures[0]
    directory = checkpoint_directory(config.model, config.revision)
    return {
        "name": Path(name).name,
        "architecture": architecture,
        "shape": plan.describe(),
        "fingerprint": directory and checkpoint_fingerprint(directory, architecture),
        "layers": len(plan.layers),
        "heads": max(plan.heads),
        "dtype": dtype,
        "attn_implementation": "vllm",
    }
