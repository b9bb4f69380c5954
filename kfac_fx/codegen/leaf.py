"""Functions that a program calls by name, so that it reads like formulas; their text goes along."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, ParamSpec, TypeAlias, TypeGuard, TypeVar

from torch import fx

Value: TypeAlias = Any
"""An fx.Proxy while a program is emitted, a tensor where the same code is called on values.

No type is both: a Proxy takes whatever attributes its value has.
"""

P = ParamSpec("P")
R = TypeVar("R")


def leaf(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function, which stays one call where it is given values of a program.

    Traced through, a Cholesky inverse would be a dozen operators in the text, and its cases (a GPU,
    a stack) would be decided when the program is emitted. As one call they are decided when it
    runs, and torch.compile still sees inside.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for given in (*args, *kwargs.values()):
            if isinstance(given, fx.Proxy):
                made: R = given.tracer.create_proxy("call_function", function, args, kwargs)  # type: ignore[assignment]
                return made
        return function(*args, **kwargs)

    return call


def own_functions(*graphs: fx.Graph) -> list[FunctionType]:
    """Return the functions of this library that graphs call, each after those that it needs."""
    found: dict[FunctionType, None] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        if node.op == "call_function" and _is_own(node.target):
            _visit(node.target, found, ())
    return list(found)


def texts(functions: Iterable[FunctionType]) -> str:
    """Return their definitions, one after another, without what is not needed to run them."""
    return "\n\n".join(inspect.getsource(function) for function in functions)


def _is_own(target: object) -> TypeGuard[FunctionType]:
    return inspect.isfunction(target) and target.__module__.startswith("kfac_fx.linalg")


def _visit(
    function: FunctionType, found: dict[FunctionType, None], within: tuple[FunctionType, ...]
) -> None:
    for name in function.__code__.co_names:
        needed = function.__globals__.get(name)
        # Names of attributes are among these: torch.cholesky_inverse in a function of that name.
        if _is_own(needed) and needed not in (*found, *within, function):
            _visit(needed, found, (*within, function))
    found[function] = None
