"""Other tensors in the place of a module's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import kfac_fx
from kfac_fx.errors import ObservationError, StatisticsError
from kfac_fx.statistics.swap_tensors import Places


class Tied(nn.Module):
    """A weight in two places, statistics that change in place, and a buffer that is assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.norm(self.second(self.first(x)))


def test_as_functional_call() -> None:
    net, x = Tied(), torch.randn(8, 4)
    own, before = Places(net), copy.deepcopy(net.state_dict())
    state = {name: torch.randn_like(t) if t.dim() else t + 1 for name, t in own.tensors().items()}
    state["norm.running_var"] = state["norm.running_var"].abs()
    other = {name: tensor.clone() for name, tensor in state.items()}
    held = own.tensors()
    with own.swapped(state):
        found = net(x)
    torch.testing.assert_close(found, functional_call(net, other, (x,)))
    assert float(state["seen"]) == 2.0  # it was given 1, and assigned inside
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], msg=name)
    assert all(own.tensors()[name] is tensor for name, tensor in held.items())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_module_has_its_own_back_after_an_error() -> None:
    net = Tied()
    own = Places(net)
    state = {name: tensor.clone() for name, tensor in own.tensors().items()}
    weight = net.first.weight
    with pytest.raises(ZeroDivisionError), own.swapped(state):
        assert net.first.weight is net.second.weight is state["first.weight"]
        raise ZeroDivisionError
    assert net.first.weight is net.second.weight is weight


def test_what_is_not_given_stays() -> None:
    net, x = Tied(), torch.randn(8, 4)
    own, scale = Places(net), net.norm.weight
    state = {name: tensor * 2 for name, tensor in own.tensors().items() if "first" in name}
    expected = functional_call(net, state, (x,))
    with own.swapped(state):
        assert net.norm.weight is scale
        torch.testing.assert_close(net(x), expected)


def test_what_is_held_anew_is_found() -> None:
    net = Tied()
    own = Places(net)
    net.first.bias = nn.Parameter(torch.ones(4))
    assert own.tensors()["first.bias"] is net.first.bias


class Listed(nn.Module):
    """A cell that reads its weights from containers of its own, as ncps and many others do."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        weights = [nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))]
        for index, weight in enumerate(weights):
            self.register_parameter(f"weight{index}", weight)
        self.weights = {"all": kind(weights)}

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weights["all"]
        return torch.tanh(x @ weight + bias)


def test_parameters_in_containers_are_swapped_too() -> None:
    net, x = Listed(list), torch.randn(8, 4)
    own = Places(net)
    weight = net.weight0
    with own.swapped({"weight0": 2 * weight}):
        torch.testing.assert_close(net(x), torch.tanh(2 * x @ weight))
        net.weights["all"].append(weight)
    assert net.weights["all"][0] is net.weight0 is weight
    # What is held no more is left alone.
    net.weights["all"] = [nn.Parameter(torch.ones(4, 4)), net.weight1]
    with own.swapped({"weight0": 2 * weight}):
        torch.testing.assert_close(net(x), torch.tanh(x @ torch.ones(4, 4)))


def test_kfac_trains_what_is_read_from_containers() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randn(64, 4).tanh()
    net = kfac_fx.transform(Listed(list), (x,), capture="eager")
    optimizer = kfac_fx.KFAC(net, "normal")
    losses = [float(optimizer.step(x, y)) for _ in range(5)]
    assert losses[-1] < 0.9 * losses[0]


class Slopes(Listed):
    """Its parameters have no structure, so that their statistics are squared gradients."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weights["all"]
        return torch.tanh(x.unsqueeze(2) * weight.sinh()).sum(1) + bias.sinh()


@pytest.mark.parametrize("cell", [Listed, Slopes])
def test_what_no_copy_comes_to_is_an_error(cell: type[Listed]) -> None:
    """Parameters in a tuple cannot be swapped: the optimizer would stand still without a word."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randn(16, 4)
    net = kfac_fx.transform(cell(tuple), (x,), capture="eager")
    with pytest.raises((StatisticsError, ObservationError), match="lists and dictionaries"):
        kfac_fx.KFAC(net, "normal").step(x, y)


class Marked(nn.Module):
    """A weight with a word for the optimizer, as mamba marks those without decay."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.last.weight.without_decay = True

    def forward(self, x: Tensor) -> Tensor:
        if self.reads and not self.last.weight.without_decay:
            raise ValueError("a weight without its mark")
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("route", ["export", "eager"])
def test_what_is_written_on_parameters_is_on_their_copies(route: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    net = kfac_fx.transform(Marked(route == "eager"), (x,), capture=route)
    optimizer = kfac_fx.KFAC(net, "categorical")
    losses = [float(optimizer.step(x, y)) for _ in range(3)]
    assert losses[-1] < losses[0]
