"""Where code compares identities with ``is``, other than with None."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from typing import NamedTuple

from kfac_fx.capture.code_names import globals_in

_IS = dis.opmap["IS_OP"]
_LOCAL = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")


class Operand(NamedTuple):
    """Say what stands on one side of an ``is``.

    Attributes:
        root: the variable of the function; "" for a constant or a global.
        attributes: those that follow it, first to last.
    """

    root: str
    attributes: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def questions(code: types.CodeType) -> dict[int, tuple[Operand, Operand]]:
    """Return the operands by the place in code where ``is`` compares with another thing than None.

    Args:
        code: without what is within it.
    """
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


def _operand(steps: list[dis.Instruction], at: int) -> tuple[Operand | None, int]:
    """Return the operand whose last instruction stands at a place, and where the next one ends."""
    names: list[str] = []
    while at >= 0 and steps[at].opname == "LOAD_ATTR":
        names.insert(0, str(steps[at].argval))
        at -= 1
    step = steps[at]
    if at < 0 or (step.opname == "LOAD_CONST" and step.argval is None):
        return None, at
    if step.opname.startswith(_LOCAL) and isinstance(step.argval, str):
        return Operand(step.argval, tuple(names)), at - 1
    if step.opname in ("LOAD_CONST", "LOAD_GLOBAL", "LOAD_NAME"):
        return Operand("", tuple(names)), at - 1
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
    return Operand(str(steps[at].argval), (f"a call or entry of {steps[at].argval}",)), at - 1


def codes_within(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield code, and code within it.

    Args:
        code: of any function.
    """
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_within(constant)


def asks_for_ties(code: types.CodeType) -> bool:
    """Tell whether code may ask which of a model's tensors are one.

    Args:
        code: of one of the model's functions.
    """
    return "id" in globals_in(code) or any(
        left.attributes and right.attributes and left.root and right.root
        for one in codes_within(code)
        for left, right in questions(one).values()
    )
