"""Other tensors in the place of a module's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

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
