"""Which module runs at the moment: the stack of forwards that one thread is in."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

from tempering.attention.examining.masking import Arguments


class ModuleStack:
    """The modules of a model whose forwards have begun and not ended, outermost first.

    names: of all modules, by id. reached: the names of those that ran. arguments: what each of
    those that run was called with.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.arguments: list[Arguments] = []
        self.reached: set[str] = set()
        self.thread = threading.get_ident()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Keep the stack while the model runs inside, in this thread."""
        handles = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def name_of(self, module: nn.Module) -> str | None:
        """Its name in the model; None for a module that is none of the model's."""
        return self.names.get(id(module))

    def caller(self) -> nn.Module:
        """The module whose code calls a softmax: the innermost that is no `nn.Softmax`."""
        modules = (m for m in reversed(self.running) if not isinstance(m, nn.Softmax))
        return next(modules, self.running[-1])

    def arguments_of(self, module: nn.Module) -> Arguments:
        """What the innermost forward of a module that runs was called with."""
        for running, arguments in zip(
            reversed(self.running), reversed(self.arguments), strict=True
        ):
            if running is module:
                return arguments
        return (), {}

    def is_inside(self, module: Any) -> bool:
        """Whether the forward of a module is among those that run."""
        return any(item is module for item in self.running)

    # Another thread may run the model meanwhile.
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self.thread:
            self.running.append(module)
            self.arguments.append((args, kwargs))
            self.reached.add(self.names.get(id(module), ""))

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        if self.running and self.running[-1] is module:
            self.running.pop()
            self.arguments.pop()
