"""What a model's code reads from objects, closures and the process: a change of it is followed."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kfac_fx

D = 4
ROUTES = ("none", "inputs", "export", "eager")
Value = Any
"""Whatever a setting is."""


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0

    def times(self, number: float) -> float:
        return self.scale * number


FACTOR = [1.0]


class Registry:
    """Functions by name, as transformers keeps those of attention; their code has other names."""

    def __init__(self) -> None:
        self.functions = {"last": lambda: FACTOR[-1], "plain": lambda: float(len(FACTOR))}


REGISTRY = Registry()


def factor() -> float:
    return FACTOR[0]


def by(number: float, scale: float) -> float:
    return number * scale


class OfClass:
    scale = 1.0


class Mode(Enum):
    LOW, HIGH = 1, 2


BAG = types.SimpleNamespace(scale=1.0)
LOCAL = threading.local()
CONTEXT: ContextVar[float] = ContextVar("scale", default=1.0)


def closed() -> tuple[Callable[[], float], Callable[[float], None]]:
    scale = 1.0

    def read() -> float:
        return scale

    def change(value: float) -> None:
        nonlocal scale
        scale = value

    return read, change


READ, CHANGE = closed()


def defaulting(kept: list[float] = [1.0]) -> list[float]:  # noqa: B006  # what is tested
    return kept


class Table:
    """A descriptor that keeps the value of each instance beside it."""

    def __init__(self) -> None:
        self.kept: weakref.WeakKeyDictionary[Value, float] = weakref.WeakKeyDictionary()

    def __get__(self, owner: Value, kind: type | None = None) -> Value:
        return self if owner is None else self.kept.get(owner, 1.0)

    def __set__(self, owner: Value, value: float) -> None:
        self.kept[owner] = value


class Meta(type):
    level = 1.0

    @property
    def scale(cls) -> float:
        return cls.level


NAMED: weakref.WeakValueDictionary[str, Value] = weakref.WeakValueDictionary()
NAMED["kept"] = HELD = OfClass()
KERNEL, FORWARD = F.softplus, nn.Linear.forward


class Net(nn.Module, metaclass=Meta):
    """Multiplies by a setting, read in a given way."""

    read: Callable[[Net], Value]
    of_all, options, table = Slots(), {"scale": [1.0]}, Table()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(D, D), nn.Linear(D, 3)
        self.nested = types.SimpleNamespace(a=types.SimpleNamespace(b=Slots()))
        self.slots, self.kind, self.array = Slots(), OfClass, np.ones(2)
        self.function, self.partial = factor, functools.partial(by, scale=1.0)
        self.method, self.inner = Slots().times, functools.partial(Slots().times, 1.0)
        self.tensor, self.tensors = torch.tensor(1.0), [torch.tensor(1.0)]
        self.teachers = (nn.Linear(1, 1).requires_grad_(False),)
        self.nested.layer = nn.Linear(1, 1).requires_grad_(False)
        self.distant = weakref.ref(HELD)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x))) * type(self).read(self)


SETTINGS: dict[str, tuple[Callable[[Net], Value], Callable[[Net], Value]]] = {
    "an object three deep": (
        lambda m: m.nested.a.b.scale,
        lambda m: setattr(m.nested.a.b, "scale", 3.0),
    ),
    "an object with slots": (lambda m: m.slots.scale, lambda m: setattr(m.slots, "scale", 3.0)),
    "a class": (lambda m: m.kind.scale, lambda m: setattr(OfClass, "scale", 3.0)),
    "a global bag": (lambda m: BAG.scale, lambda m: setattr(BAG, "scale", 3.0)),
    "a thread's value": (
        lambda m: getattr(LOCAL, "scale", 1.0),
        lambda m: setattr(LOCAL, "scale", 3.0),
    ),
    "a thread's value that was not there": (
        lambda m: getattr(LOCAL, "late", 1.0),
        lambda m: setattr(LOCAL, "late", 3.0),
    ),
    "what a function in an attribute reads": (
        lambda m: m.function(),
        lambda m: FACTOR.__setitem__(0, 3.0),
    ),
    "functions that a global object holds": (
        lambda m: REGISTRY.functions["last"](),
        lambda m: FACTOR.__setitem__(0, 3.0),
    ),
    "a partial function": (
        lambda m: m.partial(1.0),
        lambda m: m.partial.keywords.update(scale=3.0),
    ),
    "the object of a method": (
        lambda m: m.method(1.0),
        lambda m: setattr(m.method.__self__, "scale", 3.0),
    ),
    "the object of a partial method": (
        lambda m: m.inner(),
        lambda m: setattr(m.inner.func.__self__, "scale", 3.0),
    ),
    "a context variable": (lambda m: CONTEXT.get(), lambda m: CONTEXT.set(3.0)),
    "a closure": (lambda m: READ(), lambda m: CHANGE(3.0)),
    "a default": (lambda m: defaulting()[0], lambda m: defaulting().__setitem__(0, 3.0)),
    "an array": (lambda m: float(m.array[0]), lambda m: m.array.__setitem__(0, 3.0)),
    "a tensor's number": (lambda m: m.tensor.item(), lambda m: m.tensor.fill_(3.0)),
    "a number computed of tensors": (
        lambda m: float(m.tensors[0] * 2),
        lambda m: m.tensors[0].fill_(3.0),
    ),
    "a dictionary of the class": (
        lambda m: m.options["scale"][0],
        lambda m: Net.options["scale"].__setitem__(0, 3.0),
    ),
    "an object of the class": (
        lambda m: m.of_all.scale,
        lambda m: setattr(Net.of_all, "scale", 3.0),
    ),
    "a descriptor": (lambda m: m.table, lambda m: setattr(m, "table", 3.0)),
    "a property of the class": (lambda m: type(m).scale, lambda m: setattr(Meta, "level", 3.0)),
    "a weak reference": (lambda m: m.distant().scale, lambda m: setattr(HELD, "scale", 3.0)),
    "a weak mapping": (lambda m: NAMED["kept"].scale, lambda m: setattr(HELD, "scale", 3.0)),
    "a function of torch": (
        lambda m: F.softplus(torch.tensor(1.0)),
        lambda m: setattr(F, "softplus", torch.exp),
    ),
    "the mode of a module that is no child": (
        lambda m: 1.0 if m.teachers[0].training else 3.0,
        lambda m: m.teachers[0].eval(),
    ),
    "the weight of a module that is no child": (
        lambda m: m.teachers[0].weight[0, 0],
        lambda m: setattr(m.teachers[0], "weight", nn.Parameter(torch.full((1, 1), 3.0), False)),
    ),
    "the weight of a module in an object": (
        lambda m: m.nested.layer.weight[0, 0],
        lambda m: setattr(m.nested.layer, "weight", nn.Parameter(torch.full((1, 1), 3.0), False)),
    ),
    "a layer's setting": (lambda m: 1 / m.a.in_features, lambda m: setattr(m.a, "in_features", 8)),
    "a tensor as a number": (lambda m: float(m.tensors[0]), lambda m: m.tensors[0].fill_(3.0)),
    "a tensor computed of tensors": (lambda m: m.tensor * 2, lambda m: m.tensor.fill_(3.0)),
}


@pytest.fixture(autouse=True)
def put_back() -> Value:
    yield
    OfClass.scale = BAG.scale = FACTOR[0] = 1.0
    HELD.scale = Net.of_all.scale = Net.options["scale"][0] = Meta.level = 1.0
    F.softplus, nn.Linear.forward = KERNEL, FORWARD
    vars(LOCAL).pop("late", None)
    LOCAL.scale = 1.0
    defaulting()[0] = 1.0
    CHANGE(1.0)
    CONTEXT.set(1.0)


def built(read: Callable[[Net], Value], route: str, *example: Value) -> tuple[Any, Net, Net]:
    torch.manual_seed(0)
    model: Net = type("Model", (Net,), {"read": read})()
    twin = copy.deepcopy(model)
    options: dict[str, Value] = {"structure": "block_diagonal"}
    if route != "none":
        options["example_inputs"] = example or (torch.randn(5, D),)
    if route in ("export", "eager"):
        options["capture"] = route
    return kfac_fx.transform(model, **options), model, twin


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_changed_setting_is_followed(setting: str, route: str) -> None:
    read, change = SETTINGS[setting]
    net, model, twin = built(read, route)
    x = torch.randn(6, D)
    torch.testing.assert_close(net(x), twin(x))
    change(model), change(twin)
    torch.testing.assert_close(net(x), twin(x))
    assert not torch.equal(net(x), net.head(torch.tanh(net.a(x))))


@pytest.mark.parametrize("route", ["none", "inputs"])
def test_what_dies_during_a_capture_is_not_written(route: str) -> None:
    """The values of other instances go with them, at any moment."""
    gc.disable()
    try:
        held = OfClass()
        vars(held)["itself"] = held
        Net.table.kept[held] = 1.0
        del held
        net, _, twin = built(lambda m: m.table + 0 * gc.collect(), route)
    finally:
        gc.enable()
    x = torch.randn(6, D)
    torch.testing.assert_close(net(x), twin(x))
    assert net.curvature.route == "symbolic_trace"


@pytest.mark.parametrize("route", ROUTES)
def test_the_forward_of_a_layer_of_torch_is_replaced(route: str) -> None:
    net, _, twin = built(lambda m: 1.0, route)
    x = torch.randn(6, D)
    torch.testing.assert_close(net(x), twin(x))
    nn.Linear.forward = lambda self, x: 3 * FORWARD(self, x)  # type: ignore[method-assign]
    torch.testing.assert_close(net(x), twin(x))


@pytest.mark.parametrize("route", ["none", "inputs"])
def test_objects_that_no_code_reads_are_not_looked_at(route: str) -> None:
    """A trainer that a model knows changes in every step, and the graph goes on."""
    net, model, _ = built(lambda m: m.nested.a.b.scale, route)
    x = torch.randn(6, D)
    net(x)
    for step in range(20):
        model.nested.a.steps = step
        assert net.stands()
        net(x)


class Chooses(Net):
    def forward(self, x: Tensor, mode: Mode = Mode.LOW) -> Tensor:  # type: ignore[override]
        return self.head(torch.tanh(self.a(x))) * (3.0 if mode is Mode.HIGH else 1.0)


@pytest.mark.parametrize("given", [False, True])
def test_an_argument_that_is_compared_by_identity(given: bool) -> None:
    model = Chooses()
    twin = copy.deepcopy(model)
    x = torch.randn(6, D)
    example = {"example_inputs": (x, Mode.LOW)} if given else {}
    net = kfac_fx.transform(model, structure="block_diagonal", **example)
    assert net.curvature.route == "symbolic_trace"
    for mode in (Mode.LOW, Mode.HIGH):
        torch.testing.assert_close(net(x, mode), twin(x, mode))


class Tripled(Net):
    """Says itself what setting an attribute does."""

    def __setattr__(self, name: str, value: Value) -> None:
        super().__setattr__(name, 3 * value if name == "gain" else value)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x))) * getattr(self, "gain", 1.0)


@pytest.mark.parametrize("route", ROUTES)
def test_attributes_set_and_deleted_on_the_net(route: str) -> None:
    torch.manual_seed(0)
    model = Tripled()
    twin = copy.deepcopy(model)
    x = torch.randn(6, D)
    options: Value = {} if route == "none" else {"example_inputs": x}
    options |= {"capture": route} if route in ("export", "eager") else {}
    net = kfac_fx.transform(model, structure="block_diagonal", **options)
    net.gain = twin.gain = 2.0
    torch.testing.assert_close(net(x), twin(x))
    del net.gain, twin.gain
    torch.testing.assert_close(net(x), twin(x))
    late = nn.Linear(D, 3)
    net.add_module("late", late)
    assert model.late is late and list(net.parameters()) == list(model.parameters())
    del net.tensor, net.head
    assert not hasattr(model, "tensor") and "head" not in dict(model.named_children())


def test_a_checkpoint_around_a_net_stops_its_second_run() -> None:
    """By an exception of its own, which is no failure of the graph."""
    net, model, twin = built(lambda m: 1.0, "inputs")
    x = torch.randn(6, D)
    for run, owner in ((net, model), (twin, twin)):
        checkpoint(run, x, use_reentrant=False).square().sum().backward()
        assert all(p.grad is not None for p in owner.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
