"""Types and shapes of signatures, checked at every call while tests run.

jaxtyping's own import hook wraps every function so that sizes of one name are equal, which costs
0.1 ms a call, and wraps functions inside of functions at every call of the outer one, for 1 ms.
Half of the suite's time went there. Here only functions with a shape in their signature (one in
ten) are wrapped so; the others get beartype's wrapper, which makes the same check of types in a
microsecond, and functions inside of functions, none of which has a shape, are left to mypy.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args, get_type_hints

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

_NAME = "__checked__"  # of the decorator, in every module


def install() -> None:
    """Check all modules of tempering that are imported from now on."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != "tempering":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Never from a file of bytecode, which holds no checks.
        path = self.get_filename(fullname)
        tree = _Decorator().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__[_NAME] = checked
        super().exec_module(module)


class _Decorator(ast.NodeTransformer):
    """Decorates every function, innermost, and every class, outermost."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(_named(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, _named(node))
        return node


def _named(node: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Name(_NAME, ast.Load()), node)


def checked(subject: Any) -> Any:
    """A function that checks its arguments and its result; a dataclass that checks its fields."""
    if not isinstance(subject, type):
        return _checked_function(subject)
    if dataclasses.is_dataclass(subject) and "__init__" in vars(subject):
        subject.__init__ = _checked_function(subject.__init__)
    return subject


def _checked_function(function: Any) -> Any:
    written = function.__annotations__
    hints = {name: _resolved(function, hint) for name, hint in written.items()}
    if any(map(_has_shape, hints.values())):
        return jaxtyped(function, typechecker=beartype)
    function.__annotations__ = hints
    wrapper = beartype(function)
    function.__annotations__ = wrapper.__annotations__ = written
    return wrapper


def _resolved(function: Any, hint: Any) -> Any:
    """The type that an annotation names; anything where that is imported for type checkers only."""

    def holder() -> None: ...

    holder.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(holder, function.__globals__, include_extras=True)["hint"]
    except Exception:  # a name, or a type in brackets, that only type checkers know
        return Any


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_shape, get_args(hint)))
