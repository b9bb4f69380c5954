"""Lists, dictionaries and children in the places of those that a net was captured with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.capture.settings_read import Setting, settings_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(4, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * self.gain


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 3)
        self.options = {"scale": 1.0, "nested": {"shift": 0.0}}
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(self.block(x)) * self.options["scale"]  # type: ignore[operator]
        return h + self.options["nested"]["shift"]  # type: ignore[index]


class Untraceable(Model):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(range(x.shape[1])):  # symbolic tracing stops here
            raise ValueError
        return super().forward(x)


def same_options(model: Model) -> None:
    model.options = {"scale": 1.0, "nested": {"shift": 0.0}}


def more_options(model: Model) -> None:
    model.options = {"scale": 1.0, "nested": {"shift": 0.0}, "unread": 3}


def another_block(model: Model) -> None:
    model.block = copy.deepcopy(model.block)


def scale(model: Model) -> None:
    model.options["scale"] = 2.0


def shift(model: Model) -> None:
    model.options["nested"]["shift"] = 1.0  # type: ignore[index]


def gain(model: Model) -> None:
    model.block.gain = 0.5


CHANGES: dict[str, tuple[Callable[[Model], None], Callable[[Model], None]]] = {
    "an equal dictionary": (same_options, scale),
    "an equal dictionary, deeper": (same_options, shift),
    "a longer dictionary": (more_options, scale),
    "a longer dictionary, deeper": (more_options, shift),
    "a child": (another_block, gain),
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", [Model, Untraceable])
@pytest.mark.parametrize("change", CHANGES)
def test_what_came_later_is_looked_at_too(change: str, kind: type[Model], mode: bool) -> None:
    replace, write = CHANGES[change]
    model, x = kind(), torch.randn(5, 4)
    twin = copy.deepcopy(model)
    net = kfac_fx.transform(model, (x,))
    assert net.curvature.route == ("symbolic_trace" if kind is Model else "export")
    net.train(mode), twin.train(mode)
    for step in (replace, write):
        step(model), step(twin)
        torch.testing.assert_close(net(x), twin(x))
    # In the other mode, too, and what was replaced there was seen in the first one alone.
    net.train(not mode), twin.train(not mode)
    torch.testing.assert_close(net(x), twin(x))


@pytest.mark.parametrize("kind", [Model, Untraceable])
def test_an_old_holder_is_nobodys(kind: type[Model]) -> None:
    model, x = kind(), torch.randn(5, 4)
    net = kfac_fx.transform(model, (x,))
    for training in (True, False, True, False):
        net.train(training)
        old = model.log
        model.log = []
        old.append(1.0)
        net(x)
        assert net.stands(), training
    model.log.append(1.0)  # of the one that is there it is a change
    assert not net.stands()


class Empty:
    """Nothing is read of it, and it is gone at once."""

    __slots__ = ("gain",)


class Full:
    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain


def test_objects_made_for_the_moment_hide_no_others() -> None:
    """Some of those that are made later, and stay, are at their addresses."""
    made: list[Full] = []

    def full(_: object) -> Full:
        made.append(Full(float(len(made))))
        return made[-1]

    empty = {f"empty{i}": property(lambda _: Empty()) for i in range(20)}
    kept = {f"full{i}": functools.cached_property(full) for i in range(20)}
    kind = type("Options", (), {**empty, **kept})
    for name in kept:
        kept[name].__set_name__(kind, name)
    found = [*settings_of(kind(), "o", (*empty, *kept, "gain"), {})]
    words = [one.words for one in found if isinstance(one, Setting)]
    assert words == [f"o.{name}.gain" for name in kept]
