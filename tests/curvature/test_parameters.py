"""The parameters that the curvature covers: found by name, and noticed when they are others."""

from __future__ import annotations

import copy

import pytest
import torch
from support.networks import mlp
from torch import nn

import kfac_fx
from kfac_fx.curvature.parameters import CoveredParameters, transformed
from kfac_fx.errors import KFACError, ParameterChangedError, UnknownOptionError

NAMES = ["0.weight", "0.bias", "2.weight"]


@pytest.fixture
def net() -> nn.Sequential:
    return mlp(4, 5, 3)


@pytest.fixture
def covered(net: nn.Module) -> CoveredParameters:
    return CoveredParameters(net, NAMES)


def test_they_are_the_module_s_own_in_the_order_given(net: nn.Module) -> None:
    turned = CoveredParameters(net, NAMES[::-1])
    assert list(turned.parameters) == NAMES[::-1]
    assert all(turned.parameters[name] is net.get_parameter(name) for name in NAMES)
    assert list(turned.in_module_order()) == NAMES


def test_gradients_are_those_that_there_are(net: nn.Module, covered: CoveredParameters) -> None:
    """The uncovered bias of the last layer has one too; the first layer's bias has none."""
    assert covered.gradients() == {}
    net(torch.randn(2, 4)).sum().backward()
    net[0].bias.grad = None
    found = covered.gradients()
    assert list(found) == ["0.weight", "2.weight"]
    assert all(found[name] is net.get_parameter(name).grad for name in found)


def test_sparse_gradients_become_dense_in_their_place() -> None:
    table = nn.Embedding(7, 3, sparse=True)
    table(torch.tensor([1, 1, 4])).sum().backward()
    want = table.weight.grad.to_dense()
    (found,) = CoveredParameters(table, ["weight"]).gradients().values()
    assert found is table.weight.grad and found.layout is torch.strided
    assert torch.equal(found, want)


def replaced(net: nn.Sequential) -> None:
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())


def removed(net: nn.Sequential) -> None:
    del net[2].weight


def reshaped(net: nn.Sequential) -> None:
    net[2].weight.data = torch.randn(3, 6)


def cast(net: nn.Sequential) -> None:
    net[2].weight.data = net[2].weight.data.double()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced, "was replaced by another object"),
        (removed, "was replaced by another object"),
        (reshaped, r"changed its shape from \(3, 5\) to \(3, 6\)"),
        (cast, "changed its dtype from torch.float32 to torch.float64"),
    ],
)
def test_a_parameter_that_changed_is_named(
    net: nn.Sequential, covered: CoveredParameters, change: object, said: str
) -> None:
    covered.check()
    change(net)
    with pytest.raises(ParameterChangedError, match=f"parameter 2.weight {said}"):
        covered.check()


def test_new_values_in_the_same_place_are_no_change(
    net: nn.Module, covered: CoveredParameters
) -> None:
    net.load_state_dict(copy.deepcopy(mlp(4, 5, 3).state_dict()))
    covered.check()


def test_the_structure_is_the_transform_s_own_or_a_smaller_one() -> None:
    net = kfac_fx.transform(mlp(4, 5, 3), structure="block_tridiagonal")
    assert transformed(net, None) == (net.curvature, "block_tridiagonal")
    assert transformed(net, "block_diagonal") == (net.curvature, "block_diagonal")
    diagonal = kfac_fx.transform(mlp(4, 5, 3), structure="block_diagonal")
    assert transformed(diagonal, None)[1] == "block_diagonal"
    with pytest.raises(UnknownOptionError, match="records no cross factors"):
        transformed(diagonal, "block_tridiagonal")


def test_a_module_that_was_not_transformed_is_refused() -> None:
    with pytest.raises(KFACError, match="no module that"):
        transformed(mlp(4, 5, 3), None)
