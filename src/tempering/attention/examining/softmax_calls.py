"""The softmaxes that a model calls itself: as functions, and as what reaches PyTorch's operators.

A function can be tempered where it is called. An operator that no such function called is
attention out of reach: scripted or fused code, a function of PyTorch's that holds a softmax of
its own, exponentials over their sum.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tempering.attention.examining.interface_trial import Findings
from tempering.attention.examining.layer_reader import LayerReader
from tempering.attention.examining.softmax_trial import SoftmaxTrial
from tempering.attention.hooks import softmax_route

# Names of operators, or parts of names.
_SOFTMAXES = {"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"}
_FUSED = ("attention", "attn", "flash", "transformer_encoder_layer")
# Of scaled_dot_product_attention: those that it is given in a row, and may be given by name.
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_EXPONENTIALS = {"exp", "exp_", "exp2", "exp2_"}


class Functions(TorchFunctionMode):
    """Shows a reader the softmaxes and scaled dot products outside the interface, and tries them.

    findings: where the trials note what the reference made of the calls.
    """

    def __init__(self, reader: LayerReader, findings: Findings) -> None:
        super().__init__()
        self.reader, self.findings = reader, findings

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in softmax_route.SOFTMAXES and args:
            with self.reader.announce():
                dim = args[1] if len(args) > 1 else kwargs.get("dim")
                layer = self.reader.softmax(args[0], dim)
                if layer is not None:
                    SoftmaxTrial(self.findings).try_softmax(layer, args[0], dim)
                return func(*args, **kwargs)
        if func in softmax_route.PRODUCTS:
            with self.reader.announce():
                given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
                arguments = tuple(given.pop(name, None) for name in _ARGUMENTS[:4])
                layer = self.reader.product(arguments[0], arguments[1], arguments[3])
                if layer is not None:
                    SoftmaxTrial(self.findings).try_product(layer, arguments, given)
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Shows a reader the operators that attend; it skips those that a known function called.

    Flex attention is an operator of higher order. Where the attention interface calls it, it is
    known.
    """

    supports_higher_order_operators = True

    def __init__(self, reader: LayerReader) -> None:
        super().__init__()
        self.reader = reader

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not hasattr(func, "_schema"):
            if "attention" in getattr(func, "__name__", ""):
                self.reader.operator(func.__name__, None, None)
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        if name in _SOFTMAXES:
            self.reader.operator(name, args[0], args[1] if len(args) > 1 else kwargs.get("dim"))
        elif any(part in name for part in _FUSED):
            self.reader.operator(name, None, None)
        elif name in _EXPONENTIALS and isinstance(args[0], Tensor):
            self.reader.exponential(args[0])
        return func(*args, **kwargs)
