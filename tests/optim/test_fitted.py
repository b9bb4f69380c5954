"""A fit is kept while training goes on, and left for another where the data want it.

Steps come to rest where rounding is all that is left, and not where a gradient says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim

import kfac_fx

CASES, BATCH = 512, 128


def digits() -> tuple[Tensor, Tensor]:
    inputs, targets = load_digits(return_X_y=True)
    return torch.tensor(inputs[:CASES]).float() / 16, torch.tensor(targets[:CASES])


def with_rate(model: nn.Module, net: nn.Module) -> Callable[[Tensor, Tensor], object]:
    """README's loop, at a rate at which steps have to be cut at first."""
    optimizer = optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    preconditioner = kfac_fx.Preconditioner(net)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        outputs = net(x)
        preconditioner.observe(outputs)
        F.cross_entropy(outputs, y).backward()
        preconditioner.step()
        optimizer.step()

    return step


def without(model: nn.Module, net: nn.Module) -> Callable[[Tensor, Tensor], object]:
    return kfac_fx.KFAC(net).step


@pytest.mark.parametrize("method", [with_rate, without])
def test_a_fit_is_kept(method: Callable[..., Callable[[Tensor, Tensor], object]]) -> None:
    """Steps along rounding once brought the loss from 1e-8 back to 0.1 by the end of this."""
    torch.manual_seed(0)
    inputs, targets = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    net = kfac_fx.transform(model)
    step = method(model, net)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for iteration in range(1000):
        chosen = torch.randint(CASES, (BATCH,), generator=generator)
        step(inputs[chosen], targets[chosen])
        if iteration >= 300 and iteration % 50 == 49:
            with torch.no_grad():
                worst = max(worst, float(F.cross_entropy(net(inputs), targets)))
    assert worst < 1e-5


@pytest.mark.parametrize("method", [with_rate, without])
def test_labels_that_change_after_a_fit_are_learnt(
    method: Callable[..., Callable[[Tensor, Tensor], object]],
) -> None:
    """A network that is sure of the old ones has no Fisher; its gradient alone tells."""
    torch.manual_seed(0)
    inputs, targets = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    net = kfac_fx.transform(model)
    step = method(model, net)
    generator = torch.Generator().manual_seed(0)
    for iteration in range(700):
        if iteration == 500:
            changed = torch.rand(CASES, generator=generator) < 0.05
            targets = torch.where(changed, (targets + 1) % 10, targets)
        chosen = torch.randint(CASES, (BATCH,), generator=generator)
        step(inputs[chosen], targets[chosen])
    with torch.no_grad():
        assert float(F.cross_entropy(net(inputs), targets)) < 0.1  # 1.4 as it changed


@pytest.mark.parametrize("method", [with_rate, without])
def test_rare_classes_are_not_outvoted(
    method: Callable[..., Callable[[Tensor, Tensor], object]],
) -> None:
    """Of classes of 99 to 1 most batches have none of the second, and are easy."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    targets = (torch.rand(4000, generator=generator) < 0.01).long()
    inputs = torch.randn(4000, 10, generator=generator)
    inputs[:, 0] += 2.0 * targets
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
    net = kfac_fx.transform(model)
    step = method(model, net)
    for _ in range(800):
        chosen = torch.randint(4000, (64,), generator=generator)
        step(inputs[chosen], targets[chosen])
    share = float(targets.double().mean())
    constant = F.binary_cross_entropy(torch.tensor(share), torch.tensor(share))
    with torch.no_grad():
        assert float(F.cross_entropy(net(inputs), targets)) < constant
