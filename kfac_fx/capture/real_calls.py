"""See what the user's code does with real tensors while symbolic values are traced.

fx sees calls on its proxies alone. ``torch.randn(3)``, ``parameters_to_vector(self.parameters())``
and ``p.mul_(2)`` in a loop over parameters run at once, and the graph gets their results as
constants that never change again. Here they become nodes, or a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from kfac_fx.capture.user_lines import users_code_asks
from kfac_fx.torch_internals.modes import switches_gradients
from kfac_fx.torch_internals.pytree import tree_leaves

if TYPE_CHECKING:
    from kfac_fx.capture.recording import Recording

Value = Any
"""An argument or result of the user's: a tensor, a proxy, a number, or any nesting of those."""

Function = Any
"""A torch function: of Python or C++, a method, or the getter of a property."""

FACTS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size"}
    | {"get_device", "type", "is_floating_point", "is_complex", "is_contiguous", "is_signed"}
    | {"is_shared", "is_pinned", "is_inference", "is_same_size", "__len__", "__hash__", "data_ptr"}
)
"""Methods that read a fact of a tensor and none of its values."""

_VALUES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
"""Properties that are tensors."""


class RealCalls(TorchFunctionMode):
    """Let calls on real tensors be nodes, where their results may change from run to run.

    Args:
        tracer: makes nodes, and is told of refusals.
    """

    def __init__(self, tracer: Recording) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[Value, ...] = (),
        kwargs: Mapping[str, Value] | None = None,
    ) -> Value:
        """Take one call; torch calls this for every torch function of the user's code."""
        kwargs = dict(kwargs or {})
        if switches_gradients(func):
            self._tracer.regions.gradients(args[0])
            return func(*args, **kwargs)
        leaves = [leaf for value in (args, tuple(kwargs.values())) for leaf in tree_leaves(value)]
        if any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args, kwargs)
        if name == "__set__":
            if any(self._tracer.is_member(t) or t.requires_grad for t in tensors):
                self._tracer.refuse(f"{func.__self__.__name__} of a tensor of the model is set")
            return func(*args, **kwargs)
        if name in FACTS:
            return func(*args, **kwargs)
        if any(map(self._tracer.is_member, tensors)):
            return self._on_members(func, args, kwargs)
        if any(t.requires_grad for t in tensors):
            self._tracer.refuse(
                "a tensor that requires gradients is used, which no module holds as a parameter"
            )
        for tensor in tensors:
            self._tracer.reads(tensor)
        return self._drawn(func, args, kwargs)

    def _property(self, func: Function, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """Read a property: a fact at once, a tensor as a node."""
        name = func.__self__.__name__
        tensor = args[0]
        # Taken out of a container; one that is read from its module is symbolic already.
        if name == "requires_grad" and self._tracer.is_member(tensor) and users_code_asks(2):
            self._tracer.refuse("requires_grad of a parameter is read")
        if not self._tracer.is_member(tensor) or name not in (*_VALUES, "grad"):
            return func(*args, **kwargs)
        if name == "grad":
            self._tracer.refuse("the gradient of a parameter is read")
        return getattr(self._tracer.member(tensor), name)

    def _on_members(
        self, func: Function, args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Value:
        """Make a node of a call on parameters or buffers that the code took from a container."""
        return self._tracer.call(func, args, kwargs)  # its arguments become nodes there

    def _drawn(self, func: Function, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """Run a call on constants; make a node of it if it draws random numbers."""
        if isinstance(kwargs.get("generator"), torch.Generator):
            self._tracer.refuse("random numbers are drawn from a generator of the model's own")
        generator = torch.default_generator
        before = generator.get_state()
        result = func(*args, **kwargs)
        if torch.equal(generator.get_state(), before):
            return result
        generator.set_state(before)
        given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if any(id(leaf) in given for leaf in tree_leaves(result)):
            self._tracer.refuse("random numbers are drawn into a tensor in place")
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._tracer.refuse("the state of the random generator is changed")
        return self._tracer.call(func, args, kwargs)
