"""Everything that a run of a model's Python code may change: seen, named, and put back.

Attributes of its modules and what they hold (lists, dictionaries, plain objects, generators), plain
values of their classes and of the globals that their methods name, parameters and buffers.
"""

from __future__ import annotations

import collections
import random
import sys
import types
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from kfac_fx.capture.code_names import is_theirs
from kfac_fx.capture.object_states import (
    BAGS,
    HOLDERS,
    SCALARS,
    Slots,
    entries,
    set_state,
    slots_of,
    state_of,
    version,
)
from kfac_fx.capture.reached_code import reached

Value = Any
"""What a module holds under a name."""

_INERT = (fx.Graph, type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device)
_LIMIT = 200_000
"""Objects that are looked at; what lies beyond is not watched."""
_OWN = ("_flat_weights", "_flat_weight_refs")
"""Attributes that torch's recurrent layers write themselves, whenever they run."""


class RunState:
    """What a model's code may change, as it is now.

    Args:
        model: its modules are looked into; tensors' values are kept apart (``TensorValues``).
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[int, Value] = {}
        self._globals_seen: set[tuple[int, str]] = set()
        self._records: list[tuple[str, Value, Value]] = []
        self._states: list[tuple[str, Value, Value]] = []
        self._tensors: list[tuple[str, Tensor, tuple[Value, ...]]] = []
        for path, module in model.named_modules():
            name = f"{path or type(model).__name__}"
            self._object(name, module)
        for owner in {base for m in model.modules() for base in type(m).__mro__ if _theirs(base)}:
            self._class(owner)
        helpers = reached(model.modules())
        for function, _ in helpers.calls:
            self._globals(function)
            self._function(function.__name__, function)
        for owner in helpers.classes:
            self._class(owner)
        for name, one in zip(("Python", "NumPy"), _shared_generators(), strict=False):
            self._walk(f"the random generator of {name}", one)

    def changes(self) -> list[str]:
        """Return in words what is no longer as it was; tensors' values count by their versions."""
        found = self.written()
        found += [f"changes {n} in place" for n, t, before in self._tensors if _marks(t) != before]
        return found

    def written(self) -> list[str]:
        """Return in words which attributes and flags were written and which generators moved."""
        found: list[str] = []
        for name, holder, before in self._records:
            found += _changes(name, before, _contents(holder))
        for name, tensor, marks in self._tensors:
            if tensor.is_leaf and tensor.requires_grad is not marks[0]:
                found.append(f"sets requires_grad of {name}")
        return found + [f"moves {n}" for n, one, before in self._states if state_of(one) != before]

    def plain_tensors(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        """Return the tensors that are no parameters or buffers: nobody trains them, by name."""
        members = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return [(name, t) for name, t, _ in self._tensors if id(t) not in members]

    def restore(self) -> None:
        """Put everything back but the values of tensors."""
        for _, holder, before in self._records:
            now = _contents(holder)
            if not _same(now, before):
                _fill(holder, before)
        for _, one, before in self._states:
            if state_of(one) != before:
                set_state(one, before)
        # After the attributes, since a tensor that was replaced is in its place again by then.
        for _, tensor, before in self._tensors:
            if tensor.is_leaf and tensor.requires_grad is not before[0]:
                tensor.requires_grad_(before[0])
            if tensor.is_leaf and tensor.grad is not before[1]:
                tensor.grad = before[1]

    # Looking.

    def _walk(self, name: str, value: Value) -> None:
        """Take note of a value and of what it holds."""
        if isinstance(value, SCALARS) or id(value) in self._seen or len(self._seen) > _LIMIT:
            return
        if issubclass(type(value), fx.Proxy) or isinstance(value, _INERT):
            return
        # The object and not only its identity: Python gives that of a dead object to a new one.
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._tensors.append((name, value, _marks(value)))
            if type(value) in (Tensor, nn.Parameter):  # others keep there what they consist of
                self._records.append((name, value.__dict__, dict(value.__dict__)))
        elif isinstance(value, ContextVar):
            variable = _Variable(value)
            self._records.append((name, variable, [variable.get()]))
        elif (state := state_of(value)) is not None:
            self._states.append((name, value, state))
        elif isinstance(value, (*HOLDERS, tuple)):
            if not isinstance(value, tuple):
                self._records.append((name, value, _contents(value)))
            # The base class's: a mapping may make new values whenever it is read (ACT2FN).
            items = dict.items(value) if isinstance(value, dict) else enumerate(entries(value))
            for key, item in list(items):
                if type(item) not in SCALARS:
                    at = f"{name}[{key!r}]" if isinstance(key, (str, int)) else name
                    self._walk(at, item)
        elif isinstance(value, types.FunctionType):
            self._function(name, value)
        elif isinstance(value, types.MethodType):
            # Of a bag it is the library's own, as the cache of ``singledispatch`` has one.
            if not isinstance(value.__self__, BAGS):
                self._walk(name, value.__self__)
        # Objects of the standard library and of torch are left alone: they change by themselves
        # (locks, caches, weak references), and none of their attributes is a model's own state.
        elif _theirs(type(value)) or isinstance(value, (nn.Module, *BAGS)):
            self._object(name, value)

    def _object(self, name: str, value: Value, *, plain: bool = False) -> None:
        """Take note of an object's attributes.

        Args:
            name: says where it is.
            value: the object.
            plain: look no further than into containers and tensors that it holds.
        """
        self._seen[id(value)] = value
        if isinstance(value, (WeakKeyDictionary, WeakValueDictionary)):
            # An entry goes when its object does. Those of other models would do so at any moment,
            # and seem to be written by the forward: they live as long as this is needed.
            alive = list(value.items())
            self._seen[id(alive)] = alive
        places = Slots(value)
        if contents := places.get():
            self._records.append((name, places, contents))
            self._held(name, contents, plain)
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict) or id(held) in self._seen:
            return
        self._seen[id(held)] = held
        self._records.append((name, held, dict(held)))
        self._held(name, held, plain)

    def _held(self, name: str, held: dict[str, Value], plain: bool) -> None:
        """Take note of what attributes hold; the arguments are those of ``_object``."""
        for key, item in list(held.items()):
            if key in _OWN or type(item) in SCALARS:
                continue
            walked = (*HOLDERS, *BAGS, Tensor)
            if not plain or isinstance(item, walked) or state_of(item) is not None:
                inner = name if key in ("_parameters", "_buffers", "_modules") else f"{name}.{key}"
                self._walk(inner, item)

    def _outside(self, name: str, value: Value) -> bool:
        """Take note of a value that no module holds: a global, a default, a class's attribute.

        What its objects hold may be a whole program, so that only plain attributes are looked at.

        Returns:
            whether it is of a kind that is looked at.
        """
        walked = (*HOLDERS, Tensor, types.FunctionType, ContextVar)
        if isinstance(value, walked) or state_of(value) is not None:
            self._walk(name, value)
        elif isinstance(value, BAGS) or is_plain_object(value):
            if id(value) not in self._seen:
                self._object(name, value, plain=True)
        else:
            return False
        return True

    def _class(self, owner: type) -> None:
        """Take note of the plain values of a class, and of globals that its methods name."""
        # A counter of all instances is an attribute of the class, and `self.count += 1` of one of
        # them hides it: both places are looked at.
        for key, value in list(vars(owner).items()):
            name = f"{owner.__name__}.{key}"
            if isinstance(value, types.FunctionType):
                self._globals(value)
                self._function(name, value)
            elif not key.startswith("__") and (
                isinstance(value, SCALARS) or self._outside(name, value)
            ):
                self._records.append((owner.__name__, _Entry(owner, key), [value]))

    def _function(self, name: str, function: types.FunctionType) -> None:
        """Take note of what a function closes over, and of attributes that it was given."""
        if not _theirs(function):
            return
        self._walk(name, function.__dict__)  # where it has none yet, it may be given one
        # A default is made once, and what is written into it is there at the next call.
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not isinstance(value, types.FunctionType):
                self._outside(f"a default of {function.__name__}", value)
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:
                continue  # not yet filled
            if isinstance(value, SCALARS):
                self._records.append((name, cell, [value]))
            else:
                self._outside(name, value)

    def _globals(self, function: types.FunctionType) -> None:
        """Take note of the plain globals that a function names."""
        scope = function.__globals__
        for key in function.__code__.co_names:
            value = scope.get(key)
            if value is None or (id(scope), key) in self._globals_seen:
                continue
            self._globals_seen.add((id(scope), key))
            if isinstance(value, (bool, int, float, str)):
                self._records.append((f"the global {key}", _Entry(scope, key), [value]))
            else:
                self._outside(f"the global {key}", value)


class _Entry:
    """A single attribute of a class, or a single global."""

    def __init__(self, owner: Value, key: str) -> None:
        self.owner = owner
        self.key = key

    def get(self) -> Value:
        if isinstance(self.owner, dict):
            return self.owner.get(self.key)
        return vars(self.owner).get(self.key)

    def set(self, value: Value) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


class _Variable(_Entry):
    """The value of a context variable; one that has none stays what it was set to."""

    def __init__(self, variable: ContextVar[Value]) -> None:
        super().__init__(variable, variable.name)

    def get(self) -> Value:
        try:
            return self.owner.get()  # its default too
        except LookupError:
            return None

    def set(self, value: Value) -> None:
        if value is not None:
            self.owner.set(value)


def _theirs(kind: type | types.FunctionType) -> bool:
    """Tell whether code is the user's, or of a library that is not known to be stateless."""
    if kind.__module__ == "torch.quasirandom":
        return True  # SobolEngine keeps its place in plain attributes
    return is_theirs(kind.__module__)


def is_plain_object(value: Value) -> bool:
    """Tell whether a value is an object of a user's class, no code and no symbolic value."""
    kind = type(value)
    if issubclass(kind, (type, types.ModuleType, fx.Proxy, nn.Module)) or callable(value):
        return False
    return _theirs(kind) and (hasattr(value, "__dict__") or bool(slots_of(value)))


def _contents(holder: Value) -> Value:
    """Return a shallow copy of what a holder has, as a plain dictionary, set or list."""
    if isinstance(holder, Slots):
        return holder.get()
    if isinstance(holder, dict):
        return dict(dict.items(holder))
    if isinstance(holder, _Entry):
        return [holder.get()]
    if isinstance(holder, types.CellType):
        return [holder.cell_contents]
    return set(holder) if isinstance(holder, set) else list(holder)


def _fill(holder: Value, contents: Value) -> None:
    """Give a holder the contents that it had, in their order."""
    if isinstance(holder, Slots):
        holder.set(contents)
    elif isinstance(holder, _Entry):
        holder.set(contents[0])
    elif isinstance(holder, types.CellType):
        holder.cell_contents = contents[0]
    elif isinstance(holder, dict):
        # The base classes' methods: a user's mapping may refuse or interpret a key.
        base = collections.OrderedDict if isinstance(holder, collections.OrderedDict) else dict
        base.clear(holder)
        for key, value in contents.items():
            base.__setitem__(holder, key, value)
    else:
        holder.clear()
        holder.update(contents) if isinstance(holder, set) else holder.extend(contents)


def _same(now: Value, before: Value) -> bool:
    """Tell whether two contents are the same objects, or equal plain values, in one order."""
    if isinstance(before, dict):
        if list(now) != list(before):
            return False
        return all(_equal(now[key], value) for key, value in before.items())
    if isinstance(before, set):
        return bool(now == before)
    return len(now) == len(before) and all(map(_equal, now, before))


def _equal(one: Value, other: Value) -> bool:
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, SCALARS) and one == other


def _alike(one: Value, other: Value, depth: int = 8) -> bool:
    """Tell whether two values are equal, or containers of the same objects.

    torch.export puts new lists in place of those that it finds in a module's attributes.
    """
    if _equal(one, other):
        return True
    if not isinstance(one, (*HOLDERS, tuple)) or type(one) is not type(other) or not depth:
        return False
    if isinstance(one, set):
        return bool(one == other)
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            return False
        return all(_alike(one[key], other[key], depth - 1) for key in one)
    one, other = entries(one), entries(other)
    if len(one) != len(other):
        return False
    return all(_alike(a, b, depth - 1) for a, b in zip(one, other, strict=True))


def _changes(name: str, before: Value, now: Value) -> Iterator[str]:
    """Yield in words what differs between two contents of one holder."""
    if _same(now, before):
        return
    if not isinstance(before, dict):
        yield f"changes {name}"
        return
    changed = [
        key
        for key in dict.fromkeys((*before, *now))
        if key not in _OWN
        and (key not in before or key not in now or not _alike(now[key], before[key]))
    ]
    if not changed and list(now) == list(before):
        return
    for key in changed or ["the order of its entries"]:
        yield f"writes {name}.{key}" if isinstance(key, str) else f"changes {name}"


def _marks(tensor: Tensor) -> tuple[Value, ...]:
    """Return what shows that a tensor was touched."""
    grad = tensor.grad if tensor.is_leaf else None
    return tensor.requires_grad, grad, version(tensor), _place(tensor)


class TensorValues:
    """The values of a model's parameters and buffers, as they are now.

    Args:
        model: the model.
        parameters: keep those of parameters too, which takes their memory once more. Needed where
            the model's own code runs: a momentum encoder moves its parameters in each forward.
        others: tensors that the model holds in another way (a cache in a list), by name.
    """

    def __init__(
        self, model: nn.Module, *, parameters: bool, others: Iterable[tuple[str, Tensor]] = ()
    ) -> None:
        named = [*(model.named_parameters() if parameters else ()), *model.named_buffers()]
        self._others = {name: tensor for name, tensor in others if not tensor.is_nested}
        named += self._others.items()
        # An alias too: a tensor whose data was set anew gets the very memory that it had.
        self._saved = [
            (name, tensor, tensor.detach(), tensor.detach().clone())
            for name, tensor in named
            if not tensor.is_meta and not nn.parameter.is_lazy(tensor)
        ]
        self._model = model

    def moved(self) -> dict[str, Tensor]:
        """Return copies of the tensors that have other values now, by name."""
        now = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        now |= self._others
        return {
            name: now[name].detach().clone()
            for name, _, _, value in self._saved
            if name in now and not _equal_values(now[name], value)
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back."""
        for _, tensor, alias, value in self._saved:
            if _place(tensor) != _place(alias):
                tensor.data = alias
            if not _equal_values(tensor, value):
                tensor.copy_(value)


def _place(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, 0 where it has none."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _equal_values(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal; NaN equals itself."""
    if one.layout is not torch.strided or one.is_quantized or one.shape != other.shape:
        return False
    same = one.detach() == other
    return bool((same | (one.detach() != one.detach()) & (other != other)).all())


def _shared_generators() -> list[Value]:
    """Return the generators of Python and NumPy that every module shares."""
    found: list[Value] = [random._inst]
    numpy = sys.modules.get("numpy")
    return found if numpy is None else [*found, numpy.random.mtrand._rand]
