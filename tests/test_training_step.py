"""Loss, gradients and statistics in one graph equal the separate ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64", "fresh")


class Network(nn.Module):
    """With running statistics, dropout, a tap on every kind of layer, and a diagonal block."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4, 3)
        self.table = nn.Parameter(torch.randn(40))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.convolution(x)))
        x = x * self.table.view(4, 10).cumsum(1).mean(1).view(4, 1, 1)
        result: Tensor = self.head(self.drop(x.mean((2, 3))))
        return result


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(6, 2, 5, 5, generator=generator)
        yield x, torch.randint(3, (6,), generator=generator)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def train(fisher: str, fused: bool, loss: Any, compile: bool | str, steps: int = 4) -> Any:
    """State and losses after some steps; statistics in every second of them."""
    torch.manual_seed(1)
    net = kfac_fx.transform(Network())
    generator = torch.Generator().manual_seed(0)
    pre = kfac_fx.Preconditioner(
        net, fisher=fisher, statistics_every=2, generator=generator, compile=compile
    )
    run = kfac_fx.TrainingStep(pre, loss) if fused else None
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    torch.manual_seed(2)
    for x, y in batches(steps):
        optimizer.zero_grad()
        if run is not None:
            value = run(x, y)
        else:
            outputs = net(x)
            value = (loss or F.cross_entropy)(outputs, y)
            pre.observe(outputs, y)
            value.backward()
        losses.append(value.detach().clone())
        pre.step()
        optimizer.step()
    return net.state_dict(), losses, run


@pytest.mark.parametrize("compile", [False, "eager"])
@pytest.mark.parametrize("loss", [None, cross_entropy], ids=["likelihood", "own"])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_one_graph_equals_separate(fisher: str, loss: Any, compile: bool | str) -> None:
    if fisher == "empirical" and loss is not None:
        pytest.skip("the separate form compares the loss with the likelihood")
    want, want_losses, _ = train(fisher, False, loss, False)
    found, losses, _ = train(fisher, True, loss, compile)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(losses, want_losses, rtol=1e-10, atol=1e-12)


def test_number_of_graphs() -> None:
    """With statistics and without, a refresh and an apply."""
    train("sampled", True, None, "eager")
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.slow
def test_inductor() -> None:
    want, _, _ = train("sampled", False, None, False, steps=3)
    found, _, _ = train("sampled", True, None, True, steps=3)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_sum_of_likelihoods_and_ignored_targets() -> None:
    likelihood = kfac_fx.likelihoods.Sum([("categorical", 1.0), ("normal", 0.3)])
    body = nn.Linear(6, 5)

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(body)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x)
            return y[:, :3], y[:, 3:]

    x, y, z = torch.randn(7, 6), torch.randint(3, (7,)), torch.randn(7, 2)
    y[:3] = -100
    net = kfac_fx.transform(TwoHeads())
    step = kfac_fx.TrainingStep(kfac_fx.Preconditioner(net, likelihood, compile="eager"))
    loss = step(x, (y, z))
    label, box = net(x)
    want = F.cross_entropy(label, y) + 0.3 * 0.5 * (box - z).square().sum(1).mean()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(want, [net.get_parameter("body.weight")])
    torch.testing.assert_close(net.get_parameter("body.weight").grad, gradient)


def test_gradients_accumulate() -> None:
    net = kfac_fx.transform(Network())
    net.eval()
    pre = kfac_fx.Preconditioner(net, compile="eager")
    step = kfac_fx.TrainingStep(pre)
    (x, y), *_ = batches(1)
    step(x, y)
    once = {n: p.grad.clone() for n, p in net.named_parameters()}
    step(x, y)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_errors() -> None:
    net = kfac_fx.transform(Network())
    (x, y), *_ = batches(1)
    with pytest.raises(kfac_fx.errors.LikelihoodError, match="targets"):
        kfac_fx.TrainingStep(kfac_fx.Preconditioner(net))(x)
    step = kfac_fx.TrainingStep(kfac_fx.Preconditioner(net, compile="eager"))
    with pytest.raises(kfac_fx.errors.LikelihoodError):
        step(x, y.fill_(7))
    assert all(p.grad is None for p in net.parameters())
