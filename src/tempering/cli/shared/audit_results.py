"""What `tempering audit` asks an engine, and the sections of its record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempering.cli.shared import common
from tempering.errors import InputError

if TYPE_CHECKING:
    from tempering.audit.audit import Audit
    from tempering.audit.candidates import TemperatureEstimate
    from tempering.audit.scores import Scored


def prompts_of(
    network: Any,
    tokenizer: Any,
    engine: str,
    served: str,
    *,
    profile: Any,
    text: Path | None,
    chunk: int,
    limit: int | None,
    precision: str | None,
    timeout: float,
    report: Callable[[str, int, int], None],
) -> tuple[list[Scored], str, str]:
    """What the engine says of a text, its name for the verdict, and its precision.

    The first prompt is compared before the others are sent.
    """
    from tempering.audit.scores import read_scores

    if Path(engine).is_file():
        if text is not None:
            raise InputError("a file of log probabilities has prompts of its own: leave out --text")
        words_known = network.get_input_embeddings().weight.shape[0]
        return read_scores(engine, words_known), engine, precision or "float32"
    words, _ = common.text_of(text)
    ids = _prompts(tokenizer, words, chunk, limit)
    common.check_context(network, chunk, f"--chunk {chunk}")
    if engine == "vllm":
        from tempering.engines.vllm.scoring import VllmScorer
        from tempering.engines.vllm.swap import swap_profile

        if precision == "q8":
            raise InputError("--precision q8 is llama.cpp's; vLLM's is float32, bfloat16, float16")
        kind = precision or "float32"
        with VllmScorer(served, chunk, dtype=kind) as scorer:
            if profile is not None:
                swap_profile(scorer.llm, profile)
            return _asked(network, scorer, ids, "vLLM", profile, report), "vLLM", kind
    if engine == "llamacpp":
        from tempering.cli.shared.llamacpp_runs import gguf_path
        from tempering.engines.llamacpp.model import LlamaCpp

        with LlamaCpp(gguf_path(served), length=chunk) as llama:
            return (
                _asked(network, llama, ids, llama.name, profile, report),
                llama.name,
                precision or llama.precision,
            )
    if engine.startswith(("http://", "https://")):
        from tempering.engines.providers.echo import EchoServer

        server = EchoServer(engine, served, tokenizer, timeout=timeout)
        return (
            _asked(network, server, ids, server.name, profile, report),
            server.name,
            precision or "float32",
        )
    raise InputError(
        "--engine is vllm, llamacpp, the address of a server such as http://localhost:8000/v1, or "
        f"a file of log probabilities; {engine!r} is none of these, and there is no such file"
    )


def open_reference(name: str, device: str | None, precision: str | None) -> tuple[Any, Any]:
    """The reference, float32, with the weights that an engine of this precision has."""
    import torch

    if name.endswith(".gguf"):
        from tempering.engines.loading.gguf_files import check_positions, load_gguf

        check_positions(Path(name).expanduser())
        network, tokenizer = load_gguf(Path(name).expanduser())
        return (network if device is None else network.to(device)), tokenizer
    weights = "float32" if precision in (None, "q8") else precision
    network, tokenizer = common.open_model(name, device, weights)
    return network.to(torch.float32), tokenizer


def _prompts(tokenizer: Any, words: str, chunk: int, limit: int | None) -> list[list[int]]:
    """Chunks of the text, each behind the BOS where the model's tokenizer puts one."""
    from tempering.chunks import token_chunks

    return token_chunks(tokenizer, words, chunk, limit).tolist()


def _asked(
    network: Any,
    engine: Any,
    ids: Sequence[Sequence[int]],
    name: str,
    profile: Any,
    report: Callable[[str, int, int], None],
) -> list[Scored]:
    from tempering.audit.audit import check_kinship
    from tempering.audit.sources import ask

    found = ask(engine, ids[:1])
    check_kinship(network, found[0], name, profile)
    for place in range(1, len(ids)):
        report("engine", place, len(ids))
        found += ask(engine, ids[place : place + 1], place)
    report("engine", len(ids), len(ids))
    return found


def audit_sections(found: Audit, tokenizer: Any) -> dict[str, Any]:
    """The verdict, temperatures with intervals, hypotheses, and where the two part."""
    sections: dict[str, Any] = {
        "verdict": [
            {
                "verdict": found.verdict,
                "right": {True: "yes", False: "no", None: "can't be told"}[found.right],
                "differences, nats": found.scale,
                "explained by precision, nats": found.null_scale,
                "log probabilities": found.tokens,
                "prompts": found.prompts,
            }
        ],
        "temperatures": [_row(item) for item in (found.temperature, *found.kinds)],
        "hypotheses": [
            {
                "hypothesis": item.name if item.kind != "mistake" else f"as if {item.name}",
                "fitted numbers": item.numbers,
                "unexplained, nats": item.scale,
                "gain of log likelihood": item.gain,
                "gain over its standard error": min(item.z, 1e9),
            }
            for item in found.candidates
        ],
    }
    if found.layers:
        sections["temperature_of_each_layer"] = [_row(item) for item in found.layers]
    sections["where_they_part"] = [
        {
            "prompt": item.prompt,
            "place": item.place,
            "token": repr(tokenizer.decode([item.token])),
            "engine": item.engine,
            "reference": item.reference,
            "difference": item.engine - item.reference,
        }
        for item in found.partings
    ]
    if found.untold:
        sections["not_told_by_these_prompts"] = [{"hypothesis": name} for name in found.untold]
    return sections


def _row(item: TemperatureEstimate) -> dict[str, Any]:
    return {
        "of": item.name,
        "T": item.value,
        "low": item.low,
        "high": item.high,
        "should be": item.said,
        "differs": "yes" if item.significant else "no",
    }
