"""Give a GraphModule another ``forward``, and one that keeps input and output structures apart.

Why: a captured module may have two graphs (training and evaluation), while fx generates one
``forward`` per GraphModule; and the code of an exported graph reads ``self._in_spec`` and
``self._out_spec``, which may differ between the two. No public way: fx has no hook for attribute
names in the code that it generates, so they are renamed in the bytecode. ``forward`` is set on the
class since ``nn.Module.__call__`` and torch.compile look it up there. Seen on torch 2.11, 2.13
and 2.14.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import fx

Forward = Callable[..., Any]
"""A generated function: the module itself, then the model's inputs."""

SPECS = ("_in_spec", "_out_spec")
"""Attributes in which code that fx generates for exported graphs finds its pytree structures."""


def set_forward(module: fx.GraphModule, forward: Forward) -> None:
    """Replace the ``forward`` of one GraphModule.

    fx makes a class of its own for every GraphModule, so no other module is changed. The next
    ``recompile()`` replaces it again.
    """
    # Were it the shared class, every GraphModule of the process would change.
    assert type(module) is not fx.GraphModule
    type(module).forward = forward


def set_signature(module: fx.GraphModule, signature: inspect.Signature) -> None:
    """Let ``inspect.signature`` show another signature for the ``forward`` of one GraphModule."""
    assert type(module) is not fx.GraphModule
    type(module).forward.__signature__ = signature  # type: ignore[attr-defined]


def with_renamed_specs(forward: Forward, prefix: str) -> Forward:
    """Return a generated ``forward`` that reads ``prefix + "_in_spec"`` and ``_out_spec`` instead.

    Args:
        forward: what fx generated.
        prefix: is put in front of the names in SPECS.
    """
    assert isinstance(forward, types.FunctionType)
    # Names of attributes stand in co_names, in the order in which the instructions count them, so
    # other names in the same places are read by the same instructions.
    code = forward.__code__
    names = tuple(prefix + name if name in SPECS else name for name in code.co_names)
    return types.FunctionType(
        code.replace(co_names=names),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
    )
