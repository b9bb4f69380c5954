"""Code that a model reaches through helpers: what it reads is compared, what it writes is heard."""

from __future__ import annotations

import functools
import logging
import os
import random
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError

Value = Any

SCALE = 1.0
"""A setting of this module that helpers read."""
steps = 0
generator = random.Random(0)
logger = logging.getLogger("tests.reached_code")


class Helper:
    factor = 1.0
    table: ClassVar = {"scale": 1.0}
    calls = 0

    def __init__(self) -> None:
        self.own = 1.0

    def by_global(self) -> float:
        return SCALE

    def by_class(self) -> float:
        return self.factor

    def by_table(self) -> float:
        return self.table["scale"]

    @staticmethod
    def static() -> float:
        return SCALE

    @classmethod
    def of_class(cls) -> float:
        return cls.factor

    @property
    def read(self) -> float:
        return self.factor * SCALE

    def __call__(self) -> float:
        return SCALE

    def __getitem__(self, _: int) -> float:
        return self.factor

    def counted(self) -> float:
        type(self).calls += 1
        return float(self.calls)

    def stepped(self) -> float:
        return stepped()


class Holder:
    """Knows a helper, and a setting that is seven objects deep."""

    def __init__(self) -> None:
        self.helper = Helper()
        inner: Value = types.SimpleNamespace(scale=1.0)
        for _ in range(5):
            inner = types.SimpleNamespace(inner=inner)
        self.inner = inner


def stepped() -> float:
    global steps
    steps += 1
    return float(steps)


def by_call() -> float:
    return stepped()


def marked() -> float:
    marked.count = getattr(marked, "count", 0) + 1  # type: ignore[attr-defined]
    return float(marked.count)  # type: ignore[attr-defined]


@functools.lru_cache
def cached() -> Helper:
    return Helper()


def made() -> float:
    return Helper().by_global()


HELPER = Helper()
REGISTRY = {"made": made}


class Model(nn.Module):
    def __init__(self, ask: Callable[[Model], float]) -> None:
        super().__init__()
        self.layer, self.ask = nn.Linear(3, 2), ask
        self.helper, self.holder = Helper(), Holder()
        self.method = Helper().by_class
        self.settings = {"a": {"b": {"c": {"d": {"e": 1.0}}}}}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.ask(self)


def set_global(_: Model) -> None:
    global SCALE
    SCALE = 0.5


def set_class(_: Model) -> None:
    Helper.factor = 0.5


def set_table(_: Model) -> None:
    Helper.table["scale"] = 0.5


def set_environment(_: Model) -> None:
    os.environ["TESTS_REACHED"] = "0.5"


READ: dict[str, tuple[Callable[[Model], float], Callable[[Model], None]]] = {
    "method of an attribute": (lambda m: m.helper.by_global(), set_global),
    "class of an attribute": (lambda m: m.helper.by_class(), set_class),
    "table of its class": (lambda m: m.helper.by_table(), set_table),
    "property": (lambda m: m.helper.read, set_global),
    "call": (lambda m: m.helper(), set_global),
    "operator": (lambda m: m.helper[0], set_class),
    "bound method": (lambda m: m.method(), set_class),
    "object in an object": (lambda m: m.holder.helper.by_global(), set_global),
    "global object": (lambda m: HELPER.by_table(), set_table),
    "static method": (lambda m: Helper.static(), set_global),
    "class method": (lambda m: Helper.of_class(), set_class),
    "object that is made": (lambda m: made(), set_global),
    "registry": (lambda m: REGISTRY["made"](), set_global),
    "cached object": (lambda m: cached().by_class(), set_class),
    "objects within objects": (
        lambda m: m.holder.inner.inner.inner.inner.inner.inner.scale,
        lambda m: setattr(m.holder.inner.inner.inner.inner.inner.inner, "scale", 0.5),
    ),
    "containers within containers": (
        lambda m: m.settings["a"]["b"]["c"]["d"]["e"],
        lambda m: m.settings["a"]["b"]["c"]["d"].__setitem__("e", 0.5),
    ),
    "environment": (lambda m: float(os.environ.get("TESTS_REACHED", "1")), set_environment),
    "getenv": (lambda m: float(os.getenv("TESTS_REACHED", "1")), set_environment),
    "logger": (
        lambda m: 0.5 if logger.isEnabledFor(logging.DEBUG) else 1.0,
        lambda m: logger.setLevel(logging.DEBUG),
    ),
}

WRITTEN: dict[str, tuple[Callable[[Model], float], str]] = {
    "global of a function": (lambda m: stepped(), "the global steps"),
    "two calls deep": (lambda m: by_call(), "the global steps"),
    "by a method": (lambda m: m.helper.stepped(), "the global steps"),
    "class of an attribute": (lambda m: m.helper.counted(), "Helper"),
    "class of a global": (lambda m: HELPER.counted(), "Helper"),
    "attribute of a function": (lambda m: marked(), "marked.count"),
    "generator": (lambda m: drawn(), "the global generator"),
}


def drawn() -> float:
    return generator.random()


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    global SCALE, steps
    SCALE, steps = 1.0, 0
    Helper.factor, Helper.calls = 1.0, 0
    Helper.table["scale"] = 1.0
    marked.__dict__.clear()
    os.environ.pop("TESTS_REACHED", None)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("route", ["none", "auto", "export"])
@pytest.mark.parametrize("way", READ)
def test_a_setting_that_a_helper_reads_is_followed(way: str, route: str) -> None:
    ask, change = READ[way]
    model, x = Model(ask), torch.randn(5, 3)
    if route == "none":
        net = kfac_fx.transform(model)
    else:
        net = kfac_fx.transform(model, x, capture="export" if route == "export" else "auto")
    assert torch.equal(net(x), model.layer(x))
    change(model)
    assert ask(model) == 0.5
    torch.testing.assert_close(net(x), model.layer(x) * 0.5)


@pytest.mark.parametrize("way", WRITTEN)
def test_what_a_helper_writes_is_heard_and_put_back(way: str) -> None:
    ask, words = WRITTEN[way]
    before = generator.getstate()
    with pytest.raises(CaptureError, match=f"{words}.*which a graph would not do again"):
        kfac_fx.transform(Model(ask))
    assert (steps, Helper.calls, vars(marked)) == (0, 0, {})
    assert generator.getstate() == before
