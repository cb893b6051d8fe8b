"""What a model is made of at this moment, cheap enough to ask at every use.

What is known of a model (its layout, the verdict of the self-check) was found by running it, and
holds while the code that ran is the same. One walk over the modules tells: which modules there
are, in which order and under which names; their classes, and the functions of these; a `forward`
of an instance's own; the functions that attention calls by name; every field of every
configuration; dtypes and devices. The values of the weights are the fingerprint's to compare.

Not seen: a function replaced inside another package (`torch.nn.functional`), and a change inside
a function that stays the same object.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from tempering.attention.denoisers import processor_marks
from tempering.attention.hooks.forward import own_forward

# Of a configuration, what says nothing about the model's code.
UNSTATED = frozenset(
    "_name_or_path _commit_hash transformers_version torch_dtype dtype architectures".split()
)
ObjectRef = Callable[[], Any]
_DTYPE_AND_DEVICE = operator.attrgetter("dtype", "device")


@dataclass(frozen=True, eq=False)
class Structure:
    """A model's modules, code and configurations at one moment.

    parts: the modules in order; patches: what instances have for a `forward` of their own. Both
        are compared as objects and held weakly; an object that is gone equals none.
    marks: what is compared as values: classes, names, which parameters are shared, dtypes, devices.
    kinds: the classes of the modules. stated: the fields of the configurations.
    """

    parts: tuple[ObjectRef, ...]
    marks: tuple[Any, ...]
    patches: tuple[ObjectRef, ...]
    kinds: tuple[type, ...]
    stated: tuple[str, ...]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Structure)
            and same(self.parts, other.parts)
            and same(self.patches, other.patches)
            and self.marks == other.marks
            and self.stated == other.stated
        )

    __hash__ = None  # type: ignore[assignment]


def same(ones: Sequence[ObjectRef], others: Sequence[ObjectRef]) -> bool:
    """Whether two lists refer to the same objects, all of which are still there."""
    return len(ones) == len(others) and all(map(_same, ones, others))


def _same(one: ObjectRef, other: ObjectRef) -> bool:
    # A weak reference without a callback is one object for as long as what it refers to lives.
    if one is other:
        return one() is not None
    return type(one) is _Held is type(other) and one() is other()


class _Held:
    """Refers to an object that allows no weak reference, by keeping it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> Any:
        return self.value


def object_ref(value: Any) -> ObjectRef:
    """A weak reference, where there can be one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return _Held(value)


def walk(model: nn.Module) -> tuple[Structure, list[Tensor]]:
    """The structure of a model, and its parameters in the order of `parameters()`.

    Written for speed: every use of a profile walks over hundreds of modules.
    """
    # The modules and parameters met so far, in order; and by id, the place of each.
    modules: list[nn.Module] = []
    module_places: dict[int, int] = {}
    parameters: list[Tensor] = []
    parameter_places: dict[int, int] = {}
    marks: list[Any] = []
    patches: list[Any] = []
    configs: dict[int, Any] = {}
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None:
            marks.append(None)
            continue
        key = id(module)
        if key in module_places:
            marks.append(module_places[key])  # shared: which one it is
            continue
        module_places[key] = len(modules)
        modules.append(module)
        marks.append(type(module))
        fields = module.__dict__
        if "forward" in fields and (forward := own_forward(module)) is not None:
            marks.append("a forward of its own")
            patches.append(forward)
        # Under the second name, diffusers keeps its configurations.
        config = fields.get("config", fields.get("_internal_dict"))
        if config is not None:
            configs[id(config)] = config
        if "processor" in fields:
            marks.append(processor_marks(module))
        own_parameters = fields["_parameters"]
        if own_parameters:
            marks += own_parameters
            for name, value in own_parameters.items():
                key = id(value)
                if value is None:
                    marks.append((name, None))
                elif key in parameter_places:
                    marks.append((name, parameter_places[key]))
                else:
                    parameter_places[key] = len(parameters)
                    parameters.append(value)
        children = fields["_modules"]
        if children:
            marks += children
            stack += reversed(children.values())
    marks.append(set(map(_DTYPE_AND_DEVICE, parameters)))
    structure = Structure(
        tuple(map(weakref.ref, modules)),
        tuple(marks),
        tuple(map(object_ref, patches)),
        tuple(dict.fromkeys(map(type, modules))),
        tuple(map(stated, configs.values())),
    )
    return structure, parameters


def stated(config: Any) -> str:
    """The fields of a configuration, those of the configurations inside it included."""
    fields = getattr(config, "__dict__", None)
    if fields is None:
        return repr(config)
    return repr(
        sorted(
            (name, stated(value) if hasattr(value, "to_dict") else value)
            for name, value in fields.items()
            if name not in UNSTATED
        )
        if all(isinstance(name, str) for name in fields)
        else fields
    )


def code(kinds: Iterable[type], attention: Sequence[nn.Module]) -> tuple[ObjectRef, ...]:
    """The functions that a model runs: the `forward` of every class, and all that attention runs.

    Attention runs the functions of its classes, what these call by name, and what the attention
    interface holds for the implementation.
    """
    found: list[Any] = [getattr(kind, "forward", None) for kind in kinds]
    for kind in dict.fromkeys(map(type, attention)):
        for function in _functions(kind):
            found += [function, *_called(function)]
    utils: Any = sys.modules.get("transformers.modeling_utils")
    if utils is not None:
        names = {_implementation(module.__dict__.get("config")) for module in attention}
        functions = utils.ALL_ATTENTION_FUNCTIONS
        found += [functions.get(name) for name in sorted(filter(None, names))]
    return tuple(object_ref(item) for item in found if item is not None)


def own_code(attention: Iterable[nn.Module]) -> tuple[ObjectRef, ...]:
    """The callables besides `forward` that instances of attention modules have of their own."""
    return tuple(
        object_ref(item)
        for module in attention
        for name, item in module.__dict__.items()
        if callable(item) and name != "forward" and not isinstance(item, Tensor | type)
    )


def _implementation(config: Any) -> str | None:
    name = getattr(config, "_attn_implementation", None)
    return name if isinstance(name, str) else None


def _functions(kind: type) -> list[FunctionType]:
    return [
        item
        for base in kind.__mro__
        if base is not nn.Module and base is not object
        for item in vars(base).values()
        if isinstance(item, FunctionType)
    ]


def _called(function: Any) -> list[Any]:
    """What a function names among the globals of its module."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        return []
    named = (function.__globals__.get(name) for name in function.__code__.co_names)
    return [item for item in named if callable(item) and not isinstance(item, type)]


def submodule(model: nn.Module, name: str) -> nn.Module:
    """`get_submodule` of a name that is known to be there, which is called for every layer."""
    found: Any = model
    for part in name.split(".") if name else ():
        found = found._modules[part]
    return found
