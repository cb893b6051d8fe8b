"""Audits of llama.cpp: right as it is, and with wrong scales put into it, each named first.

By llama.cpp's own options (--rope-freq-base, --yarn-attn-factor, ...) and by wrong keys of its
file, as converters have written them: https://github.com/ggml-org/llama.cpp/issues/17945.
Needs cyllama, prebuilt llama.cpp: pip install cyllama. Skipped without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter, RopeScalingType

from tempering.audit import Audit, ask, audit
from tempering.engines.llamacpp.model import LlamaCpp
from tempering.engines.loading.gguf_files import load_gguf
from tests.integration.audit_tiny import reconfigured
from tests.integration.llamacpp_tiny import write_gguf

llama = pytest.importorskip(
    "cyllama.llama.llama_cpp", reason="needs llama.cpp: pip install cyllama"
)

FACTOR = 1 + 0.1 * math.log(8)
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
}
NO_SCALING = 0  # LLAMA_ROPE_SCALING_TYPE_NONE


def yarn(factor: float = 8.0, attention: float | None = None) -> Callable[[GGUFWriter], None]:
    """Keys of a file whose positions YaRN stretches."""

    def add(out: GGUFWriter) -> None:
        out.add_rope_scaling_type(RopeScalingType.YARN)
        out.add_rope_scaling_factor(factor)
        out.add_rope_scaling_orig_ctx_len(64)
        if attention is not None:
            out.add_rope_scaling_attn_factors(attention)

    return add


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Any]:
    """The models that the engine should run, none of them read from the file that it gets."""
    folder = tmp_path_factory.mktemp("plain")
    found = {}
    for kind in ("llama", "qwen2", "gemma3"):
        found[kind] = load_gguf(write_gguf(folder / f"{kind}.gguf", kind))[0]
    for kind in ("llama", "qwen2"):
        found[f"{kind}, yarn"] = reconfigured(
            found[kind], lambda config: setattr(config, "rope_parameters", dict(YARN))
        )
    return found


@pytest.fixture
def told(monkeypatch) -> Callable[..., None]:
    """told(rope_freq_base=...): llama.cpp is started with these options."""

    def tell(**options: Any) -> None:
        own = llama.LlamaContextParams

        def settings() -> Any:
            found = own()
            for name, value in options.items():
                setattr(found, name, value)
            return found

        monkeypatch.setattr(llama, "LlamaContextParams", settings)

    return tell


def audited(reference: Any, path: Path) -> Audit:
    draw = torch.Generator().manual_seed(0)
    # gemma3's heads of 256 make it slow, and its mistakes are large.
    count = 1 if reference.config.model_type == "gemma3_text" else 3
    prompts = torch.randint(5, 200, (count, 120), generator=draw).tolist()
    with LlamaCpp(path, threads=1) as engine:
        said = ask(engine, prompts)
        precision = engine.precision
    return audit(reference, said, name="llama.cpp", precision=precision, layers=False)


# (reference, options of llama.cpp, how its file differs, what the verdict says)
WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {"rope_freq_base": 500000.0}, {}, "the base of its rotation were 500000 in"),
    ("qwen2", {"rope_freq_base": 1e6}, {}, "the base of its rotation were 1e+06 in"),
    ("qwen2", {}, {"base": 500000.0}, "the base of its rotation were 500000 in"),
    ("qwen2", {"rope_freq_scale": 0.25}, {}, "stretched by 4 (linear RoPE)"),
    ("llama", {"yarn_attn_factor": 1.05**-0.5}, {}, "it runs at T = 1.05"),
    ("qwen2", {"yarn_attn_factor": 1.05**0.5}, {}, "it runs at T = 0.95"),
    ("llama, yarn", {}, {"more": yarn(attention=FACTOR)}, "factor 1.2079 were applied twice"),
    ("qwen2, yarn", {}, {"more": yarn(attention=FACTOR)}, "factor 1.2079 were applied twice"),
    ("llama, yarn", {}, {"more": yarn(attention=1 / FACTOR)}, "factor 1.2079 were missing"),
    ("qwen2, yarn", {}, {"more": yarn(attention=FACTOR**-0.5)}, "queries and not to the keys"),
    ("llama, yarn", {}, {"more": yarn(64.0, FACTOR / (1 + 0.1 * math.log(64)))},
     "YaRN's factor 8 of positions were squared"),
    ("llama, yarn", {}, {}, "YaRN were left out"),
    ("gemma3", {}, {"window": 17}, "the window of its sliding layers were 17 in place of 16"),
    ("gemma3", {}, {"window": 512}, "the window of its sliding layers were missing"),
    ("gemma3", {}, {"base": 500000.0}, "500000 in place of 10000 in its full layers"),
]  # fmt: skip


@pytest.mark.parametrize(
    "kind, options, file, says", WRONG, ids=[f"{kind}: {says}" for kind, _, _, says in WRONG]
)
def test_it_is_named_first(references, told, tmp_path, kind, options, file, says):
    path = write_gguf(tmp_path / "wrong.gguf", kind.partition(",")[0], **file)
    if options:
        told(**options)
    found = audited(references[kind], path)
    assert found.right is False
    assert says in found.verdict, found.verdict


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "llama, yarn", "qwen2, yarn"])
def test_llamacpp_is_right(references, tmp_path, kind):
    more = yarn() if "yarn" in kind else None
    path = write_gguf(tmp_path / "right.gguf", kind.partition(",")[0], more=more)
    found = audited(references[kind], path)
    assert found.right is True, found.verdict
    assert found.temperature.low <= 1 <= found.temperature.high
