"""``is`` in the user's code, where it is asked of a symbolic value: ``x.dtype is torch.bool``.

Python compares identities without asking the object. A symbol is none of the values that it may
stand for, and the other branch would be taken without a word.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from kfac_fx.capture.code_names import globals_in
from kfac_fx.capture.proxies import Watched, WatchedMember

if TYPE_CHECKING:
    from kfac_fx.capture.recording import Recording

Value = Any
"""What the user's code compares."""

_IS = dis.opmap["IS_OP"]
_LOCAL = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")


class _Operand(NamedTuple):
    """One side of an ``is``.

    Attributes:
        root: the variable of the function; "" for a constant or a global.
        attributes: those that follow it, first to last.
    """

    root: str
    attributes: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _questions(code: types.CodeType) -> dict[int, tuple[_Operand, _Operand]]:
    """Return the places in code where ``is`` compares with another thing than None."""
    # Instructions stand at even places; to take them apart costs a thousand times more.
    if _IS not in code.co_code[::2]:
        return {}
    found = {}
    steps = list(dis.get_instructions(code))
    for at, step in enumerate(steps):
        if step.opcode != _IS:
            continue
        right, before = _operand(steps, at - 1)
        left, _ = _operand(steps, before) if right is not None else (None, before)
        if left is not None and right is not None and (left.root or right.root):
            found[step.offset] = left, right
    return found


def _operand(steps: list[dis.Instruction], at: int) -> tuple[_Operand | None, int]:
    """Return the operand whose last instruction stands at a place, and where the next one ends."""
    names: list[str] = []
    while at >= 0 and steps[at].opname == "LOAD_ATTR":
        names.insert(0, str(steps[at].argval))
        at -= 1
    step = steps[at]
    if at < 0 or (step.opname == "LOAD_CONST" and step.argval is None):
        return None, at
    if step.opname.startswith(_LOCAL) and isinstance(step.argval, str):
        return _Operand(step.argval, tuple(names)), at - 1
    if step.opname in ("LOAD_CONST", "LOAD_GLOBAL", "LOAD_NAME"):
        return _Operand("", tuple(names)), at - 1
    # A call or an entry: what it begins with says whether it is symbolic (`kwargs.get("flag")`).
    missing = 1
    while at >= 0 and not steps[at].is_jump_target:
        arg = steps[at].arg if steps[at].opcode >= dis.HAVE_ARGUMENT else None
        missing -= dis.stack_effect(steps[at].opcode, arg, jump=False)
        if missing <= 0:
            break
        at -= 1
    if missing > 0 or not steps[at].opname.startswith(_LOCAL):
        return None, at - 1
    return _Operand(str(steps[at].argval), (f"a call or entry of {steps[at].argval}",)), at - 1


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield code, and code within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _place(code: types.CodeType) -> tuple[str, int]:
    return code.co_filename, code.co_firstlineno


def asks_for_ties(code: types.CodeType) -> bool:
    """Tell whether code may ask which of a model's tensors are one.

    Args:
        code: of one of the model's functions.
    """
    return "id" in globals_in(code) or any(
        left.attributes and right.attributes and left.root and right.root
        for one in _codes(code)
        for left, right in _questions(one).values()
    )


@contextmanager
def identities_heard(functions: Iterable[types.FunctionType], tracer: Recording) -> Iterator[None]:
    """Refuse within the context what ``is`` would get wrong of symbolic values.

    Few models ask, and calls are listened to for these alone. A debugger of the user's stays.

    Args:
        functions: those that may run.
        tracer: is told of refusals.
    """
    codes = {code for function in functions for code in _codes(function.__code__)}
    # fx runs a copy of a forward with `**kwargs`, which stands at the same line.
    asking = {_place(code) for code in codes if _questions(code)}
    if not asking or sys.gettrace() is not None:
        yield
        return

    def called(frame: types.FrameType, _: str, __: object) -> Value:
        if _place(frame.f_code) not in asking:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return heard

    def heard(frame: types.FrameType, event: str, _: object) -> Value:
        sides = _questions(frame.f_code).get(frame.f_lasti) if event == "opcode" else None
        if sides is not None:
            _answer(sides, frame.f_locals, tracer)
        return heard

    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(None)


def _answer(
    sides: tuple[_Operand, _Operand], variables: dict[str, Value], tracer: Recording
) -> None:
    """Let the graph check what Python takes for granted, or refuse."""
    found = [_symbol(side, variables) for side in sides]
    if (found[0] is None) is (found[1] is None):
        return  # which of the inputs are one object is not asked
    symbol, attribute = found[0] or found[1] or (None, "")
    if attribute:
        tracer.refuse(f"{attribute} of a symbolic value is compared with `is`")
    if issubclass(type(symbol), WatchedMember):
        return
    held = object.__getattribute__(symbol, "__dict__")
    node = held.get("node", held.get("_node"))
    # A tensor is none of the flags and marks that code compares with; the graph checks that an
    # input is one.
    if node is None or tracer.kind(node) is not Tensor:
        tracer.refuse("a symbolic value is compared with `is`")


def _symbol(side: _Operand, variables: dict[str, Value]) -> tuple[Value, str] | None:
    """Return the symbolic value that a side begins with, and the attribute that is asked of it."""
    value = variables.get(side.root)
    names = list(side.attributes)
    while issubclass(type(value), nn.Module) and len(names) > 1:
        held = vars(value)
        name = names.pop(0)
        kinds = ("_modules", "_parameters", "_buffers")
        value = next((held[kind][name] for kind in kinds if name in held[kind]), None)
    name = names[0] if names else ""
    if issubclass(type(value), Watched):
        return value, name
    member = issubclass(type(value), Tensor) and bool(name) and name not in value.__dict__
    return (value, name) if member else None
