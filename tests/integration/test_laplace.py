"""Laplace approximations against laplace-torch, which has its factors from BackPACK.

Both are by Kronecker products of the same Fisher. laplace-torch takes biases for blocks of their
own, and kfac_fx has them in one block with their weights: end to end the two are compared without
biases, and with them on the factors of kfac_fx.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kfac_fx

pytestmark = pytest.mark.integration

CASES, OUTPUTS, BATCH = 60, 3, 20
LIKELIHOODS = {"categorical": "classification", "normal": "regression"}


def laplace_module(name: str) -> ModuleType:
    """Return a module of laplace-torch; skip the test where it is not installed."""
    if importlib.util.find_spec("laplace") is None:
        pytest.skip("laplace-torch is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        # torchmetrics imports it where it is there, and beside a CPU build of torch it needs help.
        from zoo import torchvision_import  # noqa: F401
    return importlib.import_module(f"laplace.{name}")


def problem(likelihood: str, bias: bool) -> tuple[nn.Module, TensorDataset]:
    """Return a small network in float64, and cases for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias), nn.Tanh(), nn.Linear(6, OUTPUTS, bias)).double()
    x = torch.randn(CASES, 4, dtype=torch.float64)
    if likelihood == "categorical":
        return model, TensorDataset(x, torch.randint(OUTPUTS, (CASES,)))
    return model, TensorDataset(x, torch.randn(CASES, OUTPUTS, dtype=torch.float64))


def evidence(fit: Tensor, weights: Tensor, logdet: Tensor, precision: float) -> Tensor:
    """Return the log evidence of Laplace's method with N(0, I / precision) before the data."""
    prior = len(weights) * torch.tensor(precision, dtype=torch.float64).log()
    return fit - 0.5 * (precision * weights.square().sum() + logdet - prior)


@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
def test_evidence_and_variances_are_those_of_laplace_torch(likelihood: str) -> None:
    """Nothing but the model, the data and the prior is shared."""
    backpack = laplace_module("curvature.backpack")
    from laplace import KronLaplace

    model, cases = problem(likelihood, bias=False)
    loader = DataLoader(cases, BATCH)
    net = kfac_fx.transform(model, structure="block_diagonal")
    fisher = kfac_fx.estimate(net, loader, likelihood, fisher="exact")
    theirs = KronLaplace(model, LIKELIHOODS[likelihood], backend=backpack.BackPackGGN)
    theirs.fit(loader)

    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    x = cases.tensors[0][:5]
    jacobians = torch.stack([jacobian(model, case) for case in x])
    for precision in (0.1, 1.0, 10.0):
        posterior = fisher.operator(precision, scale="sum")
        want = theirs.log_marginal_likelihood(torch.tensor([precision], dtype=torch.float64))
        found = evidence(theirs.log_likelihood.detach(), weights, posterior.logdet(), precision)
        torch.testing.assert_close(found, want.detach(), rtol=0, atol=1e-6)
        variance = torch.stack([J @ posterior.solve(J.T) for J in jacobians])
        torch.testing.assert_close(
            variance, theirs.functional_variance(jacobians).detach(), rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
def test_evidence_of_joint_blocks_is_that_of_laplace_torch_on_the_same_factors(
    likelihood: str,
) -> None:
    """Its Kron takes A with the bias' row and column as any other factor."""
    backpack = laplace_module("curvature.backpack")
    matrices = laplace_module("utils.matrix")
    from laplace import KronLaplace

    model, cases = problem(likelihood, bias=True)
    loader = DataLoader(cases, BATCH)
    net = kfac_fx.transform(model, structure="block_diagonal")
    fisher = kfac_fx.estimate(net, loader, likelihood, fisher="exact")
    theirs = KronLaplace(model, LIKELIHOODS[likelihood], backend=backpack.BackPackGGN)
    theirs.fit(loader)
    pairs = [[fisher.terms * G, A] for A, G in fisher.factors.values()]
    assert [tuple(len(one) for one in pair) for pair in pairs] == [(6, 5), (OUTPUTS, 7)]
    theirs.H_facs = matrices.Kron(pairs)
    theirs.H = theirs.H_facs.decompose()

    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    for precision in (0.1, 1.0, 10.0):
        logdet = fisher.operator(precision, scale="sum").logdet()
        want = theirs.log_marginal_likelihood(torch.tensor([precision], dtype=torch.float64))
        found = evidence(theirs.log_likelihood.detach(), weights, logdet, precision)
        torch.testing.assert_close(found, want.detach(), rtol=0, atol=1e-6)


def jacobian(model: nn.Module, case: Tensor) -> Tensor:
    """Return the derivatives of the outputs of one case, [outputs, parameters]."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in model(case)]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
