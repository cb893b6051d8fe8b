"""The inputs of a model, kept while something else runs it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from tempering.attention.examining.subject import check_subject, unwrapped


@contextlib.contextmanager
def recorded_call(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The arguments of a model's last forward call inside the block, by name: a `sample` of them.

    A pipeline knows what its denoiser takes, so one step of it gives the sample that `tempered`
    and `layout` need:

        with recorded_call(pipe.unet) as sample:
            pipe("a photo", num_inference_steps=1, output_type="latent")
        with tempered(pipe.unet, profile, sample=sample):
            pipe("a photo")

    Arguments that were left out, or given as None, are left out; the dict is empty until the model
    has run. It holds the tensors themselves, no copies.
    """
    model = unwrapped(model)
    check_subject(model)
    sample: dict[str, Any] = {}
    signature = inspect.signature(type(model).forward)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        bound.pop(next(iter(signature.parameters)))
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound |= bound.pop(name, {})
        sample.clear()
        sample.update((name, value) for name, value in bound.items() if value is not None)

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield sample
    finally:
        handle.remove()
