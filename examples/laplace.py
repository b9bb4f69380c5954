"""A Laplace approximation of a small classifier's posterior, by K-FAC and by the dense GGN.

The weights are those of a trained network; their posterior is N(w, (sum of F + delta I)^-1), F the
Fisher of the data and delta the precision of the prior (MacKay, "A Practical Bayesian Framework for
Backpropagation Networks", 1992; Ritter, Botev and Barber, "A Scalable Laplace Approximation for
Neural Networks", 2018). For a softmax the generalised Gauss-Newton matrix (GGN) is the Fisher.
Shown are the log evidence as a function of delta, and how the variance of the logits grows away
from the data, both beside those of the dense matrix, which a network of this size still allows.

    python examples/laplace.py
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kfac_fx

PRECISIONS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def moons(cases: int) -> tuple[Tensor, Tensor]:
    """Return two half circles [cases, 2] that reach into each other, and their classes."""
    y = torch.arange(cases) % 2
    angle = math.pi * torch.rand(cases)
    x = torch.stack([angle.cos() + y - 0.5, angle.sin() * (1 - 2 * y) + 0.5 * y - 0.25], 1)
    return x + 0.15 * torch.randn(cases, 2), y


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, precision: float) -> None:
    """Minimise the negative log posterior, with the prior's precision as weight decay."""
    net = kfac_fx.transform(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    preconditioner = kfac_fx.Preconditioner(net, "categorical", damping=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = net(x)
        preconditioner.observe(outputs)
        prior = sum(p.square().sum() for p in model.parameters())
        (F.cross_entropy(outputs, y) + 0.5 * precision / len(x) * prior).backward()
        preconditioner.step()
        optimizer.step()


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Return the derivatives of the outputs, [cases, outputs, parameters]."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = jacrev(lambda given: functional_call(model, given, (x,)))(parameters)
    return torch.cat([part.flatten(2) for part in found.values()], 2)


def dense_ggn(model: nn.Module, x: Tensor) -> Tensor:
    """Return the sum over cases of J^T (diag(p) - p p^T) J."""
    J, p = jacobian(model, x), model(x).softmax(-1).detach()
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("nip,nij,njq->pq", J, H, J)


def log_evidence(fit: float, weights: Tensor, logdet: float, precision: float) -> float:
    """Return the log evidence of Laplace's method.

    Args:
        fit: the log-likelihood of the data.
        weights: all weights as one vector.
        logdet: log det of the posterior's precision.
        precision: delta.
    """
    n = len(weights)
    prior = 0.5 * n * math.log(precision) - 0.5 * precision * float(weights.square().sum())
    return fit + prior - 0.5 * logdet


def main(quick: bool) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, y = moons(60 if quick else 200)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    train(model, x, y, 30 if quick else 200, 0.3)
    fit = -float(F.cross_entropy(model(x), y, reduction="sum"))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])

    net = kfac_fx.transform(model)
    batches = list(zip(x.split(50), y.split(50), strict=True))
    curvature = kfac_fx.estimate(net, batches, "categorical", fisher="exact")
    ggn = dense_ggn(model, x)
    eye = torch.eye(len(ggn))
    cases = int(curvature.terms)
    print(f"{cases} cases, {len(weights)} weights, log-likelihood {fit:.2f}")
    print(f"{'precision':>9} {'evidence, K-FAC':>16} {'evidence, GGN':>14}")
    for precision in PRECISIONS:
        operator = curvature.operator(precision, scale="sum")
        kron = log_evidence(fit, weights, float(operator.logdet()), precision)
        dense = log_evidence(fit, weights, float(torch.logdet(ggn + precision * eye)), precision)
        print(f"{precision:9.2f} {kron:16.2f} {dense:14.2f}")

    # The variance of the outputs at a point is J Sigma J^T.
    posterior, dense_posterior = curvature.operator(0.3, scale="sum"), ggn + 0.3 * eye
    print(f"{'distance':>9} {'deviation, K-FAC':>16} {'deviation, GGN':>14}")
    for distance in (0.0, 1.0, 2.0, 4.0):
        J = jacobian(model, torch.tensor([[0.5, 0.0]]) + torch.tensor([[0.0, distance]]))[0]
        kron = (J @ posterior.solve(J.T)).diagonal().mean().sqrt()
        dense = (J @ torch.linalg.solve(dense_posterior, J.T)).diagonal().mean().sqrt()
        print(f"{distance:9.1f} {float(kron):16.3f} {float(dense):14.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases and steps")
    main(parser.parse_args().quick)
