"""Influence functions by EKFAC: which training cases made a network say what it says.

The influence of a training case z on the loss of a query q is -grad(q)^T (F + lambda I)^-1 grad(z)
(Koh and Liang, "Understanding Black-box Predictions via Influence Functions", 2017; with EKFAC:
Grosse et al., "Studying Large Language Model Generalization with Influence Functions", 2023). A
tenth of the training labels is wrong here: wrong labels should hurt the queries most, and do.

    python examples/influence.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import kfac_fx

WRONG = 0.1


def data(cases: int) -> tuple[Tensor, Tensor]:
    """Return three clouds of points [cases, 4] and their classes."""
    y = torch.arange(cases) % 3
    return 2.0 * F.one_hot(y, 4) + torch.randn(cases, 4), y


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Minimise the cross entropy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def case_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of every case's loss, [cases, parameters]."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given: dict[str, Tensor], case: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, given, (case.unsqueeze(0),)), label[None])

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def influences(model: nn.Module, x: Tensor, y: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
    """Return how much each training case lowers the loss of each query, [queries, cases]."""
    net = kfac_fx.transform(model, structure="block_diagonal", ekfac=True)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    curvature = kfac_fx.estimate(net, batches, "categorical", fisher="exact", ekfac=True)
    # A tenth of each block's mean eigenvalue: layers differ in scale, so one number would not do.
    damping = {name: 0.1 * float(values.mean()) for name, values in curvature.eigenvalues.items()}
    operator = curvature.operator(damping)
    return case_gradients(model, queries, labels) @ operator.solve(case_gradients(model, x, y).T)


def main(quick: bool) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, right = data(90 if quick else 600)
    wrong = torch.rand(len(x)) < WRONG
    y = torch.where(wrong, (right + 1) % 3, right)
    queries, labels = data(60 if quick else 300)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))
    train(model, x, y, 60 if quick else 300)
    scores = influences(model, x, y, queries, labels).mean(0)
    worst = scores.argsort()[: int(wrong.sum())]
    found = float(wrong[worst].double().mean())
    print(f"{len(x)} cases, {int(wrong.sum())} labels wrong, {len(queries)} queries")
    means = float(scores[~wrong].mean()), float(scores[wrong].mean())
    print(f"mean influence: right labels {means[0]:+.4f}, wrong ones {means[1]:+.4f}")
    print(f"of the {len(worst)} most harmful cases {found:.0%} are wrong, by chance {WRONG:.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases and steps")
    main(parser.parse_args().quick)
