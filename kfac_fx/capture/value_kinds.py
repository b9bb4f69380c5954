"""The classes of symbolic values, where a graph makes them certain.

Python code asks ``isinstance(x, Tensor)``, and a tracer must answer as the value would. No values
are there, so the class is read from the call that makes it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from kfac_fx.capture.dialect import Argument, Target
from kfac_fx.capture.in_place import OPERATORS
from kfac_fx.errors import CaptureError

Kind = type | None
"""The class of a value; None where it is not certain."""

_COMPARISONS = frozenset(
    {operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne}
)
_BINARY = (operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv)
_ARITHMETIC = (
    _COMPARISONS
    | OPERATORS
    | {*_BINARY, operator.mod, operator.pow, operator.matmul, operator.neg, operator.pos}
    | {operator.abs, operator.invert, operator.and_, operator.or_, operator.xor}
)
_DIVISIONS = frozenset({operator.truediv, operator.itruediv})
_SEVERAL = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)
"""Layers of torch.nn that return no single tensor."""

_ATTRIBUTES: dict[str, type] = {
    "shape": torch.Size,
    "ndim": int,
    "dtype": torch.dtype,
    "device": torch.device,
    "requires_grad": bool,
    "is_cuda": bool,
    "is_nested": bool,
    "is_sparse": bool,
    "layout": torch.layout,
    **dict.fromkeys(("T", "mT", "H", "mH", "data", "real", "imag"), Tensor),
}
_COUNTS = frozenset({"dim", "numel", "ndimension", "nelement", "element_size"})
_CASTS = frozenset(
    {"float", "double", "half", "bfloat16", "int", "long", "bool", "to", "type", "type_as", "cuda"}
    | {"cpu", "view", "new_tensor", "masked_fill", "clone", "contiguous", "__getitem__"}
)


def kind_of_call(
    node: fx.Node, kind: Callable[[Argument], Kind], modules: Mapping[str, nn.Module]
) -> Kind:
    """Return the class of what a node of a traced graph returns.

    Args:
        node: any node but an input.
        kind: gives the class of an argument.
        modules: the model's submodules by path.
    """
    if node.op == "get_attr":
        return Tensor
    if node.op == "call_module":
        module = modules[str(node.target)]
        several = isinstance(module, _SEVERAL) or getattr(module, "return_indices", False)
        return None if several else Tensor
    if node.op == "call_method":
        return _of_method(str(node.target), node, kind)
    return _of_function(node, kind) if node.op == "call_function" else None


def _of_method(name: str, node: fx.Node, kind: Callable[[Argument], Kind]) -> Kind:
    """Return the class of what a method of a tensor returns."""
    if not node.args or kind(node.args[0]) is not Tensor:
        return None
    if name == "size":
        return int if len(node.args) + len(node.kwargs) > 1 else torch.Size
    if name in _COUNTS:
        return int
    if name in _CASTS:
        return Tensor
    return _of_operator(name)


def _of_function(node: fx.Node, kind: Callable[[Argument], Kind]) -> Kind:
    """Return the class of what a function returns."""
    target: Target = node.target
    if target is getattr:
        return _ATTRIBUTES.get(str(node.args[1])) if kind(node.args[0]) is Tensor else None
    if target is operator.getitem:
        return _of_item(kind(node.args[0]), kind(node.args[1]))
    if target in _ARITHMETIC:
        return _of_arithmetic(target, [kind(argument) for argument in node.args])
    name = getattr(target, "__name__", "")
    found = _of_operator(name) if getattr(torch, name, None) is target else None
    composed = getattr(F, name, None) is target
    several = "with_indices" in name or "multi_head" in name
    return Tensor if found is None and composed and not several else found


def _of_item(owner: Kind, index: Kind) -> Kind:
    """Return the class of an entry."""
    if owner is torch.Size:
        return {int: int, slice: torch.Size}.get(index)  # type: ignore[arg-type]
    return Tensor if owner is Tensor else None


def _of_arithmetic(target: Target, operands: list[Kind]) -> Kind:
    """Return the class of what an operator of Python returns."""
    if Tensor in operands:
        return Tensor
    if None in operands or not set(operands) <= {int, float, bool}:
        return None
    if target in _COMPARISONS:
        return bool
    return float if float in operands or target in _DIVISIONS else int


def _of_operator(name: str) -> Kind:
    """Return Tensor where every overload of an operator of torch returns one tensor."""
    packet = getattr(torch.ops.aten, name, None) if name else None
    if packet is None:
        return None
    found = [getattr(packet, overload)._schema for overload in packet.overloads()]
    # Some operators have overloads for numbers too, which TorchScript needs.
    schemas = [s for s in found if s.arguments and "Tensor" in str(s.arguments[0].type)]
    one = bool(schemas) and all(
        len(s.returns) == 1 and str(s.returns[0].type) == "Tensor" for s in schemas
    )
    return Tensor if one else None


class ExpectKind:
    """Refuse an input of another class than the capture was told; graphs have it as their target.

    Args:
        kind: the class of the input when the model was captured.
    """

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.__name__ = f"expect_{kind.__name__}"
        self.__qualname__ = self.__name__
        self.__module__ = __name__

    def __call__(self, value: Argument, name: str) -> None:
        """Compare the class of one input.

        Args:
            value: the input.
            name: its name, for the message.

        Raises:
            CaptureError: names the input and both classes.
        """
        if not isinstance(value, self.kind):
            raise CaptureError(
                f"input {name} is of class {type(value).__name__}, but the model asked for its "
                f"class and was captured with {self.kind.__name__}: transform it with example "
                "inputs of this class"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpectKind) and other.kind is self.kind

    def __hash__(self) -> int:
        return hash(self.kind)


def expect_value(value: Argument, fixed: Argument, name: str) -> None:
    """Refuse an input that is not what the capture was specialised to; graphs call this.

    Args:
        value: the input.
        fixed: None, a flag or a text.
        name: the name of the input, for the message.

    Raises:
        CaptureError: names the input and both values.
    """
    if isinstance(value, torch.Tensor) or value != fixed:
        shown = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
        raise CaptureError(
            f"input {name} is {shown}, but the model was captured with {fixed!r}: transform it "
            "with example inputs that have this one"
        )
