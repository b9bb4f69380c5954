"""Values that are equal and not the same, orders, code loaded anew, and what ``is`` asks."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.oracles import close
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError

D = 4
Value = Any
"""Whatever a change or an input is made of."""

FACTOR: Value = 2


@dataclasses.dataclass
class Config:
    scale: Value = 2
    quiet: Value = dataclasses.field(default=1.0, compare=False)


def helper(x: Tensor, k: float = 1.0, *, z: float = 1.0) -> Tensor:
    return x * k * z


@functools.singledispatch
def chosen(kind: object, x: Tensor) -> Tensor:
    return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.k: Value = 2
        self.items: Value = [2]
        self.pair: Value = (2, 3)
        self.config: Value = Config()
        self.order: Value = {"a": 1, "b": 2}
        self.on: Value = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for name in self.order:
            x = torch.tanh(getattr(self, name)(x)) * self.config.quiet
        if self.on is True:
            x = x * 2
        if self.a.weight is self.b.weight:
            x = x * 3
        whole = torch.tensor([1, 2]) * self.k * self.items[0] * self.pair[0] * self.config.scale
        return self.head(helper(chosen(b"", x))), whole * FACTOR


def _reorder(model: Value) -> None:
    model.order["a"] = model.order.pop("a")


def _global(value: Value) -> None:
    globals()["FACTOR"] = value


def _defaults(*values: float) -> None:
    helper.__defaults__ = values


CHANGES: dict[str, tuple[Callable[[Value], object], Callable[[], object]]] = {
    "an attribute": (lambda m: setattr(m, "k", 2.0), lambda: None),
    "an item": (lambda m: m.items.__setitem__(0, 2.0), lambda: None),
    "a list": (lambda m: setattr(m, "items", [2.0]), lambda: None),
    "a tuple": (lambda m: setattr(m, "pair", (2.0, 3)), lambda: None),
    "a field": (lambda m: setattr(m.config, "scale", 2.0), lambda: None),
    "another object": (lambda m: setattr(m, "config", Config(quiet=3.0)), lambda: None),
    "a flag": (lambda m: setattr(m, "on", 1), lambda: None),
    "an order": (_reorder, lambda: None),
    "a global": (lambda _: _global(2.0), lambda: _global(2)),
    "a tie": (lambda m: setattr(m.b, "weight", m.a.weight), lambda: None),
    "a default": (lambda _: _defaults(3.0), lambda: _defaults(1.0)),
    "a default of a name": (
        lambda _: helper.__kwdefaults__.__setitem__("z", 3.0),
        lambda: helper.__kwdefaults__.__setitem__("z", 1.0),
    ),
    "a body": (
        lambda _: setattr(helper, "__code__", (lambda x, k=1.0, *, z=1.0: x - 1).__code__),
        lambda _code=helper.__code__: setattr(helper, "__code__", _code),
    ),
    "a registered function": (
        lambda _: chosen.register(bytes, lambda _, x: x * 7),
        lambda: chosen.register(bytes, lambda _, x: x),
    ),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_an_equal_value_of_another_kind_is_a_change(name: str, given: bool) -> None:
    change, back = CHANGES[name]
    model, x = Model(), torch.randn(5, D)
    twin = copy.deepcopy(model)
    net = kfac_fx.transform(model, (x,) if given else None)
    try:
        for one in (model, twin):
            change(one)
        got, want = net(x), twin(x)
    finally:
        back()
    close(got, want)
    assert [t.dtype for t in got] == [t.dtype for t in want]


def test_what_is_replaced_by_the_same_keeps_the_graph() -> None:
    model, x = Model(), torch.randn(5, D)
    net = kfac_fx.transform(model)
    for _ in range(40):  # a graph that changes more often is given up
        model.config, model.items, model.pair = Config(), [2], (2, int("3"))
        close(net(x), model(x))
        assert net._guard.holds(net)
    model.config.quiet = 3.0
    close(net(x), model(x))


class Asking(Model):
    """Compares inputs, and what they are asked for, with ``is``."""

    def __init__(self, question: Callable[..., bool]) -> None:
        super().__init__()
        self.question = question

    def forward(self, x: Tensor, k: Value = 1.0) -> Tensor:  # type: ignore[override]
        return self.head(self.a(x.float()) if self.question(x, k) else self.b(x.float()))


def _of_a_name(x: Tensor, _: Value) -> bool:
    dtype = x.dtype
    return dtype is torch.bool


@pytest.mark.parametrize(
    "question",
    [lambda x, _: x.dtype is torch.bool, _of_a_name, lambda x, _: x.size(0) is not True],
    ids=["attribute", "variable", "call"],
)
def test_is_of_a_symbolic_value_is_refused(question: Callable[..., bool]) -> None:
    with pytest.raises(CaptureError, match="compared with `is`"):
        kfac_fx.transform(Asking(question))
    model, x = Asking(question), torch.randint(0, 2, (5, D))
    net = kfac_fx.transform(model, (x,))
    for one in (x, x.bool()):
        close((net(one),), (model(one),))


def test_an_input_that_is_compared_is_checked() -> None:
    model, x = Asking(lambda _, k: k is True), torch.randn(5, D)
    net = kfac_fx.transform(model, (x, x))
    for k in (x, True):
        close((net(x, k),), (model(x, k),))


class Keywords(Model):
    def forward(self, x: Tensor, **named: Value) -> Tensor:  # type: ignore[override]
        return self.head(self.a(x) if named.get("first") is not False else self.b(x))


def test_a_flag_among_the_keywords_is_no_symbol() -> None:
    model, x = Keywords(), torch.randn(5, D)
    with pytest.raises(CaptureError, match="compared with `is`"):
        kfac_fx.transform(model)
    net = kfac_fx.transform(model, (x,), example_kwargs={"first": True})
    for first in (True, False):
        close((net(x, first=first),), (model(x, first=first),))


def test_an_input_may_be_a_parameter_later() -> None:
    model, x = Asking(lambda x, _: isinstance(x, nn.Parameter)), torch.randn(5, D)
    net = kfac_fx.transform(model)
    for one in (x, nn.Parameter(x)):
        close((net(one),), (model(one),))


class Counting(Model):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.a(x)) * len({id(p) for p in (self.a.weight, self.b.weight)})


def test_the_identity_of_a_parameter_is_that_of_the_tensor() -> None:
    model, x = Counting(), torch.randn(5, D)
    net = kfac_fx.transform(model)
    close((net(x),), (model(x),))
    model.b.weight = model.a.weight
    close((net(x),), (model(x),))
