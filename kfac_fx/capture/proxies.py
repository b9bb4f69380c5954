"""Symbolic values that record in-place operators, and refuse what they cannot answer.

fx's own proxies answer Python's questions wrongly in silence: ``x += y`` makes a new value,
``isinstance(x, Tensor)`` is False, and ``x.tag = 1`` is forgotten. Each of these is recorded here
where that is exact, and is otherwise a refusal, which names the line.
"""

from __future__ import annotations

import dis
import functools
import linecache
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, fx
from torch.nn import parameter

from kfac_fx.capture.in_place import OPERATORS
from kfac_fx.capture.user_lines import users_code_asks

if TYPE_CHECKING:
    from kfac_fx.capture.recording import Recording

Value = Any
"""What the user's code hands to a symbolic value: a proxy, a tensor, a number."""

_OWN = frozenset({"tracer", "node", "root", "attr", "_node", "param", "name"})
"""Attributes that proxies themselves have."""

_MAY_BE_NONE = frozenset({"grad_fn", "_base", "grad", "_grad", "_backward_hooks"})
"""What a tensor may have or not; ``is None`` asks no method of a symbolic value for the answer."""

_DISPATCH = functools.__file__
"""Where ``singledispatch`` asks for the class of what user's code gives it."""

_PARAMETERS = parameter.__file__
"""Where ``isinstance(x, nn.Parameter)`` asks."""


class Watched:
    """What all symbolic values of this library have in common; comes before fx's class.

    Attributes:
        tracer: made the value, and is told of refusals.
    """

    if TYPE_CHECKING:
        tracer: Recording
        node: fx.Node

    def __getattr__(self, name: str) -> WatchedAttribute:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # a protocol that the value's class would have
        if name in _MAY_BE_NONE and users_code_asks(1):
            self._cannot(f"the attribute {name}, which may be None,")
        node = _node(self)
        if node is not None and self.tracer.known(node) is Tensor and not hasattr(Tensor, name):
            self.tracer.missed.add(name)  # a tensor of another call may have it
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return WatchedAttribute(self, name)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Value) -> None:
        if name not in _OWN:
            self.tracer.refuse(f"the attribute {name!r} of a tensor is set")
        object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # torch's C++ code asks as well, from within the user's line, and must not take the value
        # for a tensor: only a line of Python that reads the attribute gets the answer.
        frame = sys._getframe(1)
        if frame.f_code.co_filename == _PARAMETERS:
            self.tracer.missed.add("_is_param")  # an input of another call may be one
        asked = frame.f_code.co_filename == _DISPATCH or users_code_asks(1)
        operation = dis.opname[frame.f_code.co_code[frame.f_lasti]] if asked else ""
        if operation == "MATCH_CLASS":
            self._cannot("the class (match)")
        if operation.startswith("LOAD_ATTR"):
            return self.stands_for()
        return type(self)

    def stands_for(self) -> type:
        """Return the class that the value stands for; the graph checks it where it is assumed."""
        if isinstance(self, WatchedMember):
            return type(self.param)
        node = _node(self)
        kind = None if node is None else self.tracer.kind(node)
        return self._cannot("the class") if kind is None else kind

    def __hash__(self) -> int:
        # A dictionary of sizes would say that this one is not among its keys.
        if users_code_asks(1):
            self._cannot("the hash (a key of a dictionary or set)")
        return object.__hash__(self)

    def __setitem__(self, index: Value, value: Value) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def _cannot(self, what: str) -> NoReturn:
        self.tracer.refuse(f"{what} of a symbolic value is asked for")

    def __len__(self) -> int:
        self._cannot("len()")

    def __float__(self) -> float:
        self._cannot("float()")

    def __int__(self) -> int:
        self._cannot("int()")

    def __complex__(self) -> complex:
        self._cannot("complex()")

    def __repr__(self) -> str:
        return self._text()

    def __format__(self, spec: str) -> str:
        return self._text()

    def _text(self) -> str:
        """Return a text for messages; what else is done with one cannot be followed."""
        if not _in_message():
            self._cannot("the text")
        return f"<{object.__getattribute__(self, 'node')}>"

    def __array__(self, *args: Value, **kwargs: Value) -> NoReturn:
        self._cannot("the NumPy array")

    def __copy__(self) -> NoReturn:
        self._cannot("a copy (copy.copy)")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._cannot("a copy (copy.deepcopy)")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._cannot("a pickle")

    def __contains__(self, item: Value) -> bool:
        self._cannot("`in`")


_MESSAGES = ("assert", "raise ", "warn", "log", "print", "Error(")


def _in_message() -> bool:
    """Tell whether the user's line writes a message for people: an assertion's, or a warning."""
    frame = sys._getframe(3)
    number = frame.f_lineno
    lines = [linecache.getline(frame.f_code.co_filename, n) for n in range(number - 2, number + 1)]
    return any(word in line for word in _MESSAGES for line in lines)


def _update(target: Callable[[Value, Value], Value]) -> Callable[[Watched, Value], fx.Proxy]:
    """Return the method that records an operator in place."""

    def update(self: Watched, other: Value) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return update


for _target in OPERATORS:
    setattr(Watched, f"__{_target.__name__}__", _update(_target))


class WatchedProxy(Watched, fx.Proxy):  # type: ignore[misc]
    """A symbolic value."""


class WatchedAttribute(Watched, fx.proxy.Attribute):  # type: ignore[misc]
    """An attribute of a symbolic value, perhaps a method that is about to be called."""


class WatchedMember(Watched, fx.proxy.ParameterProxy):  # type: ignore[misc]
    """A parameter or buffer; its shape is known, so Python code may branch on it.

    Args:
        tracer: makes nodes.
        node: reads the tensor.
        tensor: the model's own.
    """

    def __init__(self, tracer: fx.Tracer, node: fx.Node, tensor: Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param = tensor  # type: ignore[assignment]
        self.name = str(node.target)

    def __getattr__(self, name: str) -> Value:
        # What a user has attached to the tensor; ``model_state`` looks whether it is still there.
        param = self.__dict__.get("param")
        if param is not None and name in param.__dict__:
            return param.__dict__[name]
        return super().__getattr__(name)

    __repr__ = Watched.__repr__


def _node(value: Watched) -> fx.Node | None:
    """Return the node of a symbolic value; None for an attribute that is not yet one."""
    held = object.__getattribute__(value, "__dict__")
    node: fx.Node | None = held.get("node", held.get("_node"))
    return node
