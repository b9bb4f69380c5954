"""What a capture read from a model besides tensors, compared at every call in one pass.

A graph is the path that the model's Python took once: over attributes, flags, children, hooks and
globals. They may be others at the next call, and the graph would go on as before.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from kfac_fx.capture.changes import Change, Place
from kfac_fx.capture.code_names import CALLS, calls_left, globals_in, modules_in, names_in
from kfac_fx.capture.exactness import Exactness
from kfac_fx.capture.kept_state import (
    TENSORS,
    Kept,
    Watched,
    copied,
    differing,
    in_modes,
    plainly_held,
    same,
    same_content,
    ties,
    with_others,
)
from kfac_fx.capture.layer_calls import translate
from kfac_fx.capture.object_states import HOLDERS, SCALARS, attributes_of, entries
from kfac_fx.capture.reached_code import reached
from kfac_fx.capture.run_state import RunState
from kfac_fx.capture.settings_read import (
    CODE,
    Setting,
    held_by_classes,
    of_cell,
    of_code,
    of_environment,
    of_gradients,
    of_layers,
    of_tags,
    of_ties,
    of_torch,
    of_values,
    settings_of,
)

# What torch keeps in a module for itself, and no forward of a user's reads. Lists of a recurrent
# layer's weights are made anew whenever it moves.
_OWN = frozenset({*TENSORS, "_flat_weights", "_flat_weight_refs", "_compiled_call_impl"})
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_DEPTH = 8
"""How deep containers and objects within attributes are looked at."""

_MOST = 20_000
"""Most containers that are looked at: a table of a million entries is data and no setting."""


class ModelState:
    """Hold what a model's Python can read, and tell cheaply whether it is still so.

    Modes are held apart: in training and in evaluation all flags have one value at the capture.

    Args:
        model: the user's model, as it was captured.
        live: paths of modules that the graph calls as they are. What they hold is read at each
            call, so only that which taps were chosen by is looked at.
        own_hooks: whether hooks of the model itself run at each call and need no watch.
        read: names, in ``RunState``, of tensors that are no members and whose values the graph has.
        gradients: whether parameters that are frozen later make a difference: code that asks for
            their gradients would let them train again.

    Attributes:
        model: the same as given.
    """

    def __init__(
        self,
        model: nn.Module,
        live: Collection[str],
        *,
        own_hooks: bool,
        read: Collection[str] = (),
        gradients: bool = False,
    ) -> None:
        self.model = model
        self._read = read
        self._gradients = gradients
        self._modules: list[nn.Module] = []
        self._paths: list[str] = []
        self._places: list[Place] = []
        self._containers: list[Watched] = []
        self._seen: set[int] = set()
        self._settings: list[Setting] = []
        self._objects: list[tuple[Watched, Place]] = []
        self._names: set[str] = set()
        self._code: list[types.FunctionType | type] = []
        self._live_layers: list[tuple[dict[str, Watched], str]] = []
        self._own_hooks = own_hooks
        self._live_paths = live
        self._apart: set[int] = set()
        for path, module in model.named_modules():
            self._add_module(module, path, path in live)
        for name in _GLOBAL_HOOKS:
            self._watch(getattr(torch_module, name), Place("", f"torch's {name}"), 0)
        self._add_objects()
        if read:
            plain = RunState(model).plain_tensors(model)
            self._settings += [of_values(tensor, name) for name, tensor in plain if name in read]
        if gradients:
            self._settings += of_gradients(model)
        self._tensors = [
            vars(module)[kind]
            for module in self._modules
            for kind in TENSORS
            if plainly_held(module)
        ]
        self._settings += [of_tags(self._tensors, self._names), of_code(self._code)]
        own = (m for p, m in zip(self._paths, self._modules, strict=True) if p not in live)
        self._settings += [*of_ties(self._tensors, self._code), *of_layers(own)]
        # Many functions name the same globals.
        self._settings = [*{(id(one.space), one.name): one for one in self._settings}.values()]
        now = self._copies()
        self._kept = in_modes(now, self._apart)
        self._exact = dict.fromkeys(self._kept, Exactness(self._containers, now))
        self._ties = ties(model)

    # The pass of every call.

    def holds(self, training: bool) -> bool:
        """Tell whether all is as it was.

        Args:
            training: the mode that the captured module is in.
        """
        kept = self._kept[training]
        if kept is None:
            return False
        kinds, containers, values, tensors = kept
        try:
            # Dictionaries are compared by C code that looks at identities first: some twenty
            # nanoseconds an entry, where a loop in Python would take ten times as long.
            now = [space.get(name) for space, name, _ in self._settings]
            return bool(
                self._containers == containers
                and [*map(type, self._modules)] == kinds
                and now == values
                and self._exact[training].holds(now)
                and self._kinds_of_tensors() == tensors
                and (not self._ties or self._tied())
            )
        except Exception:  # comparing a user's objects may raise anything
            return False

    # What is left for calls that find a change.

    def changes(self, training: bool) -> list[Change]:
        """Return what differs, entry by entry.

        Args:
            training: the mode that the captured module is in.
        """
        kept = self._kept[training]
        if kept is None:
            return [Change(Place(""), "places", "the model has changed in its other mode")]
        kinds, containers, values, tensors = kept
        found: list[Change] = []
        looked_at = zip(self._places, self._containers, containers, strict=True)
        for number, (place, now, then) in enumerate(looked_at):
            for key, words in differing(now, then):
                # Python adds to a class by itself (its annotations, when they are asked for).
                if key not in _OWN and (key == "__call__" or not key.startswith("__")):
                    # No graph follows the flag of a module that is no child.
                    key = f"held {key}" if number in self._apart else key
                    found.append(Change(place, key, f"{place}{words}"))
        for path, module, kind in zip(self._paths, self._modules, kinds, strict=True):
            if type(module) is not kind:
                place = Place(path)
                words = f"the class of {place} is {type(module).__name__}, not {kind.__name__}"
                found.append(Change(place, "__class__", words))
        for (space, name, words), value in zip(self._settings, values, strict=True):
            if not same(space.get(name), value):
                found.append(Change(Place("", words), name, words))
        kinds_now = self._kinds_of_tensors()
        if [one is None for one in kinds_now] != [one is None for one in tensors]:
            words = "a parameter or buffer is there that was not, or is gone"
            found.append(Change(Place(""), "members", words))
        elif [one[2] for one in kinds_now[1:] if one] != [one[2] for one in tensors[1:] if one]:
            found.append(Change(Place(""), "sizes", "the sizes of parameters or buffers"))
        elif kinds_now != tensors:
            words = "dtypes or devices of parameters and buffers, or the default dtype"
            found.append(Change(Place(""), "tensors", words))
        if not self._tied():
            found.append(Change(Place(""), "ties", "parameters that were one are two"))
        return found

    def flags(self) -> dict[str, bool]:
        """Return the flag ``training`` of every module by path."""
        return {p: m.training for p, m in zip(self._paths, self._modules, strict=True)}

    def accept(self, training: bool) -> None:
        """Take the present state as good: it was found to lead to the same graph.

        Args:
            training: the mode for which it is so.
        """
        # A list or a child that was replaced is looked at from now on in the place of the old one;
        # else what is written to it later would go unnoticed.
        fresh = self.of_copy(self.model)
        self._take_over(fresh, training)

    def same_elsewhere(self, training: bool) -> bool:
        """Tell whether only containers were replaced by equal ones, and watch these from now on.

        A cache that is emptied by ``self.cache = {}`` is as it was at the capture, and the old one,
        which was filled, is nobody's any more.

        Args:
            training: the mode that the captured module is in.
        """
        kept = self._kept[training]
        fresh = self.of_copy(self.model)
        if kept is None or fresh._outline() != self._outline() or not self._tied():
            return False
        if not same_content(fresh._copies(), kept, fresh._containers, self._containers):
            return False
        self._take_over(fresh, training)
        return True

    def _take_over(self, fresh: ModelState, training: bool) -> None:
        """Look where another state looks, and keep what is there now for one mode.

        Args:
            fresh: the state of the model as it is now.
            training: the mode.
        """
        other = self._kept[not training] if fresh._outline() == self._outline() else None
        if other is not None:
            pairs = zip(self._containers, fresh._containers, strict=True)
            other = with_others(other, {id(old): new for old, new in pairs})
        fresh._kept = {training: fresh._copies(), not training: other}
        held = fresh._containers
        fresh._exact = {m: Exactness(held, kept) for m, kept in fresh._kept.items() if kept}
        self.__dict__.update(fresh.__dict__)

    def _outline(self) -> object:
        """Return where is looked, in order."""
        return self._places, self._paths, [(name, words) for _, name, words in self._settings]

    def of_copy(self, model: nn.Module) -> ModelState:
        """Return the state of a copy of the model, which is as this model is now."""
        own = self._own_hooks
        read, gradients = self._read, self._gradients
        return ModelState(model, self._live_paths, own_hooks=own, read=read, gradients=gradients)

    def known(self) -> object:
        """Return the present state as a value that ``same`` can compare with a later one."""
        return self._copies()

    def same(self, other: object) -> bool:
        """Tell whether the state is that of an earlier ``known``."""
        try:
            return bool(self._live() == other)
        except Exception:  # comparing a user's objects may raise anything
            return False

    # Building.

    def _add_module(self, module: nn.Module, path: str, live: bool, *, child: bool = True) -> None:
        """Look at a module's dictionary and, where the graph has looked into it, at all it holds.

        Args:
            module: one of the model's.
            path: its path.
            live: whether the graph calls it as it is.
            child: whether it is one of the model's; ``train()`` does not reach the others, and a
                graph holds their tensors themselves.
        """
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        self._modules.append(module)
        self._paths.append(path)
        # A layer that is called as it is reads its own settings; those that a tap was chosen by
        # (the stride of a convolution) may not change behind the tap.
        if live:
            self._live_layers.append((vars(module), path))
            if translate(module, path) is None:
                return
        if not child:
            for kind in TENSORS if plainly_held(module) else ():
                self._add(vars(module)[kind], Place(path))
            self._apart.add(len(self._places))
        self._add(vars(module), Place(path))
        for key, value in vars(module).items():
            if key in _OWN or (not path and self._own_hooks and "_hooks" in key):
                continue
            if key == "_modules" and isinstance(value, dict):
                self._add(value, Place(path, "children"))
            elif key != "_modules":
                self._watch(value, Place(path, key), 1)
        if not live:
            self._add_class(type(module), path)

    def _add(self, container: Watched, place: Place) -> None:
        """Look at the entries of a container, and no deeper."""
        self._seen.add(id(container))
        self._places.append(place)
        self._containers.append(container)

    def _watch(self, value: Watched, place: Place, depth: int) -> None:
        """Look at a container or a plain object, and at those in it.

        Args:
            value: what an attribute holds, or what is in that.
            place: of the attribute.
            depth: 1 for the attribute's own value.
        """
        if depth > _DEPTH or id(value) in self._seen or len(self._places) > _MOST:
            return
        if not isinstance(value, (*HOLDERS, tuple, nn.Module)):
            self._objects.append((value, place))
        if isinstance(value, nn.Module):
            # Those in a plain list are no children of their module, and run all the same.
            if depth > 1:
                for path, inner in value.named_modules():
                    where = f"{place}.{path}".strip(".")
                    self._add_module(inner, where, False, child=False)
            return
        items: Iterable[Watched] = ()
        if isinstance(value, HOLDERS):
            self._add(value, place)
            items = entries(value)
        elif isinstance(value, tuple):
            items = entries(value)
        elif isinstance(value, functools.partial):
            items = (value.func, value.args, value.keywords)
        elif isinstance(value, (types.FunctionType, types.MethodType)):
            self._add_globals(getattr(value, "__func__", value), CALLS)
            self._objects.append((getattr(value, "__self__", None), place))
        elif depth <= 2 and (held := attributes_of(value)) is not None:
            self._seen.add(id(value))
            self._add(held, place)
            # Settings within settings, but no object within an object: a trainer that a module
            # knows holds all there is, and changes in every step.
            items = (one for one in held.values() if isinstance(one, (*HOLDERS, tuple)))
        for item in items:
            if not isinstance(item, (*SCALARS, Tensor)):
                self._watch(item, place, depth + 1)

    def _add_class(self, kind: type, path: str) -> None:
        """Look at the attributes of a user's class, and at the globals that its code reads."""
        meta: Watched = type(kind)  # a class may have properties too
        for base in (*kind.__mro__, *meta.__mro__):
            if id(base) in self._seen or base.__module__.split(".")[0] in ("torch", "builtins"):
                continue
            self._seen.add(id(base))
            self._code.append(base)
            self._places.append(Place(path, f"class {base.__name__}"))
            self._containers.append(vars(base))
            for value in list(vars(base).values()):
                function = getattr(value, "__func__", getattr(value, "fget", value))
                self._add_globals(function, CALLS)

    def _add_globals(self, function: object, depth: int) -> None:
        """Look at the settings that a function reads from its module or its closure."""
        if not isinstance(function, types.FunctionType) or id(function) in self._seen or not depth:
            return
        self._seen.add(id(function))
        depth = calls_left(function.__code__, depth)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if isinstance(default, HOLDERS):
                self._watch(default, Place("", f"a default of {function.__name__}"), 1)
        if function.__dict__:
            place = Place("", f"an attribute of {function.__name__}")
            self._add(function.__dict__, place)
            for value in function.__dict__.values():
                # Not what a decorator has wrapped: the code of half a library hangs there.
                if isinstance(value, HOLDERS):
                    self._watch(value, place, 1)
                elif isinstance(value, types.MappingProxyType):  # what singledispatch calls
                    self._add(value, place)
                    for called in value.values():
                        self._add_globals(called, depth - 1)
        space = function.__globals__
        if (space.get("__name__") or "").split(".")[0] in ("torch", *sys.stdlib_module_names):
            return
        self._names.update(names_in(function.__code__))
        self._code.append(function)
        if function.__kwdefaults__:
            self._add(function.__kwdefaults__, Place("", f"a default of {function.__name__}"))
        for name in globals_in(function.__code__):
            value = space.get(name)
            if isinstance(value, CODE):
                self._settings.append(Setting(space, name, f"the global {name}"))
            if isinstance(value, types.FunctionType):
                self._add_globals(value, depth - 1)
            elif isinstance(value, (*SCALARS, *HOLDERS, tuple)) and name in space:
                self._settings.append(Setting(space, name, f"the global {name}"))
                self._watch(value, Place("", f"the global {name}"), 1)
            elif name in space:
                self._objects.append((value, Place("", f"the global {name}")))
        for module in modules_in(function):
            self._add_module_globals(module, {*names_in(function.__code__)}, depth - 1)
        self._settings += of_torch(function)
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if isinstance(value, types.FunctionType):
                self._add_globals(value, depth - 1)
            elif isinstance(value, HOLDERS):
                self._watch(value, Place("", f"a variable around {function.__name__}"), 1)
            elif isinstance(value, SCALARS):
                words = f"a variable around {function.__name__}"
                self._settings.append(of_cell(cell, function.__name__, words))
            else:
                self._objects.append((value, Place("", f"a variable around {function.__name__}")))

    def _add_module_globals(
        self, module: types.ModuleType, names: Collection[str], depth: int
    ) -> None:
        """Look at what a function with these names may read of a module: ``config.SCALE``."""
        space = vars(module)
        for name in space.keys() & names:
            value, words = space[name], f"{module.__name__}.{name}"
            if isinstance(value, (*CODE, *SCALARS, *HOLDERS, tuple)):
                self._settings.append(Setting(space, name, words))
            if isinstance(value, types.FunctionType):
                self._add_globals(value, depth)
            elif isinstance(value, (*HOLDERS, tuple)):
                self._watch(value, Place("", words), 1)
            elif not isinstance(value, (*SCALARS, types.ModuleType)):
                self._objects.append((value, Place("", words)))

    def _add_objects(self) -> None:
        """Look at what the model's code reads of objects, once all names in it are known."""
        # What is reached through helpers, an object's methods say, is read as much as the own code.
        code = reached(m for p, m in self.model.named_modules() if p not in self._live_paths)
        for function, depth in code.calls:
            self._add_globals(function, depth)
        self._objects += [(kind, Place("", kind.__name__)) for kind in code.classes]
        self._objects += held_by_classes(self._code, self._names)
        self._settings += of_environment(self._names)
        seen: dict[int, Watched] = {}
        # The graph follows a layer that it calls, and not what other code has read of it.
        for held, path in self._live_layers:
            for key in self._names.intersection(held) - {"training"}:
                if isinstance(held[key], SCALARS):
                    self._settings.append(Setting(held, key, f"{path}.{key}"))
        for value, place in self._objects:
            # Code that is found on the way has names of its own: they are for the objects after it.
            for found in settings_of(value, str(place), tuple(self._names), seen):
                if isinstance(found, Setting):
                    self._settings.append(found)
                else:
                    depth = 2 if isinstance(found[0], nn.Module) else 1
                    self._watch(found[0], Place("", found[1]), depth)

    # Values.

    def _kinds_of_tensors(self) -> list[Any]:
        """Return dtype, device and sizes of every parameter and buffer, None where there is none.

        The default dtype, in which code makes new tensors, comes first. Sizes of members are
        numbers to a tracer: a graph has them where the code reads them.
        """
        kinds: list[Any] = [torch.get_default_dtype()]
        kinds += [
            None if tensor is None else (tensor.dtype, tensor.device, tensor.shape)
            for held in self._tensors
            for tensor in held.values()
        ]
        return kinds

    def _live(self) -> Kept:
        kinds = [*map(type, self._modules)]
        values = [space.get(name) for space, name, _ in self._settings]
        return Kept(kinds, self._containers, values, self._kinds_of_tensors())

    def _copies(self) -> Kept:
        kinds, containers, values, tensors = self._live()
        return Kept(kinds, [copied(one) for one in containers], values, tensors)

    def _tied(self) -> bool:
        """Tell whether tensors that were one object under two names still are."""
        return all(one.get(a) is other.get(b) for one, a, other, b in self._ties)
