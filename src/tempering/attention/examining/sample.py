"""A short padded batch for any language model, and a forward pass that leaves it as it was."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tempering.attention.denoisers import needs_sample, of_diffusers
from tempering.attention.examining.media_sample import images_sample, media_sample
from tempering.attention.examining.stored import input_device, input_embeddings
from tempering.attention.modes import evaluation_mode
from tempering.errors import ArchitectureError, InputError
from tempering.inputs.answers import called

# Numbers of tokens that no model is known to have as its number of heads.
TOKENS, TARGET_TOKENS, PADDING = 11, 7, 2


def sample_inputs(model: Any, rows: int = 2) -> dict[str, Any]:
    """A padded batch whose rows are alike, so that one can be compared with another."""
    if of_diffusers(model):
        raise InputError(needs_sample(model))
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids":
        return media_sample(model, rows, run)
    text = config.get_text_config(decoder=True)
    embedding: Any = input_embeddings(model)
    embedded = getattr(getattr(embedding, "weight", None), "shape", (0,))[0]
    vocabulary = int(getattr(text, "vocab_size", 0) or embedded)
    if not vocabulary:
        raise ArchitectureError(
            f"{type(model).__name__} doesn't say how many tokens it knows; "
            "give a sample of its inputs: layout(model, sample={...})"
        )
    device = input_device(model)
    # Musicgen reads a row of ids for each of its codebooks.
    books = len(embedding) if isinstance(embedding, nn.ModuleList) else 1
    weights = next(item for item in model.parameters() if item.is_floating_point())
    pad = getattr(text, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int, mask: Tensor | None = None) -> Tensor:
        low = min(5, vocabulary - 1)
        row = torch.randint(low, min(vocabulary, 1000), (1, count), generator=generator)
        ids = row.expand(rows, -1).contiguous()
        if mask is not None:
            ids = ids.masked_fill(mask == 0, pad)
        return ids.repeat_interleave(books, dim=0).to(device)

    mask = torch.ones(rows, TOKENS, dtype=torch.long)
    if config.is_encoder_decoder:
        mask[:, -PADDING:] = 0
    else:
        # Eager attention of a float64 model gives NaN for a query that sees nothing but padding.
        first = 1 if weights.dtype == torch.float64 else 0
        mask[:, first : first + PADDING] = 0
    inputs = {"input_ids": tokens(TOKENS, mask), "attention_mask": mask.to(device)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(TARGET_TOKENS)
    elif "vision_config" in getattr(config, "sub_configs", {}) and not model.can_generate():
        # Two towers side by side (CLIP), where neither runs without the other.
        inputs["pixel_values"] = images_sample(
            model, rows, lambda _, small: run(model, inputs | small)
        )
    return inputs


def fails_on_sample(model: nn.Module, sample: dict[str, Any] | None, error: Exception) -> str:
    """The error that a model raised on the sample, and which arguments it takes."""
    tried = "a short sample of tokens" if sample is None else f"the sample ({', '.join(sample)})"
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = inspect.signature(model.forward).parameters.values()
    named = ", ".join(item.name for item in taken if item.kind in kinds)
    reason = " ".join(str(error).split()) or type(error).__name__
    reason += _place(model, error)
    return (
        f"{type(model).__name__} fails on {tried}: {reason}. Give what its forward needs to run, "
        f"of {named}: layout(model, sample={{name: tensor, ...}})"
    )


def _place(model: nn.Module, error: Exception) -> str:
    """The innermost part of the model that an error passed through, in words."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = model, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = module
        trace = trace.tb_next
    name = names[id(found)]
    return f" (in {name}, {type(found).__name__})" if name else ""


class _SeededDraws(TorchDispatchMode):
    """Seeds a forward that draws random numbers, at its first draw, and takes the draws back.

    PyTorch's generators belong to all threads. Few models draw in evaluation mode; for the others
    no generator is touched.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seeded = contextlib.ExitStack()
        self.draws = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.draws and _draws(func, args, kwargs):
            self.draws = True
            devices = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
            self.seeded.enter_context(torch.random.fork_rng(devices=sorted(devices)))
            torch.manual_seed(0)
        return func(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.seeded.close()


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws from PyTorch's own generators.

    Operators with a generator of their own (the temperatures of a trial) don't, nor do dropout and
    fused attention where they drop nothing out.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    names = [argument.name for argument in func._schema.arguments]
    values = dict(zip(names, args, strict=False)) | kwargs
    if values.get("generator") is not None:
        return False
    for name, default in (("dropout_p", 0.0), ("train", True), ("training", False)):
        if name in names:
            return bool(default if values.get(name) is None else values[name])
    return True


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, and every module's training flag as it was afterwards.

    Inference mode is left as well: in it, composite operators reach the dispatcher whole, and
    the reference would not see the softmax inside them.
    """
    with (
        evaluation_mode(model),
        torch.inference_mode(False),
        torch.no_grad(),
        _SeededDraws(model),
    ):
        yield


# One examination at a time: the stance of the compiler belongs to the process, and a model's mode
# to all threads that run it.
_ALONE = threading.RLock()


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled parts as they are written: compiled code shows no operators."""
    if any(
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    ):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def run(model: nn.Module, inputs: dict[str, Any], cache: bool = False) -> Any:
    """One forward pass, by default without a cache."""
    with _ALONE, _still(model), _uncompiled(model):
        return called(model, inputs, cache=cache)
