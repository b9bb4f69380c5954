"""The part of a batch that statistics and products are taken of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.optim import KFACOptions
from kfac_fx.optim.objective import case_count, first_cases


def test_what_counts_the_cases_is_cut() -> None:
    """Every tensor with as many rows as the first that has rows; nothing else."""
    cases, table = torch.arange(12.0).reshape(6, 2), torch.randn(4, 6)
    scale, weights = torch.tensor(2.0), torch.arange(6.0)
    held = {"x": cases, "table": table, "scale": scale, "weights": weights}
    batch = (torch.tensor(6), held, [6, None])
    assert case_count(batch) == 6
    one, found, rest = first_cases(batch, 2)
    assert torch.equal(one, torch.tensor(6)) and rest == [6, None]
    assert torch.equal(found["x"], cases[:2]) and torch.equal(found["weights"], weights[:2])
    assert found["table"] is table and found["scale"] is scale
    assert case_count([torch.tensor(1.0)]) == 1


@pytest.mark.parametrize(("closure", "expected"), [(False, 16), (True, 64)])
def test_of_how_many_cases_statistics_are(closure: bool, expected: int) -> None:
    """A closure has its batch inside, which cannot be cut."""
    x, y = torch.randn(64, 8, 3), torch.randint(2, (64, 8))
    seen: list[int] = []

    def forward(net: nn.Module, inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return net(inputs)

    net = kfac_fx.transform(nn.Linear(3, 2))
    options = KFACOptions(statistics_fraction=1 / 4, forward=forward)
    optimizer = kfac_fx.KFAC(net, lr=1e-3, options=options)
    optimizer.step((lambda given: forward(given, x)) if closure else x, y)
    assert seen == [64, expected]


class Forces(nn.Module):
    """An energy and its derivative by the positions, as a model of molecules returns both."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.clone().requires_grad_()
        self.calls += 1
        energy = self.body(positions)
        (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return energy, -slope


def test_of_a_network_that_differentiates() -> None:
    """Passes for values alone have a graph where the network needs one, and draw the same masks."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 3), torch.randn(32, 1)
    taken = []
    for with_forces in (True, False):
        torch.manual_seed(1)
        model = Forces()
        net = kfac_fx.transform(model if with_forces else model.body, (x,), capture="eager")
        optimizer = kfac_fx.KFAC(net, "normal")
        forward = (lambda net: net(x)[0]) if with_forces else (lambda net: net(x))
        for _ in range(4):
            optimizer.step(forward, y)
        taken.append([p.detach().clone() for p in model.parameters()])
        # The pass of the gradient alone leaves what it counts.
        assert int(model.calls) == (4 if with_forces else 0)
    torch.testing.assert_close(taken[0], taken[1])


class Neighbours(nn.Module):
    """A layer of a graph: what nodes send along edges, or along the entries of an adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.send, self.read = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        sent = torch.tanh(self.send(x))
        if links.is_floating_point():
            return self.read(links @ sent)
        return self.read(torch.zeros_like(sent).index_add(0, links[1], sent[links[0]]))


@pytest.mark.parametrize("edges", [True, False])
def test_a_graph_is_not_cut(edges: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Nodes that stay would have links to nodes that do not; the whole graph is taken then."""
    torch.manual_seed(0)
    nodes = 128
    x, y, pairs = torch.randn(nodes, 4), torch.randint(3, (nodes,)), torch.randint(nodes, (2, 300))
    adjacency = torch.zeros(nodes, nodes)
    adjacency[pairs[1], pairs[0]] = 1
    links = pairs if edges else adjacency
    trained = []
    for fraction in (1 / 8, 1.0):
        torch.manual_seed(1)
        net = kfac_fx.transform(Neighbours(), (x, links))
        options = KFACOptions(statistics_fraction=fraction, products_fraction=fraction)
        optimizer = kfac_fx.KFAC(net, "categorical", options=options)
        losses = [float(optimizer.step((x, links), y)) for _ in range(4)]
        assert losses[-1] < losses[0] and optimizer.diagnostics["iteration"] == 4
        trained.append([p.detach().clone() for p in net.parameters()])
    if edges:  # the network is not asked, since a GPU stops at an index out of range
        torch.testing.assert_close(trained[0], trained[1])
    assert caplog.text.count("does not take the first") == (0 if edges else 1)


class Images(nn.Module):
    """A group norm of images in the format channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).permute(0, 3, 1, 2)).mean((2, 3)))


@pytest.mark.parametrize("route", ["symbolic_trace", "export", "eager"])
def test_products_of_a_group_norm_of_images(route: Any, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 4, 4, 3), torch.randint(3, (32,))
    optimizer = kfac_fx.KFAC(kfac_fx.transform(Images(), (x,), capture=route), "categorical")
    losses = [float(optimizer.step(x, y)) for _ in range(6)]
    assert losses[-1] < losses[0] and "alpha" in optimizer.diagnostics
    assert "have a rate of" not in caplog.text
