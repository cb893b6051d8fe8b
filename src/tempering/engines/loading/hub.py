"""Models and tokenizers by name: an embedded model, a local directory, or a hub id."""

from __future__ import annotations

import difflib
import re
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

from tempering.engines.loading.catalogue import MODELS, EmbeddedModel
from tempering.engines.loading.embedded import embedded_directory
from tempering.engines.loading.gguf_files import check_positions, load_gguf
from tempering.engines.loading.model_files import check_directory
from tempering.engines.loading.model_kinds import model_class, processor_for, writes_text
from tempering.engines.loading.quiet import quiet
from tempering.engines.loading.rounding import round_weights
from tempering.errors import InputError, ModelError, TemperingWarning

__all__ = ["MODELS", "EmbeddedModel", "load_model"]

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """A model, ready for inference, and what makes its inputs.

    That is a causal language model and its tokenizer; or whatever transformers model a directory
    was saved as (a classifier, an encoder-decoder, one of images or sound), and its processor.

    The names of other models give those: "whisper-tiny.en" WhisperForConditionalGeneration and
    its processor, "dinov2-small" Dinov2Model and its image processor, "minilm" BertModel and its
    tokenizer.

    Parameters
    ----------
    name: a name in `MODELS` ("smollm2"), a directory in transformers' format, a GGUF file, or a
        hub id, looked for in this order.
    dtype: of the weights in memory.
    device: where to put the model, e.g. "cuda"; None leaves it on the CPU.
    attn_implementation: as transformers takes it, e.g. "eager" or "sdpa"; None is its default.

    Returns
    -------
    (model, tokenizer): the model is in eval mode; the tokenizer of a language model pads on the
    left, as generation in batches needs, with the end-of-text token where the model has no padding
    token. Other models come with their processor, None where their files hold none.

    Raises
    ------
    ModelError when the model can't be found, or can't be read as asked; InputError for a device
    that can't be used; MissingExtraError when a package that carries an embedded model is
    missing; OutputError when the cache can't be written. Weights in the files that the
    architecture has no place for are a TemperingWarning; code that a model brings along is
    never run.
    """
    from transformers import AutoModelForCausalLM

    _check_device(device)
    text = str(name)
    if is_gguf(name):
        check_positions(Path(text).expanduser())
        model, tokenizer = load_gguf(Path(text).expanduser())
        tokenizer.padding_side = "left"
        model = model.to(dtype)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
    else:
        place, bars = find_model(name)  # a download takes a while
        with quiet(bars=bars):
            config = _config(place, text)
            if not writes_text(config):
                kind = model_class(config, text)
                model = _checked(kind, place, text, config, dtype, attn_implementation)
                processor = processor_for(place, text)
                return model.to(device) if device is not None else model, processor
            model = _checked(AutoModelForCausalLM, place, text, config, dtype, attn_implementation)
            tokenizer = _tokenizer(place, text)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if text in MODELS and (bits := MODELS[text].bits) is not None:
        round_weights(model, bits)
        model.config._name_or_path = text
    return model.to(device) if device is not None else model, tokenizer


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of `load_model` alone."""
    place, bars = find_model(name)
    with quiet(bars=bars):
        return _tokenizer(place, str(name))


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    path = Path(name).expanduser()
    return path.suffix.lower() == ".gguf" and path.is_file()


def find_model(name: str | Path) -> tuple[str, bool]:
    """Where a model's files are, as transformers takes it, and whether that is the hub."""
    text = str(name)
    path = Path(text).expanduser()
    if text in MODELS:
        return str(embedded_directory(MODELS[text])), False
    if text and path.exists():
        check_directory(path)
        return str(path), False
    if _HUB_ID.fullmatch(text):
        _check_hub(text)
        return text, True
    raise ModelError(f"no model {text!r}: there is no such directory or GGUF file; {_known(text)}")


def _config(place: str, name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:
        _reraise(error, f"can't load the configuration of the model {name!r}")


def _checked(
    kind: Any,
    place: str,
    name: str,
    config: Any,
    dtype: torch.dtype,
    attn_implementation: str | None,
) -> Any:
    """The model, refused unless every weight it needs was in its files, in the right shape."""
    try:
        model, info = kind.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except Exception as error:
        _reraise(error, f"can't load the model {name!r}")
    # transformers would fill both kinds with random numbers and go on.
    if wrong := sorted(info["mismatched_keys"]):
        key, stored, expected = wrong[0]
        raise ModelError(
            f"{len(wrong)} weights of the model {name!r} don't fit its config.json, the first "
            f"being {key!r}: the file holds {tuple(stored)}, the configuration asks for "
            f"{tuple(expected)}; fetch or save the model again"
        )
    if absent := sorted(info["missing_keys"]):
        raise ModelError(
            f"the files of the model {name!r} lack {len(absent)} of its weights, the first being "
            f"{absent[0]!r}; fetch or save the model again"
        )
    if unused := sorted(info["unexpected_keys"]):
        warnings.warn(
            f"{len(unused)} weights in the files of the model {name!r} have no place in the "
            f"architecture of its config.json and are left out, the first being {unused[0]!r}",
            TemperingWarning,
            stacklevel=4,
        )
    return model.eval()


def _tokenizer(place: str, name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, padding_side="left", trust_remote_code=False)
    except Exception as error:
        _reraise(
            error,
            f"can't load the tokenizer of the model {name!r} (tokenizer.json, as "
            "tokenizer.save_pretrained writes it, belongs beside the weights)",
        )


def _reraise(error: Exception, what: str) -> NoReturn:
    """A loader's exception as one line of ModelError; its traceback stays in __cause__."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in reason:
        reason = "it needs code of its own, which is not run; give a model that transformers knows"
    if len(reason) > 300:
        reason = reason[:300] + "..."
    raise ModelError(f"{what}: {reason}") from error


def _check_device(device: str | torch.device | None) -> None:
    if device is None:
        return
    try:
        torch.ones(1, device=device).item()  # the device "meta" holds no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the device {str(device)!r} can't be used here: {reason}; give 'cpu', or a device "
            "that torch finds"
        ) from error


def _check_hub(name: str) -> None:
    """Fetch a hub model's config alone: the cheapest way to learn whether it can be had."""
    from huggingface_hub import errors, hf_hub_download

    try:
        hf_hub_download(name, "config.json")
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub model {name!r} is gated: accept its terms on the hub, then log in with: "
            "hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"no model {name!r}: no such directory here and no such model on the hub (or it is "
            f"private); {_known(name)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"no model {name!r}: no such directory here, not in the hub cache, and the hub can't "
            f"be reached (offline); {_known(name)}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(
            f"the hub model {name!r} has no config.json, so it is not in transformers' format"
        ) from error
    except (errors.HFValidationError, OSError, ValueError) as error:
        _reraise(error, f"can't fetch the hub model {name!r}")


def _known(name: str) -> str:
    """How to mend an unknown name: the closest embedded model, and what else a name may be."""
    close = difflib.get_close_matches(name.lower(), MODELS, n=1)
    meant = f"did you mean {close[0]!r}?" if close else f"embedded models: {', '.join(MODELS)}."
    return f"{meant} A name is one of those, a directory in transformers' format, or a hub id"
