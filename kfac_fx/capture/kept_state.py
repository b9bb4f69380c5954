"""What a capture found in a model, as copies that later changes do not reach."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from kfac_fx.capture.object_states import HOLDERS, SCALARS, entries

TENSORS = ("_parameters", "_buffers")
"""A module's dictionaries of tensors."""

_NUMBERS = (bool, int, float, complex)
_DEPTH = 6
"""How many containers one within the other are compared number by number."""

Watched = Any
"""A container that is looked at: a module's dictionary, a list in an attribute, a class."""


class Plain(tuple[Any, ...]):
    """A value of a setting whose parts are what they are where they are equal."""


class Kept(NamedTuple):
    """What was found, each in the order in which a ``ModelState`` looks.

    Attributes:
        kinds: the classes of the modules.
        containers: copies of the watched containers.
        values: of the settings.
        tensors: dtypes, devices and sizes of the parameters and buffers.
    """

    kinds: list[type]
    containers: list[Watched]
    values: list[object]
    tensors: list[Any]


def same_content(one: Kept, other: Kept, *watched: Collection[Watched]) -> bool:
    """Tell whether two states hold the same, though in other containers.

    Args:
        one: a state.
        other: another of the same places.
        watched: the containers of either. What one holds of these stands in the state for itself.
    """
    known = {
        id(container): type(container)
        for containers in watched
        for container in containers
        if isinstance(container, HOLDERS)
    }
    try:
        here, there = with_others(one, known), with_others(other, known)
        return here == there and all(map(same, here[1:3], there[1:3]))
    except Exception:  # comparing a user's objects may raise anything
        return False


def with_others(kept: Kept, others: Mapping[int, Watched]) -> Kept:
    """Return a state with other values in the place of some containers within containers.

    Args:
        kept: the state.
        others: by the identity of the container.
    """

    def entries(container: Watched) -> Watched:
        if isinstance(container, dict):
            return {key: others.get(id(value), value) for key, value in container.items()}
        if type(container) is not list:
            return container
        return [others.get(id(value), value) for value in container]

    return kept._replace(containers=[*map(entries, kept.containers)])


def copied(container: Watched) -> Watched:
    """Return a copy that later changes of the container do not reach."""
    if isinstance(container, (dict, types.MappingProxyType)):
        # The base class's: a mapping may make new values whenever it is read (ACT2FN).
        return dict(dict.items(container) if isinstance(container, dict) else container)
    return list(container) if type(container) is list else copy.copy(container)


def in_modes(state: Kept, apart: Collection[int]) -> dict[bool, Kept | None]:
    """Return a state with the flags of all modules in one mode, as captures are made, by mode.

    Args:
        state: of a model.
        apart: the numbers of the containers of modules that keep the flag that they have.
    """
    return {mode: _in_mode(state, mode, apart) for mode in (True, False)}


def _in_mode(state: Kept, training: bool, apart: Collection[int]) -> Kept:
    flagged = [
        {**one, "training": training}
        if isinstance(one, dict) and "_modules" in one and number not in apart
        else one
        for number, one in enumerate(state.containers)
    ]
    return state._replace(containers=flagged)


def equal(one: object, other: object) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # comparing a user's objects may raise anything
        return False


def same(one: Watched, other: Watched, depth: int = 0) -> bool:
    """Tell whether two values are equal and the same to code, with the numbers that they hold.

    Args:
        one: a value.
        other: another one.
        depth: how many containers they are within.
    """
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if depth > _DEPTH:
        return equal(one, other)
    if isinstance(one, _NUMBERS):
        return repr(one) == repr(other)  # 0.0 and -0.0 are equal
    if isinstance(one, (list, tuple)):
        one, other = entries(one), entries(other)
        return len(one) == len(other) and all(map(same, one, other, itertools.repeat(depth + 1)))
    if isinstance(one, dict):
        # In another order a loop over the items runs in another order too; nobody loops over the
        # attributes of a module.
        if list(one) != list(other) and "_modules" not in one:
            return False
        raw = dict.__getitem__
        return one.keys() == other.keys() and all(
            same(raw(one, key), raw(other, key), depth + 1) for key in one
        )
    held = getattr(one, "__dict__", None)
    if isinstance(held, dict) and not same(held, vars(other), depth + 1):
        return False
    return equal(one, other)


def differing(now: Watched, then: Watched) -> Iterator[tuple[str, str]]:
    """Yield the entries of a container that differ, as key and in words."""
    if now is then:
        return
    if not isinstance(then, dict):
        if not same(now, then):
            yield "", f" is {_short(now)}, not {_short(then)}"
        return
    if list(now) != list(then) and now.keys() == then.keys() and "_modules" not in then:
        yield "", " has another order"
    for key in dict.fromkeys((*then, *now)):
        if key not in now:
            yield str(key), f".{key} is gone"
        elif key not in then:
            yield str(key), f".{key} is new"
        elif not same(now[key], then[key]):
            yield str(key), f".{key} is {_short(now[key])}, not {_short(then[key])}"


def _short(value: object) -> str:
    """Return a value as text that fits into a message."""
    if isinstance(value, SCALARS):
        return repr(value)[:60]
    return f"a {type(value).__name__}" if not isinstance(value, type) else value.__name__


def plainly_held(module: nn.Module) -> bool:
    """Tell whether a module keeps its tensors in plain dictionaries (a scripted one does not)."""
    return all(type(vars(module).get(kind)) is dict for kind in TENSORS)


def ties(
    model: nn.Module,
) -> list[tuple[dict[str, object], str, dict[str, object], str]]:
    """Return where one tensor stands under two names: a graph reads it under the first."""
    first: dict[int, tuple[dict[str, object], str]] = {}
    found = []
    for module in model.modules():
        for kind in TENSORS if plainly_held(module) else ():
            held = vars(module)[kind]
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) in first:
                    found.append((*first[id(tensor)], held, name))
                else:
                    first[id(tensor)] = (held, name)
    return found
