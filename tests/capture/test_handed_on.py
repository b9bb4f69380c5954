"""A net answers for its model: methods, properties and plain attributes, read and set."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import kfac_fx
from kfac_fx.errors import ObservationError


class Encoder(nn.Module):
    power = 2

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.slope = nn.Linear(3, 4), nn.Linear(4, 2), 1.0
        self.config = {"use_cache": True}
        self.kept: list[float] = []

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.slope * self.inner(x))

    @property
    def width(self) -> int:
        return self.inner.out_features

    @property
    def steepness(self) -> float:
        return 10 * self.slope

    @steepness.setter
    def steepness(self, value: float) -> None:
        self.slope = value / 10

    def freeze(self) -> None:
        self.inner.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.encode(x)) * self.power


Route = Literal["auto", "symbolic_trace", "export", "eager"]
ROUTES: tuple[Route, ...] = ("auto", "symbolic_trace", "export", "eager")


def built(route: Route) -> tuple[Encoder, fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(5, 3)
    return model, kfac_fx.transform(model, x, capture=route), x


@pytest.mark.parametrize("route", ROUTES)
def test_methods_and_attributes_are_the_models(route: Route) -> None:
    model, net, x = built(route)
    assert torch.equal(net.encode(x), model.encode(x))
    assert (net.width, net.slope, net.power) == (4, 1.0, 2)
    net.freeze()
    assert not model.inner.weight.requires_grad and model.outer.weight.requires_grad
    assert "encode" in dir(net)
    with pytest.raises(AttributeError, match="nothing"):
        _ = net.nothing
    assert net.kept is model.kept
    # Trainers write into a config that they find.
    assert not hasattr(net, "config")
    # What the net has itself is its own.
    assert net.curvature.blocks and not hasattr(model, "curvature")


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_set_is_set_where_the_forward_reads_it(route: Route) -> None:
    """A default of the class once was set on the net alone, and changed nothing."""
    model, net, x = built(route)
    net.power = 3
    assert (net.power, model.power, Encoder.power) == (3, 3, 2)
    torch.testing.assert_close(net(x), model(x))
    net.steepness = 20.0
    assert (net.slope, model.slope, net.steepness) == (2.0, 2.0, 20.0)
    torch.testing.assert_close(net(x), model.outer(model.encode(x)) * 3)


@pytest.mark.parametrize("route", ROUTES)
def test_copies_answer_for_their_own_model(route: Route) -> None:
    _, net, x = built(route)
    copied = copy.deepcopy(net)
    copied.slope = 2.0
    assert (net.slope, copied.slope) == (1.0, 2.0)
    assert not torch.equal(copied.encode(x), net.encode(x))


@pytest.mark.parametrize("route", ROUTES)
def test_a_method_is_not_recorded(route: Route) -> None:
    """Statistics are of calls of the net: outputs of a method are refused, not left out."""
    _, net, x = built(route)
    preconditioner = kfac_fx.Preconditioner(net)
    outputs = net.encode(x)
    with pytest.raises(ObservationError, match="not computed by the transformed module"):
        preconditioner.observe(outputs)
    outputs = net(x)
    preconditioner.observe(outputs)
    F.cross_entropy(outputs, torch.zeros(5, dtype=torch.long)).backward()
    preconditioner.step()
