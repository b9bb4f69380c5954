"""A differential equation by a network: K-FAC against Adam at equal wall time.

u_xx + u_yy = f on the unit square, u = 0 on its edge; the solution is u = sin(pi x) sin(pi y).
The network has 2-64-64-64-1 tanh units; residuals are taken at fresh points in every iteration.
Evaluation is not on the clock.

    python examples/poisson.py --seconds 30
    python examples/poisson.py --quick
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from common import parse, show_table, use_threads
from torch import Tensor, nn

import kfac_fx

INSIDE, EDGE = 1024, 256
EDGE_WEIGHT = 100.0
ADAM_RATES = (1e-3, 3e-3, 1e-2)
Net = Callable[[Tensor], Tensor]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    sizes = (2, 64, 64, 64)
    hidden = [[nn.Linear(a, b), nn.Tanh()] for a, b in pairwise(sizes)]
    return nn.Sequential(*(layer for pair in hidden for layer in pair), nn.Linear(64, 1))


def solution(x: Tensor) -> Tensor:
    return torch.sin(torch.pi * x[:, :1]) * torch.sin(torch.pi * x[:, 1:])


def laplacian(net: Net, x: Tensor) -> Tensor:
    """Second derivatives in forward mode, whose uses of the layers K-FAC records."""

    def second(direction: Tensor) -> Tensor:
        along = direction.expand_as(x)
        return torch.func.jvp(lambda z: torch.func.jvp(net, (z,), (along,))[1], (x,), (along,))[1]

    return second(torch.tensor([1.0, 0.0])) + second(torch.tensor([0.0, 1.0]))


def points(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inside of the square, and on its edge."""
    inside = torch.rand(INSIDE, 2, generator=generator)
    edge = torch.rand(EDGE, 2, generator=generator)
    side = torch.randint(2, (EDGE, 1), generator=generator)
    end = torch.randint(2, (EDGE, 1), generator=generator)
    return inside, edge.scatter(1, side, end.float())


def residuals(net: Net, inside: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """What is zero for a solution: u_xx + u_yy - f, and u on the edge."""
    return laplacian(net, inside) + 2 * torch.pi**2 * solution(inside), net(edge)


@dataclass
class Run:
    method: str
    iterations: int
    loss: float
    error: float


@torch.no_grad()
def relative_error(net: nn.Module) -> float:
    """Of u on a grid, in the 2-norm."""
    axis = torch.linspace(0, 1, 64)
    grid = torch.cartesian_prod(axis, axis)
    exact = solution(grid)
    return float((net(grid) - exact).norm() / exact.norm())


def train(method: str, step: Callable[[], float], net: nn.Module, seconds: float) -> Run:
    iterations, loss, start = 0, float("nan"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        loss = step()
        iterations += 1
    return Run(method, iterations, loss, relative_error(net))


def kfac(seed: int, seconds: float) -> Run:
    generator = torch.Generator().manual_seed(seed)
    net = network(seed)
    likelihood = kfac_fx.likelihoods.Sum([("residual", 1.0), ("residual", EDGE_WEIGHT)])
    net_with_taps = kfac_fx.transform(net)
    optimizer = kfac_fx.KFAC(net_with_taps, likelihood)

    def step() -> float:
        batch = points(generator)
        return float(optimizer.step(lambda net: residuals(net, *batch)))

    return train("K-FAC", step, net, seconds)


def adam(seed: int, seconds: float, lr: float) -> Run:
    generator = torch.Generator().manual_seed(seed)
    net = network(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)

    def step() -> float:
        equation, edge = residuals(net, *points(generator))
        loss = 0.5 * equation.square().mean() + 0.5 * EDGE_WEIGHT * edge.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    return train(f"Adam, lr {lr:g}", step, net, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parse(parser, seconds=1.5)
    print(use_threads(options.threads) + f", {options.seconds:g} s each")
    runs = [kfac(options.seed, options.seconds)]
    runs += [adam(options.seed, options.seconds, lr) for lr in ADAM_RATES]
    header = ["", "iterations", "loss", "relative error of u"]
    rows = [[r.method, f"{r.iterations:,}", f"{r.loss:.2e}", f"{r.error:.2e}"] for r in runs]
    show_table(header, rows)


if __name__ == "__main__":
    main()
