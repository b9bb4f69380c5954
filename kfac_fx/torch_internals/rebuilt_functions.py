"""Rebuild functions of torch's Python source with other names in their scope.

Why: ``F.multi_head_attention_forward`` and other composed functions ask whether somebody overrides
them, check shapes that were checked before, and call ``float`` and ``math.sqrt`` on sizes. Symbolic
values cannot answer that; the same body with other answers in its scope can be traced. No public
way: fx traces a function as it is, or keeps it whole. Copying torch's source would need a copy for
every version. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

Function = Callable[..., Any]
"""A function of torch, whose arguments its documentation says."""

_OVERRIDE_QUESTIONS = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)


def with_globals(function: Function, scope: dict[str, object]) -> Function:
    """Return a function with the body of another, whose global names are looked up in ``scope``.

    Args:
        function: written in Python; a function of C++ has no body to take.
        scope: replaces single global names, the others stay those of the function's module.
    """
    # The body is torch's own code object; only the dictionary in which it looks up names is ours.
    assert isinstance(function, types.FunctionType)
    rebuilt = types.FunctionType(
        function.__code__,
        {**function.__globals__, **scope},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    return rebuilt


def without_override_question(function: Function) -> Function:
    """Return a function of torch.nn.functional that does not ask whether somebody overrides it.

    Its body runs instead, so that a ``TorchFunctionMode`` sees the calls that it consists of.
    """
    return with_globals(function, dict.fromkeys(_OVERRIDE_QUESTIONS, lambda *_: False))


def traceable_attention() -> Function:
    """Return ``F.multi_head_attention_forward`` in a form that symbolic values can go through.

    Checks that need values answer as they would for inputs that are right; what divides by the
    square root of a size does so on symbolic sizes.
    """
    scope: dict[str, object] = {
        # fx's values are overrides themselves: asked, the function would become one node again.
        "has_torch_function": lambda tensors: False,
        # The call ran when it was captured, so its masks have passed these checks.
        "_check_key_padding_mask": lambda mask, length, cases: None,
        "_none_or_dtype": lambda mask: None if mask is None else mask.dtype,
        # A size that is a symbolic value is no number that float() and math.sqrt() take.
        "float": lambda value: value,
        "math": types.SimpleNamespace(sqrt=lambda value: value**0.5),
    }
    return with_globals(F.multi_head_attention_forward, scope)
