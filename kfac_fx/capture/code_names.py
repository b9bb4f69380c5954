"""The names that code looks up: its globals, its attributes, and the modules that it imports."""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.util import resolve_name
from typing import NamedTuple


class LookedUp(NamedTuple):
    """What code, and code within it, looks up.

    Attributes:
        names: the names among the globals.
        imports: of each import how many packages up it begins, and the name after that.
    """

    names: Sequence[str]
    imports: Sequence[tuple[int, str]]


@functools.lru_cache(maxsize=4096)
def looked_up(code: types.CodeType) -> LookedUp:
    """Return what code looks up; kept, as a model's code is read at each of its captures."""
    names: dict[str, None] = {}
    imports: list[tuple[int, str]] = []
    levels: list[object] = []  # an import begins with its level, two instructions before
    for instruction in dis.get_instructions(code):
        levels.append(instruction.argval)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names[instruction.argval] = None
        elif instruction.opname == "IMPORT_NAME":
            level = levels[-3] if len(levels) > 2 and isinstance(levels[-3], int) else 0
            imports.append((level, instruction.argval))
    if "globals" in names:
        names = dict.fromkeys(names_in(code))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            within = looked_up(constant)
            names |= dict.fromkeys(within.names)
            imports += within.imports
    return LookedUp(tuple(names), tuple(imports))


def globals_in(code: types.CodeType) -> Sequence[str]:
    """Return the names that code, and code within it, looks up among the globals.

    Attributes stand beside them in the code's names: a loop's ``i`` in a notebook would change
    what a model with ``self.i`` was captured for. Who reads ``globals()`` may read any of them.
    """
    return looked_up(code).names


def names_in(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code, and code within it, looks up, also by ``getattr``."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


CALLS = 6
CALLS_INSTALLED = 2
"""How many functions one calling the other are looked into; those of installed libraries name
hundreds of settings that no user changes."""


def calls_left(code: types.CodeType, depth: int) -> int:
    """Return how many of ``depth`` calls are still looked into, from this code on."""
    return min(depth, CALLS_INSTALLED) if is_installed(code) else depth


def is_installed(code: types.CodeType | type) -> bool:
    """Tell whether code, or a class, is that of an installed library."""
    if isinstance(code, type):
        module = sys.modules.get(code.__module__)
        place = getattr(module, "__file__", None) or ""
    else:
        place = code.co_filename
    return "site-packages" in place or "dist-packages" in place


def modules_in(
    function: types.FunctionType, *, of_torch: bool = False
) -> Iterator[types.ModuleType]:
    """Yield the user's modules that a function reads from, also what it imports as it runs.

    Attributes of a module are globals by another name, and may be set in the same way.

    Args:
        function: whose code is read.
        of_torch: yield torch's modules in their place.
    """
    space = function.__globals__
    found = [space.get(name) for name in globals_in(function.__code__)]
    found += [sys.modules.get(name) for name in _imported(function.__code__, space)]
    names = set(names_in(function.__code__))
    seen: set[int] = set()
    while found:
        module = found.pop()
        if not isinstance(module, types.ModuleType) or id(module) in seen:
            continue
        seen.add(id(module))
        torchs = module.__name__.partition(".")[0] == "torch"
        if torchs if of_torch else is_theirs(module.__name__):
            yield module
            found += [vars(module)[name] for name in vars(module).keys() & names]


def _imported(code: types.CodeType, space: dict[str, object]) -> Iterator[str]:
    """Yield the whole names of the modules that code, and code within it, imports."""
    for level, name in looked_up(code).imports:
        try:
            yield resolve_name("." * level + name, str(space.get("__package__")))
        except ImportError:
            continue


def is_theirs(module: str | None) -> bool:
    """Tell whether a module is the user's, or of a library that may have settings or state."""
    top = (module or "").partition(".")[0]
    return top not in sys.stdlib_module_names and top not in ("torch", "numpy", "kfac_fx")
