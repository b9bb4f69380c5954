"""One parameter used several times: uses are extra positions of one block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import Bernoulli, Categorical, Measure, Normal, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(torch.tanh(self.branch(left)) * torch.tanh(self.branch(right)))


@both_fishers
def test_siamese(measure: Measure, fisher: str) -> None:
    """One layer in two branches."""
    model, x, likelihood = Siamese(), (torch.randn(5, 4), torch.randn(5, 4)), Categorical()
    y = likelihood.draw(model(*x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    close(factors["branch"], oracles.kronecker(model, ["branch"], x, y, likelihood, fisher))
    close(factors["out"], oracles.kronecker(model, ["out"], x, y, likelihood, fisher))


class Uneven(nn.Module):
    """Two uses with different numbers of positions: three tokens, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x)).mean(1) + torch.tanh(self.fc(x.mean(1))))


@both_fishers
def test_uses_with_different_positions(measure: Measure, fisher: str) -> None:
    model, x, likelihood = Uneven(), torch.randn(5, 3, 4), Normal()
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    close(factors["fc"], oracles.kronecker(model, ["fc"], x, y, likelihood, fisher))


class Recurrent(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.cell, self.out = nn.Linear(2 + 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0, :1]).expand(-1, 3)
        for time in range(self.steps):
            state = torch.tanh(self.cell(torch.cat([x[:, time], state], dim=-1)))
        return self.out(state)


@both_fishers
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_recurrent_cell(measure: Measure, steps: int, fisher: str) -> None:
    """One cell in a loop of one to four steps."""
    model, x, likelihood = Recurrent(steps), torch.randn(5, 4, 2), Bernoulli()
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    close(factors["cell"], oracles.kronecker(model, ["cell"], x, y, likelihood, fisher))


def shared_module() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


@both_fishers
@pytest.mark.parametrize("shape", [(5, 4), (4, 2, 4)], ids=["vectors", "tokens"])
def test_module_called_twice(measure: Measure, shape: tuple[int, ...], fisher: str) -> None:
    model, x, likelihood = shared_module(), torch.randn(shape), Categorical()
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    assert set(factors) == {"0", "4"}
    close(factors["0"], oracles.kronecker(model, ["0"], x, y, likelihood, fisher))


class SharedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        return self.out(x.mean((2, 3)))


@both_fishers
def test_convolution_called_twice(measure: Measure, fisher: str) -> None:
    model, x, likelihood = SharedConv(), torch.randn(3, 2, 4, 5), Normal()
    y = likelihood.draw(model(x))
    factors = measure(kfac_fx.transform(model), x, y, likelihood, fisher).factors
    close(factors["conv"], oracles.kronecker(model, ["conv"], x, y, likelihood, fisher))


class TiedByModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedByFunction(TiedByModules):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.first.weight))
        return self.out(torch.tanh(x @ self.first.weight.T))


@both_fishers
def test_weight_tied_between_modules(measure: Measure, fisher: str) -> None:
    model, x, likelihood = TiedByModules(), torch.randn(5, 4), Categorical()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    (name,) = (n for n, b in net.curvature.blocks.items() if "first.weight" in b.parameters)
    found = measure(net, x, y, likelihood, fisher).factors[name]
    close(found, oracles.kronecker(model, ["first", "second"], x, y, likelihood, fisher))


def test_weight_tied_between_functions(measure: Measure) -> None:
    reference, x, likelihood = TiedByModules(), torch.randn(5, 4), Categorical()
    model = TiedByFunction()
    model.load_state_dict(reference.state_dict())
    net = kfac_fx.transform(model)
    (name,) = (n for n, b in net.curvature.blocks.items() if "first.weight" in b.parameters)
    found = measure(net, x, None, likelihood).factors[name]
    close(found, oracles.kronecker(reference, ["first", "second"], x, None, likelihood))


class TiedAutoencoder(nn.Module):
    """W and its transpose: the roles of input and output change sides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T) @ self.weight


def test_weight_and_its_transpose(measure: Measure) -> None:
    """One block: the sum of both uses' Kronecker products, each on its own sides."""
    model = TiedAutoencoder()
    net = kfac_fx.transform(model)
    (block,) = net.curvature.blocks.values()
    assert tuple(block.parameters) == ("weight",)
    assert block.approximation == "kronecker_sum"
    factors = measure(net, torch.randn(5, 4), None, Normal()).factors
    assert model.weight.grad.isfinite().all()
    assert all(factor.isfinite().all() for factor in factors["weight"])


class LinearThenNorm(nn.Module):
    """A normalisation layer called twice: its covariance is of the whole per-case gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.tanh(self.fc(self.norm(x)))))


@both_fishers
def test_norm_called_twice(measure: Measure, fisher: str) -> None:
    model, x, likelihood = LinearThenNorm(), torch.randn(5, 4), Categorical()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model)
    found = measure(net, x, y, likelihood, fisher).factors["norm"]
    names = ["norm.weight", "norm.bias"]
    if net.curvature.blocks["norm"].reason is None:
        close(found, (oracles.covariance(model, names, x, y, likelihood, fisher),))
    else:
        assert "uncorrelated" in net.curvature.blocks["norm"].reason


def test_duplicated_batch(measure: Measure) -> None:
    """Twice the same cases are the same mean."""
    net, likelihood, x = kfac_fx.transform(shared_module()), Categorical(), torch.randn(5, 4)
    want = measure(net, x, None, likelihood).factors["0"]
    close(measure(net, torch.cat([x, x]), None, likelihood).factors["0"], want)
