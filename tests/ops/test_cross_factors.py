"""Cross factors of coupled layers against the definition, case by case."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from support import oracles
from support.oracles import Categorical, Measure, Normal, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")


class Tokens(nn.Module):
    """Layers on [N, T, d], with attention's mixing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(torch.softmax(h @ h.mT, -1) @ h).mean(1)


@dataclass(frozen=True)
class Case:
    """Two layers of a model and the grids on which their positions meet."""

    name: str
    template: nn.Module
    layers: tuple[str, str]
    shape: tuple[int, ...]
    grids: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    common: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        return copy.deepcopy(self.template).double()

    def pooling(self) -> tuple[Tensor, Tensor] | None:
        if not self.common:
            return None
        one, two = (oracles.averages_over_cells(grid, self.common) for grid in self.grids)
        return one, two


def convolutions(second: nn.Module, between: nn.Module) -> nn.Module:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), between, second, *head)


CASES = (
    Case("linear", nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), ("0", "2"), (4,)),
    Case("no bias", nn.Sequential(nn.Linear(4, 5, False), nn.Linear(5, 3)), ("0", "1"), (4,)),
    Case("tokens", Tokens(), ("first", "second"), (3, 4)),
    Case(
        "equal grids", convolutions(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()), ("0", "2"), (2, 4, 4)
    ),
    Case(
        "through a norm",
        convolutions(nn.Conv2d(3, 4, 1), nn.Sequential(nn.GroupNorm(1, 3), nn.ReLU())),
        ("0", "2"),
        (2, 3, 4),
    ),
    Case(
        "stride",
        convolutions(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Tanh()),
        ("0", "2"),
        (2, 6, 4),
        ((6, 4), (3, 2)),
        (3, 2),
    ),
    Case(
        "pooling",
        convolutions(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2)),
        ("0", "2"),
        (2, 4, 4),
        ((4, 4), (2, 2)),
        (2, 2),
    ),
    Case(
        "uneven cells",
        convolutions(nn.Conv2d(3, 4, 3), nn.Tanh()),
        ("0", "2"),
        (2, 5, 6),
        ((5, 6), (3, 4)),
        (3, 4),
    ),
    Case(
        "upsampling",
        convolutions(nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=2)),
        ("0", "2"),
        (2, 2, 3),
        ((2, 3), (4, 6)),
        (2, 3),
    ),
    Case(
        "flatten",
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        ("0", "3"),
        (2, 4, 4),
        ((16,), (1,)),
        (1,),
    ),
)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cross_factors(case: Case, fisher: str, measure: Measure) -> None:
    """Of every pair of kinds that can be coupled."""
    likelihood = Categorical() if fisher == "exact" else Normal()
    x = torch.randn(5, *case.shape)
    model = case.model()
    outputs = model(x)
    y = likelihood.draw(outputs.detach()) if fisher == "empirical" else None
    net = kfac_fx.transform(model, structure="block_tridiagonal")
    measured = measure(net, x, y, likelihood, fisher)
    want = oracles.cross_kronecker(model, case.layers, x, y, likelihood, fisher, case.pooling())
    close(measured.preconditioner.cross_factors[case.layers], want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_joint_moments_are_positive(case: Case, measure: Measure) -> None:
    x = torch.randn(3, *case.shape)
    pre = measure(kfac_fx.transform(case.model()), x, None, Categorical()).preconditioner
    one, two = (pre.factors[name] for name in case.layers)
    for here, there, cross in zip(one, two, pre.cross_factors[case.layers], strict=True):
        joint = torch.cat([torch.cat([here, cross], 1), torch.cat([cross.T, there], 1)])
        assert torch.linalg.eigvalsh(joint).min() >= -1e-12 * joint.trace()


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5], CASES[-1]], ids=str)
def test_reduce(case: Case, measure: Measure) -> None:
    """Positions are summed before the outer product."""
    model, x = case.model(), torch.randn(4, *case.shape)
    net = kfac_fx.transform(model, weight_sharing="reduce")
    pre = measure(net, x, None, Categorical()).preconditioner
    want = oracles.cross_kronecker(model, case.layers, x, None, Categorical(), sharing="reduce")
    close(pre.cross_factors[case.layers], want)


def test_averages_are_one_gram_matrix(measure: Measure) -> None:
    """Steps and micro-batches enter the cross factors with the weights of the factors."""
    case = CASES[0]
    model = case.model()
    net = kfac_fx.transform(model, structure="block_tridiagonal")
    x = torch.randn(12, *case.shape)
    pre = kfac_fx.Preconditioner(net, "categorical", fisher="exact", damping=1e-2)
    for step in (x[:4], x[4:]):
        for part in step.split(3):
            pre.observe(outputs := net(part))
            outputs.sum().backward()
        pre.step()
    parts = [
        oracles.cross_kronecker(model, case.layers, part, None, Categorical())
        for part in (x[:4], x[4:])
    ]
    close(pre.cross_factors[case.layers], [(a + b) / 2 for a, b in zip(*parts, strict=True)])


def test_sampled_cross_factors_have_the_exact_mean(measure: Measure) -> None:
    case = CASES[5]
    model, x = case.model(), torch.randn(4, *case.shape)
    net = kfac_fx.transform(model, structure="block_tridiagonal")
    draws = torch.stack(
        [
            measure(net, x, None, Categorical(), "sampled").preconditioner.cross_factors[
                case.layers
            ][1]
            for _ in range(400)
        ]
    )
    _, want = oracles.cross_kronecker(
        model, case.layers, x, None, Categorical(), pooling=case.pooling()
    )
    error = (draws.mean(0) - want).abs() / (draws.std(0) / 20)
    assert error.max() < 5
