"""What a capture fixed about its inputs, compared at every call."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kfac_fx.capture.servable import is_packed
from kfac_fx.torch_internals.modes import function_mode_of_the_user, function_modes
from kfac_fx.torch_internals.pytree import tree_flatten

Value = Any
"""An input of the user's model."""

Given = tuple[tuple[Value, ...], dict[str, Value]]
"""Positional and keyword arguments of a call."""


class InputForm(Protocol):
    """Tells whether a call fits a captured graph."""

    def fitting(self, given: Given, training: bool) -> Given | None:
        """Return the arguments as the graph takes them, None where it was not made for them."""

    def misfit(self, given: Given) -> str:
        """Say in words what does not fit."""


def fixed_arguments(signature: inspect.Signature, given: Mapping[str, Value]) -> dict[str, Value]:
    """Return the arguments that are traced at one value, since Python may branch on them.

    Args:
        signature: of the model's ``forward``.
        given: example inputs by the names of their arguments.
    """
    fixed: dict[str, Value] = {}
    for name, parameter in signature.parameters.items():
        value = given.get(name, parameter.default)
        simple = value is None or (isinstance(value, (bool, str)) and name not in given)
        simple |= isinstance(value, _SINGLES) and value is not inspect.Parameter.empty
        if simple and parameter.kind not in _VARIADIC:
            fixed[name] = value
    return fixed


class NamedInputs:
    """What symbolic tracing fixed: arguments that were left at their default, and which are there.

    Python branches on None, flags and names; all else it meets as a symbol.

    Args:
        signature: of the model's ``forward``.
        fixed: the arguments that were traced at one value, and it.
        kinds: the classes of those whose class the code has asked for.
        missed: attributes that the code has asked tensors for, and that these did not have.
    """

    def __init__(
        self,
        signature: inspect.Signature,
        fixed: Mapping[str, Value],
        kinds: Mapping[str, type] = types.MappingProxyType({}),
        missed: Collection[str] = (),
    ) -> None:
        parameters = [p for p in signature.parameters.values() if p.kind not in _VARIADIC]
        self._fixed = dict(fixed)
        self._kinds = dict(kinds)
        self._missed = frozenset(missed)
        self._order = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self._names = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
        self._open = {p.name for p in parameters} - fixed.keys()
        # An argument that was given in the example has no None to stand in for it now.
        self._needed = [p.name for p in parameters if p.default is None and p.name in self._open]
        ways = {p.kind for p in signature.parameters.values()}
        self._any_keyword = inspect.Parameter.VAR_KEYWORD in ways
        self._any_number = inspect.Parameter.VAR_POSITIONAL in ways

    def fitting(self, given: Given, training: bool) -> Given | None:
        """Return the arguments, None where Python would have taken another branch."""
        return given if self._misfitting(given) is None else None

    def misfit(self, given: Given) -> str:
        """Say which argument does not fit."""
        name = self._misfitting(given)
        if name in self._fixed:
            return f"the argument {name}, which was traced as {self._fixed[name]!r}"
        if any(map(is_packed, (*given[0], *given[1].values()))):
            return f"the argument {name}, which is packed or nested"
        named = dict(zip(self._order, given[0], strict=False)) | given[1]
        there = self._missed.intersection(getattr(named.get(name or ""), "__dict__", ()))
        if there:
            return f"the argument {name}, which was traced without an attribute {min(there)!r}"
        kind = self._kinds.get(name or "")
        traced = "given" if kind is None else f"of class {kind.__name__}"
        return f"the argument {name}, which was traced as {traced}"

    def _misfitting(self, given: Given) -> str | None:
        args, kwargs = given
        if len(args) > len(self._order) and not self._any_number:
            return "number"
        for name, value in zip(self._order, args, strict=False):
            if not self._fits(name, value):
                return name
        for name, value in kwargs.items():
            if name not in self._names:
                if not self._any_keyword:
                    return name
            elif not self._fits(name, value):
                return name
        for name in self._needed:
            if name not in kwargs and name not in self._order[: len(args)]:
                return name
        return None

    def _fits(self, name: str, value: Value) -> bool:
        if name not in self._fixed:
            kind = self._kinds.get(name)
            if value is None or (kind is not None and not _is_of(value, kind)):
                return False
            if self._missed and not self._missed.isdisjoint(getattr(value, "__dict__", ())):
                return False
            # A parameter is one by its class, and no attribute of the tensor says so.
            if "_is_param" in self._missed and isinstance(value, nn.Parameter):
                return False
            if isinstance(value, _SINGLES):
                return False  # the code may ask with ``is``, which a symbol answers wrongly
            # Layers take these too, but the taps at them do not.
            return not is_packed(value)
        then = self._fixed[name]
        return value is then or (type(value) is type(then) and bool(value == then))


def _is_of(value: Value, kind: type) -> bool:
    """Tell whether code that has asked for the class takes a value as it took one of ``kind``."""
    # It may have asked by ``type(x) is Tensor``. torch's own classes of tensors are those of passes
    # that look on (fake tensors), and parameters.
    users = kind is Tensor and type(value).__module__.partition(".")[0] != "torch"
    return isinstance(value, kind) and not users


_SINGLES = (Enum, torch.dtype, type)
"""Classes of values that Python tells apart by ``is``."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class _TensorForm(NamedTuple):
    """What an export fixed of a tensor besides its sizes, which have guards of their own."""

    dtype: torch.dtype
    dims: int
    device: torch.device
    layout: torch.layout
    parameter: bool


Guards = Callable[..., object]
"""Raises where the sizes of tensors, given one by one, are not those that an export assumed."""


class ExportedInputs:
    """What torch.export fixed: containers and their lengths, numbers, names, dtypes and sizes.

    Args:
        signature: of the model's ``forward``; a call may name what the example gave by position.
        example: what the model was exported with.
        guards: of the graph in evaluation and of that in training, by mode.
        one_differs: whether a batch of one case is something else (a batch norm refuses it). The
            graph was made of a batch of more.
        ordered: whether the code asks how tensors lie in memory (``is_contiguous``).
        packs: whether torch's own code computes something else in evaluation without gradients:
            ``nn.TransformerEncoder`` packs its rows, and returns zeros in the place of padding.
    """

    def __init__(
        self,
        signature: inspect.Signature,
        example: Given,
        guards: Mapping[bool, Guards | None],
        *,
        one_differs: bool = False,
        ordered: bool = False,
        packs: bool = False,
    ) -> None:
        self._packs = packs
        self._one_differs = one_differs
        self._signature = signature
        self._number = len(example[0])
        self._names = list(example[1])
        self._form = _form_of(example)
        self._guards = dict(guards)
        leaves: list[Value] = []
        _fits(example, self._form, leaves)
        self._orders = _orders(leaves) if ordered else None

    def fitting(self, given: Given, training: bool) -> Given | None:
        """Return the arguments, by position and name as the example had them."""
        args, kwargs = given
        # The graph calls operators where the code calls `torch.tanh`, which a mode of the user's
        # around the call looks for.
        if function_modes() and function_mode_of_the_user():
            return None
        if self._packs and not training and not torch.is_grad_enabled():
            return None
        if len(args) != self._number or list(kwargs) != self._names:
            spelled = self._spelled(given)
            if spelled is None:
                return None
            given = spelled
        leaves: list[Value] = []
        if not _fits(given, self._form, leaves):
            return None
        if self._orders is not None and _orders(leaves) != self._orders:
            return None
        if self._one_differs and any(isinstance(t, Tensor) and t.shape[:1] < (2,) for t in leaves):
            return None
        guards = self._guards[training]
        if guards is not None:
            try:
                guards(*leaves)
            except Exception:  # torch's guards assert; the next torch may raise something else
                return None
        return given

    def misfit(self, given: Given) -> str:
        """Say that the inputs are of another kind."""
        if mode := function_mode_of_the_user():
            return f"in the torch function mode {mode}, which sees no functions of an export"
        if self._packs and not torch.is_grad_enabled():
            return "in evaluation without gradients nn.TransformerEncoder packs its rows"
        leaves = tree_flatten(given)[0]
        for leaf in leaves:
            if isinstance(leaf, Tensor) and _tagged(leaf):
                return f"a tensor with an attribute {min(_tagged(leaf))!r}, which no export sees"
        shapes = [
            f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
            if isinstance(leaf, Tensor)
            else repr(leaf)[:40]
            for leaf in leaves
        ]
        return "inputs of a kind that torch.export has fixed otherwise: " + ", ".join(shapes[:8])

    def _spelled(self, given: Given) -> Given | None:
        """Return the call with the arguments by position that the example had by position."""
        try:
            bound = self._signature.bind(*given[0], **given[1])
        except TypeError:
            return None
        if any(p.kind in _VARIADIC for p in self._signature.parameters.values()):
            return None
        bound.apply_defaults()
        names = list(self._signature.parameters)
        positional = names[: self._number]
        # What the example left at its default must be left there now.
        for name in set(names) - set(positional) - set(self._names):
            if not _same(bound.arguments[name], self._signature.parameters[name].default):
                return None
        args = tuple(bound.arguments[name] for name in positional)
        return args, {name: bound.arguments[name] for name in self._names}


def _orders(leaves: Sequence[Value]) -> list[tuple[bool, bool]]:
    """Return of each tensor whether it lies in memory row by row, or channels last."""
    return [
        (t.is_contiguous(), t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))
        for t in leaves
        if isinstance(t, Tensor) and t.layout is torch.strided
    ]


def _form_of(value: Value) -> Value:
    """Return what of an input ``_fits`` compares: a tensor's kind, a container's class and parts.

    Containers of other classes are compared by torch's own description of them.
    """
    if isinstance(value, Tensor):
        parameter = type(value) is nn.Parameter
        return _TensorForm(value.dtype, value.dim(), value.device, value.layout, parameter)
    if type(value) in (list, tuple):
        return type(value), [_form_of(item) for item in value]
    if type(value) is dict:
        return dict, list(value), [_form_of(item) for item in value.values()]
    leaves, spec = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return object, type(value), value
    return None, spec, [_form_of(leaf) for leaf in leaves]


def _fits(value: Value, form: Value, leaves: list[Value]) -> bool:
    """Tell whether an input has the form, and collect its leaves in the order of the graph's."""
    if type(form) is _TensorForm:
        if not isinstance(value, Tensor):
            return False
        leaves.append(value)
        return bool(
            value.dtype == form.dtype
            and value.dim() == form.dims
            and value.device == form.device
            and value.layout == form.layout
            # Code may ask by ``isinstance(x, nn.Parameter)``.
            and (type(value) is nn.Parameter) is form.parameter
            and not (value.__dict__ and _tagged(value))
        )
    kind = form[0]
    if kind is object:
        leaves.append(value)
        return type(value) is form[1] and _same(value, form[2])
    if kind is None:
        found, spec = tree_flatten(value)
        return bool(spec == form[1]) and all(
            _fits(leaf, part, leaves) for leaf, part in zip(found, form[2], strict=True)
        )
    if type(value) is not kind or len(value) != len(form[-1]):
        return False
    if kind is dict:
        # In another order a loop over the items would run in another order too.
        if list(value) != form[1]:
            return False
        value = value.values()
    return all(_fits(item, part, leaves) for item, part in zip(value, form[-1], strict=True))


def _tagged(tensor: Tensor) -> list[str]:
    """Return the attributes that a user has given to a tensor; torch's own have an underscore."""
    kind = type(tensor)
    # Classes of torch keep what they consist of there: the fake tensors of a pass that is traced
    # have a "constant", distributed ones their placements.
    if kind.__module__.startswith("torch.") and kind is not nn.Parameter:
        return []
    return [name for name in tensor.__dict__ if not name.startswith("_")]


def _same(one: Value, other: Value) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # comparing a user's objects may raise anything
        return False
