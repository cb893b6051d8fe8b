"""llama.cpp on files that were baked in place: its own quantisers, its own log probabilities.

Needs cyllama, prebuilt llama.cpp: pip install cyllama. Skipped without it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tempering.attention import Profile, tempered
from tempering.engines.checkpoints.gguf import bake_gguf
from tempering.engines.loading.gguf_files import load_gguf
from tests.integration.test_bake_gguf import T, codes, tensors, write_llama

# Where llama.cpp gives up it would start a debugger on this process, which may never end.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
llama = pytest.importorskip(
    "cyllama.llama.llama_cpp", reason="needs llama.cpp: pip install cyllama"
)
IDS = list(range(3, 43))
# llama_ftype of llama.h.
FTYPES = {"Q2_K": 10, "Q3_K_S": 11, "Q4_0": 2, "Q4_K_M": 15, "Q8_0": 7, "IQ4_XS": 30}


class Model(llama.LlamaModel):
    """cyllama 0.2's contexts ask their model for `n_vocab`, which it lacks."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


def llamacpp(path: Path) -> torch.Tensor:
    """llama.cpp's log probabilities of the next token, at each token."""
    settings = llama.LlamaContextParams()
    settings.n_ctx = settings.n_batch = 64
    settings.n_threads = settings.n_threads_batch = 1
    model = Model(str(path), llama.LlamaModelParams())
    context = llama.LlamaContext(model, settings)
    batch = llama.LlamaBatch(n_tokens=len(IDS), embd=0, n_seq_max=1)
    for place, token in enumerate(IDS):
        batch.add(token, place, [0], True)
    context.decode(batch)
    rows = [list(context.get_logits_ith(place)) for place in range(len(IDS))]
    return torch.tensor(rows, dtype=torch.float64).log_softmax(-1)


@torch.no_grad()
def in_process(model) -> torch.Tensor:
    return model(torch.tensor([IDS])).logits[0].double().log_softmax(-1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    llama.disable_logging()
    return write_llama(tmp_path_factory.mktemp("gguf") / "f32.gguf", ["F32", "F32"])


@pytest.mark.parametrize("name", ["F32", *FTYPES])
def test_a_folded_file_is_the_tempered_model_in_llamacpp(plain, tmp_path, name):
    cold, warm, profile = plain, tmp_path / "warm.gguf", Profile.from_matrix(T)
    if name != "F32":
        cold = tmp_path / "cold.gguf"
        settings = llama.LlamaModelQuantizeParams()
        settings.ftype, settings.nthread = FTYPES[name], 1
        llama.model_quantize(str(plain), str(cold), settings)
    result = bake_gguf(cold, profile, warm, in_place=True)
    (kind,) = result.kept
    assert name.startswith(kind)
    assert warm.stat().st_size == cold.stat().st_size
    own, new = tensors(cold), tensors(warm)
    for tensor, other in zip(own.values(), new.values(), strict=True):
        if kind != "F32" or "attn_q" not in tensor.name:
            before, after = (codes(x.data, x.tensor_type) for x in (tensor, other))
            assert (before == after).all()
    model, _ = load_gguf(cold)
    untempered = in_process(model)
    with tempered(model, profile):
        wanted = in_process(model)
    # What llama.cpp loses itself: it rounds activations to 8 bits, keys and values to float16.
    loss = float((llamacpp(cold) - untempered).abs().mean())
    got = float((llamacpp(warm) - wanted).abs().mean())
    # Colder attention makes more of the same errors: 1.16 times at most over these formats.
    assert got <= 1.3 * loss
    assert float((untempered - wanted).abs().mean()) > 10 * got
