"""Tiny random models of every architecture, with weights that make attention matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tempering.survey.configs import small_config
from tempering.survey.families import CAUSAL, Task, family_of

# Parts of state space and linear attention layers whose scale must stay as it was made.
_DELICATE = ("A_log", "dt_", "time_", "conv", "decay", ".D")
_LARGEST = 100_000_000


def class_of(task: Task) -> Any:
    """The class of a task."""
    import transformers

    return getattr(transformers, task.model_class)


def small_model(task: Task, implementation: str, rung: str = "sizes") -> nn.Module:
    """A tiny random model in eval mode; the same for every call with these arguments."""
    model_class = class_of(task)
    decoder = family_of(task, model_class) == CAUSAL
    config = _config_for(model_class, small_config(task.model_type, decoder, rung))
    text = config.get_text_config()
    if not task.whole and getattr(text, "pad_token_id", 0) is None:
        text.pad_token_id = 0  # classifiers look for the end of each row
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"its small configuration still has {size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation=implementation)
    strengthen(model)
    return model.eval()


def _config_for(model_class: Any, config: Any) -> Any:
    """The configuration, or that part of it which the class is made from (text, decoder)."""
    wanted = model_class.config_class
    if isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return next((part for part in parts if isinstance(part, wanted)), config)


@torch.no_grad()
def strengthen(model: nn.Module, gain: float = 1.2) -> None:
    """Random weights under which logits have a standard deviation of about `gain`^2.

    Fresh weights are so small that every softmax is nearly uniform, and a temperature does
    next to nothing; fresh biases, sinks and gains are constant, which hides them.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator).to(parameter)

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if any(part in name for part in _DELICATE):
            continue
        if parameter.ndim >= 2:
            scale = 1.0 if id(parameter) in tables else gain / parameter.shape[-1] ** 0.5
            parameter.copy_(normal(parameter) * scale)
        elif bool((parameter == 0).all()):
            parameter.copy_(normal(parameter) * 0.5)
        else:
            parameter.add_(normal(parameter) * 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith(".codebook.embed"):  # zeros until it is trained: one word for all sound
            buffer.copy_(normal(buffer))
