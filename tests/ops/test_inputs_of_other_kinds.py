"""Inputs that are no plain strided tensors: subclasses of Tensor, and sparse ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.steps import named_factors
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import kfac_fx
from kfac_fx.config import Fisher
from kfac_fx.errors import ObservationError

pytestmark = pytest.mark.usefixtures("float64")

FISHERS: list[Fisher] = ["sampled", "exact", "empirical"]


class Plain(Tensor):
    """Its results are of its own class, by the default ``__torch_function__``."""


class Mixed(nn.Module):
    """The mask comes in after the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.b = nn.Linear(6, 4)
        self.c = nn.Linear(4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)) * mask)))
        return y


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))


def factors(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> dict[str, Tensor]:
    """Of one step; the outputs are what the model itself returns."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    want = model(*inputs)
    structure = options.pop("structure", "block_diagonal")
    net = kfac_fx.transform(model, structure=structure)
    generator = torch.Generator().manual_seed(1)
    pre = kfac_fx.Preconditioner(net, "normal", generator=generator, **options)
    outputs = net(*inputs)
    assert type(outputs) is type(want)
    assert torch.equal(outputs, want)
    pre.observe(outputs, torch.zeros_like(outputs))
    (outputs**2 / 2).sum().backward()
    pre.step()
    return named_factors(pre)


def assert_same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert type(found[name]) is Tensor
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("place", [0, 1])
def test_subclasses_of_tensor_are_recorded(place: int, fisher: Fisher) -> None:
    inputs = [torch.randn(7, 5), torch.rand(7, 6)]
    want = factors(Mixed(), (inputs[0], inputs[1]), fisher=fisher)
    inputs[place] = inputs[place].as_subclass(Plain)
    assert_same(factors(Mixed(), (inputs[0], inputs[1]), fisher=fisher), want)


def test_a_convolution_of_a_subclass_is_recorded() -> None:
    x = torch.randn(7, 1, 4, 4)
    want = factors(convolution(), (x,))
    assert_same(factors(convolution(), (x.as_subclass(Plain),)), want)


STRUCTURES = ["block_diagonal", "block_tridiagonal"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_layer_of_a_sparse_input_is_recorded(
    layout: torch.layout, bias: bool, fisher: Fisher, structure: str
) -> None:
    x = torch.randn(7, 5).relu()
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 1))
    want = factors(model, (x,), fisher=fisher, structure=structure)
    sparse = x.to_sparse(layout=layout)
    assert_same(factors(model, (sparse,), fisher=fisher, structure=structure), want)


def test_layers_of_one_sparse_input_are_recorded() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 6)
            self.b = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a(x)) * self.b(x)

    x = torch.randn(7, 5).relu()
    assert_same(factors(Two(), (x.to_sparse(),)), factors(Two(), (x,)))


def test_a_wrapper_subclass_is_refused_at_observe() -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)))
    pre = kfac_fx.Preconditioner(net, "normal")
    x = torch.randn(7, 5)
    outputs = net(TwoTensor(x, x.clone()))
    with pytest.raises(ObservationError, match=r"TwoTensor, a subclass of torch.Tensor"):
        pre.observe(outputs)


class Turned(nn.Module):
    """One layer reads the batch as it is, the other one transposed; both have one shape."""

    def __init__(self, hidden: bool, width: int = 6) -> None:
        super().__init__()
        self.a = nn.Linear(5, width)
        self.b = nn.Linear(5, width)
        self.d = nn.Linear(width, 1)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.tanh(x.t()) if self.hidden else x.t()
        y: Tensor = self.d(torch.tanh(self.a(x) + self.b(turned)))
        return y


@pytest.mark.parametrize("width", [5, 6])
@pytest.mark.parametrize("fisher", FISHERS)
def test_rows_of_a_transposed_batch_count_as_cases(fisher: Fisher, width: int) -> None:
    x = torch.randn(5, 5)
    found = factors(Turned(hidden=False, width=width), (x,), fisher=fisher)
    rows = torch.cat([x.t(), torch.ones(5, 1)], 1)
    torch.testing.assert_close(found["b/0"], rows.T @ rows / 5)
    # Both layers' results are added up, so their derivatives are the same rows.
    torch.testing.assert_close(found["b/1"], found["a/1"])


def test_a_statistic_of_another_shape_is_refused_at_observe() -> None:
    net = kfac_fx.transform(Turned(hidden=True))
    pre = kfac_fx.Preconditioner(net, "normal")
    outputs = net(torch.randn(5, 5))
    with pytest.raises(ObservationError, match=r"of 'b' has the shape.*leave its parameters out"):
        pre.observe(outputs)
