"""A GGUF file turned into a directory that transformers loads, with nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tempering.engines.loading.quiet import quiet
from tempering.errors import ModelError


def convert_gguf(source: Path, target: Path, say: Callable[[str], None]) -> None:
    """Write the model and tokenizer of a GGUF file into `target`, in transformers' format.

    Weights are stored as float32: dequantised 4-bit blocks (scale * code + offset, both scale
    and offset float16) fit neither float16 nor bfloat16 exactly.

    Parameters
    ----------
    source: the GGUF file.
    target: an existing, empty directory.
    say: called with one line before each step.

    Raises ModelError when the file can't be read as a model that transformers knows, OSError
    when the result can't be written.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tempering.engines.loading.gguf_reading import quick_gguf

    folder, file = str(source.parent), source.name
    with quiet(), quick_gguf():
        try:
            say("reading the tokenizer (1 of 3)")
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
            say("reading and dequantising the weights (2 of 3)")
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise ModelError(f"can't read {source} as a GGUF model: {error}") from error
        if not restore_pretokenizer(tokenizer, source):
            raise ModelError(
                f"{source} has another tokenizer than SmolLM2's or Gemma 3's, the only ones that "
                "are known to convert exactly"
            )
        forget_quantization(model)
        say("writing (3 of 3)")
        try:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
        except SafetensorError as error:  # how a full disk shows itself there
            raise OSError(str(error)) from error


def gguf_tokenizer(source: Path) -> Any:
    """The tokenizer of a GGUF file, with transformers' interface.

    Where transformers converts the splitting of texts otherwise than llama.cpp does, ids still mean
    the same tokens. Raises ModelError for a vocabulary that transformers can't read.
    """
    from transformers import AutoTokenizer

    from tempering.engines.loading.gguf_reading import quick_gguf

    with quiet(), quick_gguf():
        try:
            found = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        except Exception as error:  # the loaders raise every kind
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"transformers can't read the vocabulary of {source}: {reason}"
            ) from error
    restore_pretokenizer(found, source)
    return found


def restore_pretokenizer(tokenizer: Any, source: Path) -> bool:
    """Split digits as SmolLM2's training did; transformers' conversion leaves that out.

    A GGUF names its pre-tokenizer; "smollm" splits off every digit first and then applies
    GPT-2's rule (llama.cpp, llama-vocab.cpp). With GPT-2's rule alone, whitespace before a digit
    groups differently: "\\n\\n1" gives two newlines where the model knows one double newline.
    False for a file whose tokenizer isn't known to be llama.cpp's own then: it stays as
    transformers reads it. Gemma 3's needs nothing.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    from tempering.engines.loading.gguf_reading import QuickReader

    reader = QuickReader(source)
    told = {
        name: None if (field := reader.get_field(name)) is None else field.contents()
        for name in ("tokenizer.ggml.pre", "general.architecture")
    }
    if told["tokenizer.ggml.pre"] == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
        return True
    return told["general.architecture"] == "gemma3"


def forget_quantization(model: Any) -> None:
    """Take the quantization marks off, now that the weights are plain float32.

    `save_pretrained` refuses while they are there, and a reader would look for the GGUF.
    """
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
