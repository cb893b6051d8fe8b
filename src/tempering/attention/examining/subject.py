"""What is examined: the model that was given, or the sentence that refuses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tempering.attention.denoisers import denoisers_of, of_diffusers
from tempering.errors import ArchitectureError, InputError


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile(model)` or a PeftModel, which shares its modules."""
    return without_peft(getattr(model, "_orig_mod", model))


def without_peft(model: Any) -> Any:
    """The model inside a PeftModel: its modules, adapters included, by their own names.

    Not where peft puts a prompt before the tokens, which the model inside would not see.
    """
    configs = getattr(model, "peft_config", None)
    base = getattr(model, "get_base_model", None)
    if not isinstance(configs, dict) or not callable(base):
        return model
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        return model
    return unwrapped(base())


def adapters_of(model: Any) -> str:
    """The adapters that peft put into a model's layers, in words; "" where there are none."""
    active = {
        str(name)
        for module in model.modules()
        if hasattr(module, "base_layer")
        for name in getattr(module, "active_adapters", ())
    }
    if not active:
        return ""
    return f" with the adapter{'s' if len(active) > 1 else ''} {', '.join(sorted(active))}"


def check_subject(model: Any) -> None:
    """ArchitectureError that says what to give, for no model of transformers or diffusers."""
    if not isinstance(model, nn.Module):
        raise ArchitectureError(_no_module(model))
    if _is_known(model):
        return
    name, library = type(model).__name__, type(model).__module__.split(".")[0]
    if library == "diffusers":  # whose parts may hold models of it
        raise ArchitectureError(_a_part(name, library))
    if inner := next(_inside(model), None):
        path, found = inner
        raise ArchitectureError(
            f"{name} is a wrapper around {type(found).__name__}; give that one, "
            f"model.get_submodule('{path}'): its temperatures act inside the wrapper as well"
        )
    if library == "transformers":
        raise ArchitectureError(_a_part(name, library))
    config = getattr(model, "config", None)
    what = "has no configuration" if config is None else f"is configured by {type(config).__name__}"
    raise ArchitectureError(
        f"{name} {what}, so it is no transformers model, and none of diffusers; the attention of "
        "others (timm, modules of your own) can't be controlled exactly"
    )


def check_sample(sample: Any) -> None:
    """InputError unless a sample can be the keyword arguments of a forward call."""
    if not isinstance(sample, dict) and not hasattr(sample, "keys"):
        given = type(sample).__name__
    elif not all(isinstance(name, str) for name in sample):
        given = "a dict with keys that are no names"
    elif not any(isinstance(item, Tensor) and item.ndim for item in sample.values()):
        given = f"a dict without a tensor ({', '.join(sample) or 'empty'})"
    else:
        return
    raise InputError(
        "sample holds the keyword arguments of a forward call, with a tensor of one row or more, "
        f"such as {{'pixel_values': images}}; this is {given}"
    )


def _a_part(name: str, library: str) -> str:
    return (
        f"{name} is a part of a {library} model; give the model, and name the part in the "
        "profile: Profile.by_module({...})"
    )


def check_of_transformers(model: Any, what: str) -> None:
    """ArchitectureError for a model of diffusers; `what` can be done with transformers models."""
    check_subject(model)
    if of_diffusers(model):
        raise ArchitectureError(
            f"{what} needs a transformers model; {type(model).__name__} is a model of diffusers, "
            "which layout, Profile and tempered take"
        )


def _is_known(model: nn.Module) -> bool:
    return of_diffusers(model) or _is_transformers(model)


def _is_transformers(model: nn.Module) -> bool:
    if any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        return True
    # An object of another class may answer as a transformers model does.
    config = getattr(model, "config", None)
    answers = callable(getattr(model, "can_generate", None))
    return answers and hasattr(config, "get_text_config")


def _inside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name and _is_known(module))


def _no_module(model: Any) -> str:
    load = "model, tokenizer = tempering.load_model('smollm2')"
    if isinstance(model, str | Path):
        return f"a model is given as an object, not by its name {str(model)!r}; load it: {load}"
    if isinstance(model, type):
        return (
            f"{model.__name__} is a class; give a model of it: {model.__name__}.from_pretrained()"
        )
    if isinstance(model, tuple | list) and any(isinstance(item, nn.Module) for item in model):
        return f"this is a {type(model).__name__} with a model in it; give the model alone: {load}"
    if denoisers := denoisers_of(model):
        named = " or ".join(f"pipe.{name}" for name in denoisers)
        return f"{type(model).__name__} is a pipeline and no model; give the model in it: {named}"
    held = [
        (name, item)
        for name, item in getattr(model, "__dict__", {}).items()
        if isinstance(item, nn.Module) and _is_known(item)
    ]
    if held:
        found = ", ".join(f".{name} ({type(item).__name__})" for name, item in held)
        return f"{type(model).__name__} holds a model and is none; give what it holds: {found}"
    what = "None" if model is None else f"of the type {type(model).__name__}"
    return f"a transformers model is needed and this is {what}; load one: {load}"
