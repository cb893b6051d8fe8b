"""A GGUF file turned into a directory that transformers loads, with nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tempering.engines.loading.quiet import quiet
from tempering.errors import ModelError

_LARGE = 100_000  # tokens
_KIND = ("tokenizer.ggml.pre", "general.architecture")


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
    from safetensors import SafetensorError

    say("reading the tokenizer (1 of 3)")
    tokenizer = gguf_tokenizer(source)
    if not _known_exactly(source):
        raise ModelError(
            f"{source} has another tokenizer than SmolLM2's or Gemma 3's, the only ones that are "
            "known to convert exactly"
        )
    say("reading and dequantising the weights (2 of 3)")
    model = gguf_network(source)
    say("writing (3 of 3)")
    try:
        with quiet():
            model.save_pretrained(target)
            _save_tokenizer(tokenizer, target)
    except SafetensorError as error:  # how a full disk shows itself there
        raise OSError(str(error)) from error


def gguf_network(source: Path) -> Any:
    """The model of a GGUF file, float32, in eval mode; ModelError where transformers can't."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tempering.engines.loading.gguf_reading import WeightsReader, quick_gguf

    file = {"gguf_file": source.name}
    with quiet():
        try:
            with quick_gguf(WeightsReader):
                config = AutoConfig.from_pretrained(str(source.parent), **file)
                _restore_vocabulary_size(config, source)
                model = AutoModelForCausalLM.from_pretrained(
                    str(source.parent), config=config, dtype=torch.float32, **file
                )
        except Exception as error:  # the loaders raise every kind
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"transformers can't read {source}: {reason}") from error
    forget_quantization(model)
    return model.eval()


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
    splitting, architecture = _told(source, *_KIND)
    if splitting == "smollm":
        restore_pretokenizer(found)
    if architecture == "gemma3":
        restore_spaces(found)
    return found


def restore_pretokenizer(tokenizer: Any) -> None:
    """Split digits as SmolLM2's training did; transformers' conversion leaves that out.

    A GGUF names its pre-tokenizer; "smollm" splits off every digit first and then applies
    GPT-2's rule (llama.cpp, llama-vocab.cpp). With GPT-2's rule alone, whitespace before a digit
    groups differently: "\\n\\n1" gives two newlines where the model knows one double newline.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def restore_spaces(tokenizer: Any) -> None:
    """Take runs of spaces as the longest tokens that fit, from the left, as SentencePiece does.

    The tokens of 2 to 31 spaces are user-defined symbols, which are cut out before pairs are
    merged. transformers' conversion leaves them to the merges: 40 spaces become 16 and 24, where
    the model knows 31 and 9.
    """
    from tokenizers import AddedToken

    runs = [token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) == {"\u2581"}]
    # Matched in the normalised text, where spaces are written so.
    tokenizer.add_tokens([AddedToken(run, normalized=True, special=False) for run in sorted(runs)])


def _save_tokenizer(tokenizer: Any, target: Path) -> None:
    """Beside the model; a large one so that it loads from tokenizer.json as it stands.

    transformers would build Gemma's anew from the vocabulary and 500,000 merges at each load.
    """
    tokenizer.save_pretrained(target)
    if len(tokenizer) < _LARGE:
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((target / name).read_text(encoding="utf-8"))
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "PreTrainedTokenizerFast"
        compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (target / name).write_text(compact, encoding="utf-8")


def _restore_vocabulary_size(config: Any, source: Path) -> None:
    """transformers counts the tokens where a file doesn't tell; `WeightsReader` leaves them out."""
    from tempering.engines.loading.gguf_reading import WeightsReader

    reader = WeightsReader(source)
    architecture = reader.fields["general.architecture"].contents()
    if reader.get_field(f"{architecture}.vocab_size") is None:
        shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
        if "token_embd.weight" not in shapes:
            raise ValueError("it holds no token_embd.weight")
        config.vocab_size = int(shapes["token_embd.weight"][1])


def _known_exactly(source: Path) -> bool:
    """Whether tokens are known to be llama.cpp's own for a file's kind of vocabulary."""
    splitting, architecture = _told(source, *_KIND)
    return splitting == "smollm" or architecture == "gemma3"


def _told(source: Path, *keys: str) -> list[Any]:
    """What a file says of itself; None for a key that it lacks."""
    from tempering.engines.loading.gguf_reading import WeightsReader

    fields = map(WeightsReader(source).get_field, keys)
    return [None if field is None else field.contents() for field in fields]


def forget_quantization(model: Any) -> None:
    """Take the quantization marks off, now that the weights are plain float32.

    `save_pretrained` refuses while they are there, and a reader would look for the GGUF.
    """
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
