"""Equations by networks, and a wave function, for time_to_target.py.

Derivatives by the coordinates are in forward mode, whose uses of the layers K-FAC records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from problem_networks import perceptron
from problem_parts import Batch, Problem, Scores
from torch import Tensor, nn

Net = Callable[[Tensor], Tensor]


def derivatives(net: Net, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value and the first and second derivative by one coordinate."""
    along = torch.zeros_like(x)
    along[:, axis] = 1.0

    def first(z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = torch.func.jvp(net, (z,), (along,))
        return value, slope

    (value, slope), (_, second) = torch.func.jvp(first, (x,), (along,))
    return value, slope, second


class Equation:
    """Residuals inside and at the edge, at fresh points in every iteration.

    Attributes:
        inside: points of the equation in a batch; a quarter as many at the edge.
        weight: of the edge's residuals.
    """

    inside = 512
    weight = 100.0

    def points(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return points inside and at the edge."""
        raise NotImplementedError

    def residuals(self, net: Net, inside: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is zero for a solution."""
        raise NotImplementedError

    def solution(self) -> tuple[Tensor, Tensor]:
        """Return points and the solution there."""
        raise NotImplementedError

    def batches(self, model: nn.Module, seed: int) -> Iterator[Batch]:
        """Yield closures from the network to residuals."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            inside, edge = self.points(generator)
            yield Batch(lambda net, a=inside, b=edge: self.residuals(net, a, b))

    def loss(self, residuals: tuple[Tensor, Tensor]) -> Tensor:
        """Return half the mean squares, the edge's weighted."""
        inside, edge = residuals
        return 0.5 * inside.square().mean() + 0.5 * self.weight * edge.square().mean()

    def objective(self, net: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
        """Return the residuals and the loss."""
        outputs = batch.inputs(net)
        return outputs, self.loss(outputs)

    @torch.no_grad()
    def evaluate(self, net: nn.Module) -> Scores:
        """Return the loss at fixed points and the relative error of the solution."""
        if not hasattr(self, "_kept"):
            self._kept = self.points(torch.Generator().manual_seed(12345)), self.solution()
        fixed, (places, exact) = self._kept
        loss = self.loss(self.residuals(net, *fixed))
        return Scores(float(loss), float((net(places) - exact).norm() / exact.norm()))


class Poisson(Equation):
    """u_xx + u_yy = f on the unit square, u = 0 on its edge; u = sin(pi x) sin(pi y)."""

    def points(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inside = torch.rand(self.inside, 2, generator=generator)
        edge = torch.rand(self.inside // 4, 2, generator=generator)
        side = torch.randint(2, (len(edge), 1), generator=generator)
        end = torch.randint(2, (len(edge), 1), generator=generator)
        return inside, edge.scatter(1, side, end.float())

    def residuals(self, net: Net, inside: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        laplacian = derivatives(net, inside, 0)[2] + derivatives(net, inside, 1)[2]
        return laplacian + 2 * torch.pi**2 * self._exact(inside), net(edge)

    def _exact(self, x: Tensor) -> Tensor:
        return torch.sin(torch.pi * x[:, :1]) * torch.sin(torch.pi * x[:, 1:])

    def solution(self) -> tuple[Tensor, Tensor]:
        axis = torch.linspace(0, 1, 40)
        grid = torch.cartesian_prod(axis, axis)
        return grid, self._exact(grid)


class Burgers(Equation):
    """u_t + u u_x = nu u_xx on [-1, 1], u(0, x) = -sin(pi x); coordinates are (t, x)."""

    viscosity = 0.02

    def points(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inside = torch.rand(self.inside, 2, generator=generator)
        edge = torch.rand(self.inside // 4, 2, generator=generator)
        stretch, shift = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])
        inside, edge = inside * stretch + shift, edge * stretch + shift
        start = len(edge) // 2  # half of them at t = 0, the others at x = -1 or 1
        edge[:start, 0] = 0.0
        edge[start:, 1] = edge[start:, 1].sign()
        return inside, edge

    def residuals(self, net: Net, inside: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
        _, by_time, _ = derivatives(net, inside, 0)
        value, slope, second = derivatives(net, inside, 1)
        wanted = torch.where(edge[:, :1] == 0, -torch.sin(torch.pi * edge[:, 1:]), 0.0)
        return by_time + value * slope - self.viscosity * second, net(edge) - wanted

    def solution(self) -> tuple[Tensor, Tensor]:
        """By the transformation of Cole and Hopf, integrated numerically in float64."""
        time, place = torch.linspace(0.05, 1, 20), torch.linspace(-1, 1, 61)
        grid = torch.cartesian_prod(time, place).double()
        t, x = grid[:, :1], grid[:, 1:]
        shift = torch.linspace(-6, 6, 1201, dtype=torch.float64)
        back = x - shift * (4 * self.viscosity * t).sqrt()
        exponent = -torch.cos(torch.pi * back) / (2 * torch.pi * self.viscosity) - shift.square()
        weights = exponent.softmax(1)
        value = -(torch.sin(torch.pi * back) * weights).sum(1, keepdim=True)
        return grid.float(), value.float()


class WaveNetwork(nn.Module):
    """log psi of two electrons: the trap's own Gaussian, and a symmetric sum of a perceptron's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*perceptron(9, 48, 48, 48, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, :3], x[:, 3:]
        return (
            self.body(self._features(first, second))
            + self.body(self._features(second, first))
            - 0.25 * x.square().sum(1, keepdim=True)
        )

    def _features(self, first: Tensor, second: Tensor) -> Tensor:
        lengths = [first.square().sum(1, keepdim=True), second.square().sum(1, keepdim=True)]
        apart = (first - second).square().sum(1, keepdim=True).sqrt()
        return torch.cat([first, second, *(0.2 * length for length in lengths), apart], 1)


class WaveFunction:
    """Variational Monte Carlo: two electrons in three dimensions, harmonic trap of omega = 1/2.

    The exact energy is 2 hartree, the exact wave function (1 + r / 2) exp(-(r_1^2 + r_2^2) / 4).
    The gradient of the energy is 2 E[(E_local - E) grad log psi], that of a normal likelihood of
    variance 1/4 (whose Fisher is that of |psi|^2, not centred) with targets
    log psi - (E_local - E) / 2. Each batch comes of ten Metropolis moves of the walkers.
    """

    walkers = 256
    moves = 10

    def batches(self, model: nn.Module, seed: int) -> Iterator[Batch]:
        """Yield walkers and targets of the present wave function."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.walkers, 6, generator=generator)
        with torch.no_grad():
            x = self._moved(model, x, 100, generator)
        while True:
            with torch.no_grad():
                x = self._moved(model, x, self.moves, generator)
                energy = self.local_energy(model, x)
                middle = energy.median()
                width = 5 * (energy - middle).abs().mean()
                energy = energy.clamp(middle - width, middle + width)
                targets = model(x) - 0.5 * (energy - energy.mean())
            yield Batch(x, targets)

    def _moved(self, model: nn.Module, x: Tensor, moves: int, generator: torch.Generator) -> Tensor:
        present = model(x)
        for _ in range(moves):
            tried = x + 0.6 * torch.randn(x.shape, generator=generator)
            value = model(tried)
            chance = torch.rand(present.shape, generator=generator)
            taken = chance.log() < 2 * (value - present)
            x, present = torch.where(taken, tried, x), torch.where(taken, value, present)
        return x

    def local_energy(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return H psi / psi for each row, all six coordinates in one pass."""
        slope, second = _along_all(model, x)
        apart = (x[:, :3] - x[:, 3:]).norm(dim=1, keepdim=True)
        kinetic = -0.5 * (second + slope.square()).sum(0)
        return kinetic + 0.125 * x.square().sum(1, keepdim=True) + 1 / apart

    def objective(self, net: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
        """Return log psi, and the surrogate whose gradient is the energy's."""
        outputs = net(batch.inputs)
        return outputs, 2 * (outputs - batch.targets).square().mean()

    @torch.no_grad()
    def evaluate(self, net: nn.Module) -> Scores:
        """Return the energy above 2 hartree, on two samples.

        With phi = psi / psi_0 it is 1/2 <|grad phi|^2> / <phi^2>, means over |psi_0|^2, which has
        no local energies in it and so hardly any noise. The sample is normal, with weights.
        """
        errors = []
        for seed in (0, 1):
            x = torch.randn(4096, 6, generator=torch.Generator().manual_seed(seed))
            slope, _ = _along_all(net, x)
            apart = x[:, :3] - x[:, 3:]
            length = apart.norm(dim=1, keepdim=True)
            unit = apart / length / (2 + length)  # the gradient of log(1 + r / 2)
            exact = torch.cat([unit, -unit], 1) - 0.5 * x
            difference = (slope.squeeze(-1).T - exact).square().sum(1).double()
            ratio = 2 * (net(x) + 0.25 * x.square().sum(1, keepdim=True)).squeeze(1).double()
            weights = ratio.softmax(0)
            errors.append(float(0.5 * (weights * difference).sum()))
        return Scores(errors[0], errors[1])


def _along_all(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and second derivatives by each coordinate, [coordinates, cases, 1] each."""
    cases, coordinates = x.shape
    repeated = x.repeat(coordinates, 1)
    along = torch.eye(coordinates).repeat_interleave(cases, 0)

    def first(z: Tensor) -> Tensor:
        return torch.func.jvp(net, (z,), (along,))[1]

    slope, second = torch.func.jvp(first, (repeated,), (along,))
    return slope.unflatten(0, (coordinates, cases)), second.unflatten(0, (coordinates, cases))


def _residual_likelihood() -> Any:
    from kfac_fx import likelihoods

    return likelihoods.Sum([("residual", 1.0), ("residual", Equation.weight)])


def _wave_likelihood() -> Any:
    from kfac_fx import likelihoods

    return likelihoods.Normal(variance=0.25)


def _coordinates_network() -> nn.Module:
    return nn.Sequential(*perceptron(2, 48, 48, 48, 1))


EQUATIONS = (
    Problem(
        name="poisson",
        title="Poisson equation, 2-48-48-48-1",
        network=_coordinates_network,
        likelihood=_residual_likelihood,
        seconds=20,
        deterministic=True,
        setting=cache(Poisson),
    ),
    Problem(
        name="burgers",
        title="Burgers equation, 2-48-48-48-1",
        network=_coordinates_network,
        likelihood=_residual_likelihood,
        seconds=20,
        deterministic=True,
        setting=cache(Burgers),
    ),
    Problem(
        name="wave",
        title="wave function of two electrons",
        network=WaveNetwork,
        likelihood=_wave_likelihood,
        seconds=20,
        deterministic=True,
        setting=cache(WaveFunction),
    ),
)
