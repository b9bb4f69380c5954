"""State that a forward keeps outside of containers and plain objects, and settings of modules."""

from __future__ import annotations

import array
import collections
import ctypes
import dataclasses
import multiprocessing
import queue
import sys
import threading
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError

ROUTES = ("symbolic_trace", "export", "eager")
settings = types.ModuleType("settings_of_a_project")


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


@dataclasses.dataclass(slots=True)
class SlottedData:
    value: int = 0


def queue_of_one() -> queue.Queue[int]:
    made: queue.Queue[int] = queue.Queue()
    made.put(0)
    return made


def counted(held: Any) -> int:
    """Count one further, whatever keeps the number."""
    if isinstance(held, queue.Queue):
        number = held.get() + 1
        held.put(number)
        return number
    if isinstance(held, (array.array, bytearray, ctypes.Array)):
        held[0] += 1
        return int(held[0])
    if isinstance(held, (collections.UserDict, weakref.WeakKeyDictionary)):
        held[Slotted] = held.get(Slotted, 0) + 1
        return int(held[Slotted])
    if isinstance(held, ContextVar):
        held.set(held.get() + 1)
        return held.get()
    held.value = getattr(held, "value", 0) + 1
    return int(held.value)


class Elsewhere:
    """A descriptor that keeps the value of each instance beside it."""

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else self.kept.get(owner, 0)

    def __set__(self, owner: Any, value: int) -> None:
        self.kept[owner] = value


class Described(nn.Module):
    value = Elsewhere()


KEEPERS: dict[str, Callable[[], Any]] = {
    "slots": Slotted,
    "a data class with slots": SlottedData,
    "a namespace": types.SimpleNamespace,
    "values of a thread": threading.local,
    "a queue": queue_of_one,
    "an array": lambda: array.array("i", [0]),
    "bytes": lambda: bytearray(4),
    "C data": lambda: (ctypes.c_int * 2)(),
    "a shared value": lambda: multiprocessing.Value("i", 0),
    "a shared value without a lock": lambda: multiprocessing.Value("i", 0, lock=False),
    "UserDict": collections.UserDict,
    "WeakKeyDictionary": weakref.WeakKeyDictionary,
    "a context variable": lambda: ContextVar("count", default=0),
    "a tensor's attribute": lambda: torch.zeros(1),
    "a descriptor": Described,
}


class Counting(nn.Module):
    def __init__(self, keeper: Any) -> None:
        super().__init__()
        self.layer, self.keeper = nn.Linear(3, 2), keeper

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / counted(self.keeper)


@pytest.mark.parametrize("kind", KEEPERS)
def test_a_count_is_heard_and_put_back(kind: str) -> None:
    model, x = Counting(KEEPERS[kind]()), torch.randn(4, 3)
    with pytest.raises(CaptureError, match="a graph would not do again"):
        kfac_fx.transform(model)
    net = kfac_fx.transform(model, x)
    for number in (1, 2, 3):
        assert torch.allclose(net(x), model.layer(x) / number)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["an array", "bytes", "C data", "a shared value"])
def test_memory_is_compared(kind: str, route: kfac_fx.config.Capture) -> None:
    class Reading(Counting):
        def forward(self, x: Tensor) -> Tensor:
            held = self.keeper
            return self.layer(x) * (held.value if hasattr(held, "value") else held[0])

    model, x = Reading(KEEPERS[kind]()), torch.randn(4, 3)
    net = kfac_fx.transform(model, x, capture=route)
    assert not net(x).any()
    counted(model.keeper)
    assert torch.equal(net(x), model.layer(x))


def test_a_default_that_grows() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, calls: list[int] = []) -> Tensor:  # noqa: B006
            calls.append(1)
            return self.layer(x) / len(Growing.forward.__defaults__[0])

    model, x = Growing(), torch.randn(4, 3)
    net = kfac_fx.transform(model, x)
    assert torch.allclose(net(x), model.layer(x))
    assert torch.allclose(net(x), model.layer(x) / 2)


@pytest.mark.parametrize("held", [lambda: iter([1.0]), lambda: [iter([1.0])], queue.SimpleQueue])
def test_what_is_used_up_is_refused(held: Callable[[], Any]) -> None:
    model = Counting(held())
    with pytest.raises(CaptureError, match=r"keeper (is an iterator|holds what is used up)"):
        kfac_fx.transform(model)


def finished() -> Any:
    made = (number for number in ())
    assert list(made) == []
    return made


@pytest.mark.parametrize("held", [lambda: iter([]), lambda: iter(range(0)), finished])
def test_an_iterator_that_has_nothing_more_to_give(held: Callable[[], Any]) -> None:
    """The layers of torchrl are built from iterators, which they keep."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    model.keeper = held()  # type: ignore[assignment]
    assert torch.allclose(kfac_fx.transform(model, x)(x), model(x))


def test_an_iterator_as_an_example_input() -> None:
    with pytest.raises(CaptureError, match="the example inputs hold an iterator"):
        kfac_fx.transform(nn.Linear(3, 2), (iter([torch.randn(4, 3)]),))


def test_a_weak_proxy_is_no_iterator() -> None:
    class Keeper:
        scale = 2.0

    keeper = Keeper()

    class Scaled(Counting):
        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.layer(x) * self.keeper.scale
            return scaled

    model, x = Scaled(weakref.proxy(keeper)), torch.randn(4, 3)
    net = kfac_fx.transform(model)
    keeper.scale = 3.0
    assert torch.equal(net(x), model(x))


def innermost() -> float:
    scale: float = settings.scale
    return scale


def third() -> float:
    return innermost()


def second() -> float:
    return third()


def first() -> float:
    return second()


def imported() -> float:
    from settings_of_a_project import scale

    return float(scale)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("read", [lambda: settings.scale, imported, first])
def test_settings_of_modules_are_compared(
    read: Callable[[], float], route: kfac_fx.config.Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, settings.__name__, settings)
    settings.scale = 1.0  # type: ignore[attr-defined]

    class Scaled(Counting):
        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = self.layer(x) * self.keeper()
            return scaled

    model, x = Scaled(read), torch.randn(4, 3)
    net = kfac_fx.transform(model, x, capture=route)
    assert torch.equal(net(x), model.layer(x))
    settings.scale = 2.0  # type: ignore[attr-defined]
    assert torch.equal(net(x), 2.0 * model.layer(x))
