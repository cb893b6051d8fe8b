"""The models that `make models` fetches: their weights, their tokens, and exact temperatures."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tempering.attention import Profile, layout, tempered
from tempering.attention.baking.bake import bake, foldable
from tempering.attention.control.self_check import self_check
from tempering.data import sample_text, texts
from tempering.engines.checkpoints.gguf import bake_gguf
from tempering.engines.loading.catalogue import MODELS
from tempering.engines.loading.embedded import embedded_directory
from tempering.engines.loading.gguf_files import embedded_gguf
from tempering.engines.loading.hub import load_model

GEMMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

PIECES = [" ", "  ", "   ", "\n", "\n\n", "\t", "a", "the", " b", "1", ".", "<b>", "ß", "👩‍👩‍👧",
          "漢", "\r\n", "    return", "'s", "http://", "\u00a0"]  # fmt: skip


def waves(*shape: int) -> torch.Tensor:
    """The same numbers in every library, sin(.37 i)."""
    places = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin(places * 0.37).astype(np.float32).reshape(shape))


@pytest.mark.models("gemma3-270m")
class TestGemma:
    def test_every_weight_is_the_dequantised_one_to_the_last_bit(self, gemma):
        from gguf import dequantize

        from tempering.engines.loading.gguf_reading import QuickReader

        parameters = dict(gemma[0].named_parameters())
        for tensor in QuickReader(embedded_gguf("gemma3-270m")).tensors:
            expected = np.array(dequantize(tensor.data, tensor.tensor_type))
            if tensor.name in ("token_embd.weight", "output_norm.weight"):
                name = "embed_tokens.weight" if "embd" in tensor.name else "norm.weight"
                name = f"model.{name}"
            else:
                _, layer, part, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{GEMMA[part]}.weight"
            if "norm" in name:  # Gemma's norms multiply by 1 + w; llama.cpp stores 1 + w
                expected = expected - 1
            assert torch.equal(parameters.pop(name), torch.from_numpy(expected)), name
        assert not parameters

    def test_the_configuration_is_the_published_one(self, gemma):
        config = gemma[0].config
        assert (config.num_hidden_layers, config.num_attention_heads) == (18, 4)
        assert (config.num_key_value_heads, config.head_dim, config.hidden_size) == (1, 256, 640)
        assert (config.vocab_size, config.max_position_embeddings) == (262144, 32768)
        assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)
        full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        assert full == [5, 11, 17]
        bases = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
        assert bases == {"sliding_attention": 1e4, "full_attention": 1e6}
        assert config.tie_word_embeddings
        assert config.final_logit_softcapping is config.attn_logit_softcapping is None
        assert not hasattr(config, "quantization_config")

    def test_it_reads_and_speaks(self, gemma):
        model, tokenizer = gemma
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        assert prompt.input_ids[0, 0] == tokenizer.bos_token_id == 2
        with torch.no_grad():
            answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(answer[0]) == (
            "<bos>The capital of France is the capital of the country of France."
        )

    @pytest.mark.parametrize("name", list(texts()))
    def test_text_survives_the_tokenizer(self, gemma, name):
        tokenizer, text = gemma[1], sample_text(name)
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        assert tokenizer.decode(ids) == text

    def test_its_tokens_are_llama_cpps(self, gemma):
        pytest.importorskip("cyllama.llama.llama_cpp", reason="needs: pip install cyllama")
        from tempering.engines.llamacpp.model import LlamaCpp

        rng = random.Random(0)
        samples = [sample_text(name) for name in texts()]
        samples += ["", "\r\n", "[@BOS@] <unused5>", "<start_of_turn>user", "x" * 300]
        samples += ["a" + " " * count + "b" for count in range(1, 100, 7)]
        samples += ["".join(rng.choices(PIECES, k=rng.randint(1, 60))) for _ in range(200)]
        with LlamaCpp(embedded_gguf("gemma3-270m"), length=32, threads=1) as engine:
            for text in samples:
                wanted = engine.ids(text)
                got = gemma[1](text, add_special_tokens=False, verbose=False).input_ids
                assert got == wanted, text[:40]
                assert gemma[1].decode(got) == text

    def test_its_log_probabilities_are_llama_cpps(self, gemma):
        pytest.importorskip("cyllama.llama.llama_cpp", reason="needs: pip install cyllama")
        from tempering.engines.llamacpp.model import LlamaCpp

        model, tokenizer = gemma
        # Longer than the sliding window of 512.
        ids = tokenizer(sample_text("fiction"), verbose=False).input_ids[:640]
        with LlamaCpp(embedded_gguf("gemma3-270m"), length=700, threads=1) as engine:
            theirs = torch.tensor(engine.logprobs([ids])[0][1:])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        ours = logits.gather(1, torch.tensor(ids)[1:, None])[:, 0]
        # llama.cpp rounds activations to 8 bits, which is worth .07 a token and no bias; a wrong
        # window or base of the rotation is a bias, most where the window has cut something off.
        for part in (slice(None, 512), slice(512, None)):
            assert float((ours - theirs)[part].abs().mean()) < 0.15
            assert abs(float((ours - theirs)[part].mean())) < 0.02

    def test_temperatures_are_exact(self, gemma):
        self_check(gemma[0])

    def test_it_bakes_per_layer(self, gemma):
        model, tokenizer = gemma
        found = foldable(model)
        assert found.verdict == "per layer", found.reason
        assert found.reason.endswith("q_norm.weight is shared by its heads")
        generator = torch.Generator().manual_seed(0)
        rows = [torch.exp(torch.randn(1, generator=generator) / 2).expand(4) for _ in range(18)]
        profile = Profile.from_rows([row.double() for row in rows], layout(model))
        ids = tokenizer(sample_text("code"), return_tensors="pt", verbose=False).input_ids[:, :96]
        warm = bake(model, profile)
        with torch.no_grad():
            with tempered(model, profile):
                wanted = model(ids).logits
            plain, got = model(ids).logits, warm(ids).logits
        assert float((got - wanted).abs().max()) < 1e-4 * float(wanted.std())
        assert float((plain - wanted).abs().max()) > 0.1 * float(wanted.std())

    def test_its_file_bakes(self, gemma, tmp_path):
        model, tokenizer = gemma
        pattern = torch.linspace(0.7, 1.4, 18).double()[:, None].expand(18, 4)
        profile = Profile.from_rows(list(pattern), layout(model))
        warm = tmp_path / "warm.gguf"
        bake_gguf(embedded_gguf("gemma3-270m"), profile, warm)
        again, _ = load_model(warm)
        ids = tokenizer(sample_text("play"), return_tensors="pt", verbose=False).input_ids[:, :64]
        with torch.no_grad():
            with tempered(model, profile):
                wanted = model(ids).logits
            got = again(ids).logits
        assert float((got - wanted).abs().max()) < 1e-4 * float(wanted.std())


@pytest.mark.models("whisper-tiny.en")
class TestWhisper:
    @pytest.fixture(scope="class")
    def whisper(self) -> tuple[Any, Any]:
        return load_model("whisper-tiny.en")

    def test_it_is_the_model_with_its_processor(self, whisper):
        model, processor = whisper
        assert type(model).__name__ == "WhisperForConditionalGeneration"
        assert model.dtype == torch.float32
        features = processor(np.zeros(16000, np.float32), sampling_rate=16000, return_tensors="pt")
        assert features.input_features.shape == (1, 80, 3000)
        tokens = processor.tokenizer
        ids = tokens("Hello, world!", add_special_tokens=False).input_ids
        assert ids == [15496, 11, 995, 0]  # GPT-2's
        assert tokens.decode([50257, 50362, *ids, 50256], skip_special_tokens=True) == (
            "Hello, world!"
        )
        assert tokens.convert_ids_to_tokens([50257, 50362, 50363, 51863]) == [
            "<|startoftranscript|>", "<|notimestamps|>", "<|0.00|>", "<|30.00|>"
        ]  # fmt: skip

    def test_its_numbers_are_ctranslate2s(self, whisper):
        """CTranslate2 4.8.5 in float32, on the package's own file."""
        with torch.no_grad():
            found = whisper[0](
                input_features=waves(1, 80, 3000),
                decoder_input_ids=torch.tensor([[50257, 50362]]),
            )
        encoded = found.encoder_last_hidden_state[0]
        wanted = torch.tensor([
            [-0.28686157, -0.32567397, 1.4713163, -0.87289125, -1.556081],
            [0.06743717, 0.4506702, -0.435811, 0.28561175, -2.155624],
        ])  # fmt: skip
        assert torch.allclose(encoded[[0, -1], :5], wanted, atol=1e-4)
        wanted = torch.tensor([4.953429, 1.9696832, -0.02279639, -3.6421187])
        assert torch.allclose(found.logits[0, -1, :4], wanted, atol=1e-4)

    def test_its_stacks_are_told_apart(self, whisper):
        found = layout(whisper[0])
        assert len(found.layers) == 12
        assert set(found.heads) == {6}


@pytest.mark.models("dinov2-small")
class TestDinov2:
    @pytest.fixture(scope="class")
    def dinov2(self) -> tuple[Any, Any]:
        return load_model("dinov2-small")

    def test_it_is_the_model_with_its_processor(self, dinov2):
        from PIL import Image

        model, processor = dinov2
        assert type(model).__name__ == "Dinov2Model"
        pixels = processor(Image.new("RGB", (300, 400), "white"), return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, 224, 224)
        assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.64]), atol=1e-4)
        assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (12, 6)

    def test_its_numbers_are_onnx_runtimes(self, dinov2):
        """ONNX Runtime 1.32.0 on the package's own file, the output of the last norm."""
        with torch.no_grad():
            found = dinov2[0](waves(1, 3, 224, 224)).last_hidden_state[0]
        assert found.shape == (257, 384)
        wanted = torch.tensor([
            [0.56633186, -0.380086, 1.6386756, -3.6541464, -0.9101699],
            [1.1294038, 0.17199378, 0.45582226, -3.675327, -0.90833044],
        ])  # fmt: skip
        assert torch.allclose(found[[0, -1], :5], wanted, atol=1e-4)


@pytest.mark.models("minilm")
class TestMiniLM:
    def test_its_embedding_is_the_published_one(self):
        model, tokenizer = load_model("minilm")
        assert type(model).__name__ == "BertModel"
        given = tokenizer("This is an example sentence", return_tensors="pt")
        with torch.no_grad():
            hidden = model(**given).last_hidden_state
        found = torch.nn.functional.normalize(hidden.mean(1))[0, :4]
        # The model card of sentence-transformers/all-MiniLM-L6-v2.
        wanted = torch.tensor([0.0676569, 0.0634959, 0.0487131, 0.0793049])
        assert torch.allclose(found, wanted, atol=1e-5)

    def test_its_directory_is_sentence_transformers(self):
        folder: Path = embedded_directory(MODELS["minilm"])
        assert (folder / "modules.json").is_file()
        assert (folder / "1_Pooling" / "config.json").is_file()
