"""Functions that a program calls by name, so that it reads like formulas; their text goes along."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import fx

F = TypeVar("F", bound=Callable[..., Any])


def leaf(function: F) -> F:
    """The function, which stays one call where it is given values of a program."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)
        if given is None:
            return function(*args, **kwargs)
        return given.tracer.create_proxy("call_function", function, args, kwargs)

    return call  # type: ignore[return-value]


def own_functions(*graphs: fx.Graph) -> list[Callable[..., Any]]:
    """Functions of this library that the graphs call, each after those that it needs itself."""
    found: dict[Callable[..., Any], None] = {}
    for node in (node for graph in graphs for node in graph.nodes):
        if node.op == "call_function" and _is_own(node.target):
            _visit(node.target, found)
    return list(found)


def texts(functions: Iterable[Callable[..., Any]]) -> str:
    """Their definitions, without what is not needed to run them."""
    return "\n\n".join(inspect.getsource(function) for function in functions)


def _is_own(target: Any) -> bool:
    return inspect.isfunction(target) and target.__module__.startswith("kfac_fx.linalg")


def _visit(
    function: Any, found: dict[Callable[..., Any], None], within: tuple[Any, ...] = ()
) -> None:
    for name in function.__code__.co_names:
        needed = function.__globals__.get(name)
        # Names of attributes are among these: torch.cholesky_inverse in a function of that name.
        if _is_own(needed) and needed not in (*found, *within, function):
            _visit(needed, found, (*within, function))
    found[function] = None
