"""llama.cpp on the embedded model, baked in place: its log probabilities, folded and not.

    pip install cyllama
    python benchmarks/in_place_llamacpp.py Q4_1 Q4_0 Q8_0

Q4_1 is the file that the model comes in; the others are made from it by llama.cpp's quantiser. For
each: the mean and the largest difference, in nats, between llama.cpp's log probabilities and this
process's on 64 tokens of text, for the file as it is and for the folded file against the tempered
model; and how far the temperatures move them. 5 to 10 minutes each on a busy core.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from cyllama.llama import llama_cpp as llama

from tempering.attention import Profile, tempered
from tempering.data import sample_text
from tempering.engines.checkpoints.gguf import bake_gguf
from tempering.engines.loading.gguf_files import embedded_gguf, load_gguf

LENGTH = 64
# llama_ftype of llama.h.
FTYPES = {"Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17}


class Model(llama.LlamaModel):
    """cyllama 0.2's contexts ask their model for `n_vocab`, which it lacks."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


def llamacpp(path: Path, ids: list[int]) -> torch.Tensor:
    settings = llama.LlamaContextParams()
    settings.n_ctx = settings.n_batch = len(ids)
    settings.n_threads = settings.n_threads_batch = 1
    model = Model(str(path), llama.LlamaModelParams())
    context = llama.LlamaContext(model, settings)
    batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for place, token in enumerate(ids):
        batch.add(token, place, [0], True)
    context.decode(batch)
    rows = [list(context.get_logits_ith(place)) for place in range(len(ids))]
    return torch.tensor(rows, dtype=torch.float64).log_softmax(-1)


def measure(name: str, folder: Path) -> dict:
    own = embedded_gguf("smollm2")
    cold, warm = own, folder / f"{name}-warm.gguf"
    if name != "Q4_1":
        cold = folder / f"{name}.gguf"
        settings = llama.LlamaModelQuantizeParams()
        settings.ftype, settings.nthread, settings.allow_requantize = FTYPES[name], 1, True
        llama.model_quantize(str(own), str(cold), settings)
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(30, 9, generator=generator, dtype=torch.float64)
    profile = Profile.from_matrix(torch.exp((share * 2 - 1) * 0.4))
    result = bake_gguf(cold, profile, warm, in_place=True)
    model, tokenizer = load_gguf(cold)
    ids = tokenizer(sample_text("demo"))["input_ids"][:LENGTH]
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        with tempered(model, profile):
            wanted = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    cold_error, warm_error = llamacpp(cold, ids) - plain, llamacpp(warm, ids) - wanted
    return {
        "format": name,
        "types of q": result.kept,
        "same size": cold.stat().st_size == warm.stat().st_size,
        "rounding": result.rounding,
        "unfolded, mean": float(cold_error.abs().mean()),
        "unfolded, max": float(cold_error.abs().max()),
        "folded, mean": float(warm_error.abs().mean()),
        "folded, max": float(warm_error.abs().max()),
        "moved by the temperatures": float((wanted - plain).abs().mean()),
    }


def main() -> None:
    torch.set_num_threads(1)
    llama.disable_logging()
    for name in sys.argv[1:] or ["Q4_1", "Q4_0", "Q8_0"]:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(name, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
