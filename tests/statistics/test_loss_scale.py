"""The factor between a loss and the summed negative log-likelihood, from its derivatives."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.likelihoods.builtin import Categorical, Normal
from kfac_fx.statistics.loss_scale import COMPARED, LossScale

CASES, CLASSES = 64, 512
assert CASES * CLASSES > 4 * COMPARED, "a part of the cases is compared"


def scale_of(weights: Tensor, targets: Tensor, c: float) -> float:
    """Of c times the weighted sum of the cases' losses."""
    torch.manual_seed(0)
    outputs = torch.randn(CASES, CLASSES, dtype=torch.float64, requires_grad=True)
    losses = F.cross_entropy(outputs, targets, reduction="none")
    (seen,) = torch.autograd.grad((c * weights * losses).sum(), outputs)
    compare = LossScale(Categorical(), outputs, targets, float((targets >= 0).sum()))
    return compare({0: seen})


@pytest.mark.parametrize("c", [1.0, 1 / CASES, 1e-6, 65536.0])
def test_any_reduction(c: float) -> None:
    """Any factor between the loss and the sum is found."""
    ones = torch.ones(CASES, dtype=torch.float64)
    assert scale_of(ones, torch.randint(CLASSES, (CASES,)), c) == pytest.approx(c, rel=1e-12)


def test_all_cases_where_those_compared_do_not_count() -> None:
    targets = torch.randint(CLASSES, (CASES,))
    targets[torch.arange(CASES) != 3] = -100
    ones = torch.ones(CASES, dtype=torch.float64)
    assert scale_of(ones, targets, 0.25) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(("c", "expected"), [(1.0, 1.0), (1 / CASES, 1 / CASES)])
def test_another_loss_is_named(caplog: pytest.LogCaptureFixture, c: float, expected: float) -> None:
    """It counts as a sum or as a mean, whatever is nearer."""
    weights = torch.rand(CASES, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        assert scale_of(weights, torch.randint(CLASSES, (CASES,)), c) == expected
    assert "not proportional" in caplog.text


def test_outputs_without_dimensions() -> None:
    output = torch.tensor(2.0, requires_grad=True)

    class Scalar(Normal):
        def distribution(self, outputs: Tensor) -> torch.distributions.Distribution:
            return torch.distributions.Normal(outputs, 1.0)

    assert LossScale(Scalar(), output, torch.tensor(0.5), 1.0)({0: torch.tensor(3.0)}) == 2.0


def test_a_loss_that_hides_the_outputs() -> None:
    net = kfac_fx.transform(nn.Linear(3, 2))
    pre = kfac_fx.Preconditioner(net, fisher="empirical")
    x, y = torch.randn(8, 3), torch.randint(2, (8,))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = net(x)
        return outputs, F.cross_entropy(outputs, y)

    outputs, loss = torch.compile(forward, backend="aot_eager")(x)
    pre.observe(outputs, y)
    loss.backward()
    with pytest.raises(kfac_fx.errors.ObservationError, match="TrainingStep"):
        pre.step()
