"""Hear where code runs whose ``match`` statements no symbolic value can answer.

``case (b, d):`` and ``case Tensor():`` look at the class of a value in C. A symbolic value is of
neither, and the next pattern is taken without a word.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from kfac_fx.capture.code_names import CALLS, calls_left
from kfac_fx.capture.reached_code import reached

_PATTERNS = ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE")
_OPERATIONS = frozenset(dis.opmap[name] for name in _PATTERNS)


@contextmanager
def patterns_heard(functions: Iterable[types.FunctionType]) -> Iterator[dict[str, None]]:
    """Note within the context which functions with such patterns run.

    Few models have any, and calls are listened to for these alone.

    Args:
        functions: those that may run.

    Yields:
        the lines where the patterns stand.
    """
    found: dict[str, None] = {}
    lines = {code: line for one in functions for code, line in _places(one.__code__)}
    before = sys.getprofile()
    if not lines or before is not None:  # a profiler of the user's stays
        yield dict.fromkeys(lines.values()) if lines else found
        return

    def heard(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in lines:
            found[lines[frame.f_code]] = None

    sys.setprofile(heard)
    try:
        yield found
    finally:
        sys.setprofile(None)


def _classes(model: nn.Module) -> set[type]:
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return {kind for kind in kinds if kind.__module__.split(".")[0] not in ("torch", "builtins")}


def functions_of(model: nn.Module) -> set[types.FunctionType]:
    """Return the methods of a model, functions that its modules hold or these name, and helpers'.

    Args:
        model: the model; code of installed libraries counts too.
    """
    return {*_functions(model), *(function for function, _ in reached(model.modules()).calls)}


def _functions(model: nn.Module) -> Iterator[types.FunctionType]:
    held = [value for module in model.modules() for value in vars(module).values()]
    held += [value for kind in _classes(model) for value in vars(kind).values()]
    seen: set[int] = set()
    todo = [(value, CALLS) for value in held]
    while todo:
        value, depth = todo.pop()
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if not isinstance(function, types.FunctionType) or id(function) in seen or not depth:
            continue
        seen.add(id(function))
        if (function.__module__ or "").split(".")[0] in ("torch", *sys.stdlib_module_names):
            continue
        yield function
        depth = calls_left(function.__code__, depth)
        space = function.__globals__
        todo += [(space.get(name), depth - 1) for name in function.__code__.co_names]


def _places(code: types.CodeType) -> Iterator[tuple[types.CodeType, str]]:
    """Yield code that has patterns, or code within it that has, with the line of the first."""
    # Instructions stand at even places; to take them apart costs a thousand times more.
    if not _OPERATIONS.isdisjoint(code.co_code[::2]):
        for instruction in dis.get_instructions(code):
            if instruction.opname in _PATTERNS:
                starts = [n for at, n in dis.findlinestarts(code) if n and at <= instruction.offset]
                yield code, f"{code.co_filename}:{starts[-1] if starts else code.co_firstlineno}"
                break
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _places(constant)
