"""What is particular to models of diffusers: their inputs, and how their attention is told apart.

It is read off the model in hand, so diffusers is never imported here. A model of it differs from
one of transformers in this:

- its attention modules leave the work to a `processor`, which users exchange;
- most of its attention masks nothing, so masking tells nothing about it;
- frames of a video, places of it, or halves of the batch may stand where rows stand elsewhere;
- its layers are not one list, so depth is the order in which they run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Processors of linear attention, which has no softmax and so no temperature. All others that run
# without one are refused by name.
LINEAR = frozenset(
    {
        "PAGCFGSanaLinearAttnProcessor2_0",
        "PAGIdentitySanaLinearAttnProcessor2_0",
        "SanaLinearAttnProcessor2_0",
        "SanaLinearAttnProcessor3_0",
        "SanaMultiscaleAttnProcessor2_0",
    }
)
# Under these names, models of diffusers take what has a row for each row of the batch.
_INPUTS = ("hidden_states", "sample", "x")


def of_diffusers(model: Any) -> bool:
    """Whether a model is one of diffusers."""
    return any(
        kind.__name__ == "ModelMixin" and kind.__module__.startswith("diffusers.")
        for kind in type(model).__mro__
    )


def denoisers_of(pipeline: Any) -> list[str]:
    """The models of a diffusers pipeline that denoise, by name; none where it is no pipeline."""
    kinds = type(pipeline).__mro__
    if not any(kind.__module__.startswith("diffusers.") for kind in kinds):
        return []
    return [
        name
        for name, item in getattr(pipeline, "__dict__", {}).items()
        if of_diffusers(item) and not hasattr(item, "encode")
    ]


def processor_of(module: Any) -> Any:
    """What computes the attention of a module in its place; None where it does so itself."""
    processor = module.__dict__.get("processor", module._modules.get("processor"))
    return processor if callable(processor) else None


def is_linear(processor: Any) -> bool:
    """Whether a processor is known to attend without a softmax."""
    return type(processor).__name__ in LINEAR


def processor_marks(module: Any) -> tuple[Any, ...]:
    """What tells that a module's processor is another one, or works in another way."""
    processor = processor_of(module)
    if processor is None or isinstance(processor, nn.Module):
        return (type(processor),)
    settings = {
        name: value
        for name, value in vars(processor).items()
        if value is None or isinstance(value, bool | int | float | str)
    }
    return (type(processor), *sorted(settings.items(), key=lambda item: item[0]))


def rows_of(inputs: dict[str, Any]) -> int | None:
    """Rows of the batch that a model of diffusers is given; None where nothing tells."""
    for name in _INPUTS:
        item = inputs.get(name)
        if isinstance(item, list | tuple):
            return len(item)
        if isinstance(item, Tensor) and item.ndim:
            return item.shape[0]
    return None


def rows_are_told(inputs: dict[str, Any]) -> bool:
    """Whether the rows of the batch can be told from frames and places that stand among them.

    One row can't be told from one frame.
    """
    shapes = [item.shape for item in inputs.values() if isinstance(item, Tensor) and item.ndim > 2]
    video = [shape for shape in shapes if len(shape) == 5]
    return (rows_of(inputs) or 1) > 1 and not any(1 in shape[1:] for shape in video)


def needs_sample(model: Any) -> str:
    """What to say where inputs of a model of diffusers are needed and none were given."""
    kind = type(model).__name__
    return (
        f"{kind} is a model of diffusers, whose inputs can't be guessed; give a sample of them, "
        "sample={name: tensor, ...} with the arguments of its forward; a pipeline's own are kept "
        "by: with tempering.recorded_call(model) as sample: pipe(..., num_inference_steps=1)"
    )
