"""``is`` in the user's code, where it is asked of a symbolic value: ``x.dtype is torch.bool``.

Python compares identities without asking the object. A symbol is none of the values that it may
stand for, and the other branch would be taken without a word.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kfac_fx.capture.is_questions import Operand, codes_within, questions
from kfac_fx.capture.proxies import Watched, WatchedMember

if TYPE_CHECKING:
    from kfac_fx.capture.recording import Recording

Value = Any
"""What the user's code compares."""


def _place(code: types.CodeType) -> tuple[str, int]:
    return code.co_filename, code.co_firstlineno


@contextmanager
def identities_heard(functions: Iterable[types.FunctionType], tracer: Recording) -> Iterator[None]:
    """Refuse within the context what ``is`` would get wrong of symbolic values.

    Few models ask, and calls are listened to for these alone. A debugger of the user's stays.

    Args:
        functions: those that may run.
        tracer: is told of refusals.
    """
    codes = {code for function in functions for code in codes_within(function.__code__)}
    # fx runs a copy of a forward with `**kwargs`, which stands at the same line.
    asking = {_place(code) for code in codes if questions(code)}
    if not asking or sys.gettrace() is not None:
        yield
        return

    def called(frame: types.FrameType, _: str, __: object) -> Value:
        if _place(frame.f_code) not in asking:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return heard

    def heard(frame: types.FrameType, event: str, _: object) -> Value:
        sides = questions(frame.f_code).get(frame.f_lasti) if event == "opcode" else None
        if sides is not None:
            _answer(sides, frame.f_locals, tracer)
        return heard

    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(None)


def _answer(sides: tuple[Operand, Operand], variables: dict[str, Value], tracer: Recording) -> None:
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


def _symbol(side: Operand, variables: dict[str, Value]) -> tuple[Value, str] | None:
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
