"""The functions of torch that pack sequences of several lengths and pad them again, as one call.

Their Python asks for devices and lengths, which no symbolic value knows. Kept whole they need not
be followed: what they do depends on their arguments alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn
from torch.nn.utils import rnn

Value = Any
"""An argument or result of a function of torch's."""

PACKING = (rnn.pack_padded_sequence, rnn.pack_sequence)
"""Functions that return a PackedSequence."""

_REMADE = frozenset({"_replace", "to", "cuda", "cpu", "pin_memory", "double", "float", "half"})
"""Methods of a PackedSequence that return another one."""

WHOLE: tuple[Callable[..., Value], ...] = (*PACKING, rnn.pad_packed_sequence)
"""What a trace keeps as one call."""


def gives_packed(node: Value, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a node's value is a PackedSequence that the graph has made.

    An input of the graph is none: the guard lets the model itself run where it is one.

    Args:
        node: an argument of a call.
        modules: the model's submodules by path.
    """
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method" and node.target in _REMADE:
        return gives_packed(node.args[0], modules)
    if node.op != "call_function":
        return False
    if node.target in PACKING:
        return True
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    # A recurrent layer returns its outputs as it was given its inputs.
    layer = node.args[0]
    assert isinstance(layer, fx.Node)
    if layer.op != "call_module" or not isinstance(modules.get(str(layer.target)), nn.RNNBase):
        return False
    given = [*layer.args, *layer.kwargs.values()]
    return gives_packed(layer.kwargs.get("input", given[0]), modules)
