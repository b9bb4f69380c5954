"""Twenty iterations of Algorithm 2 against a dense implementation that shares no code with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from support import oracles
from support.oracles import Bernoulli, Categorical, Joint, Likelihood, Normal
from torch import Tensor, nn

import kfac_fx
from kfac_fx.optim import KFACOptions

pytestmark = pytest.mark.usefixtures("float64")
ETA, T1, T2, T3, DECAY = 1e-3, 2, 3, 4, 0.9
LAYERS = ("0", "2", "4")
JOINT = Joint(((Categorical(), 1.0, (2,)), (Normal(), 0.3, (1,)), (Bernoulli(), 2.0, (1,))))
SUM = kfac_fx.likelihoods.Sum((("categorical", 1.0), ("normal", 0.3), ("bernoulli", 2.0)))


def network(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs, bias=False)
    )


class Dense:
    """Algorithm 2 with full matrices; vectors are the columns of each [W b], stacked."""

    def __init__(
        self, model: nn.Module, likelihood: Likelihood, coupled: bool, damping: float
    ) -> None:
        self.model, self.likelihood, self.coupled = model, likelihood, coupled
        self.lam, self.gamma = damping, (damping + ETA) ** 0.5
        self.k, self.average, self.rho = 0, None, math.nan
        self.previous: Tensor | None = None
        self.inverse: Tensor | None = None

    def vector(self, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        parts = []
        for name in LAYERS:
            layer = self.model.get_submodule(name)
            V = of(layer.weight)
            if layer.bias is not None:
                V = torch.cat([V, of(layer.bias)[:, None]], 1)
            parts.append(V.T.reshape(-1))
        return torch.cat(parts)

    def move(self, step: Tensor) -> None:
        at = 0
        for name in LAYERS:
            layer = self.model.get_submodule(name)
            rows, columns = layer.weight.shape
            width = columns + (layer.bias is not None)
            V = step[at : at + rows * width].view(width, rows).T
            at += rows * width
            with torch.no_grad():
                layer.weight += V[:, :columns]
                if layer.bias is not None:
                    layer.bias += V[:, -1]

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        outputs = self.model(x)
        h = self.likelihood.nll(outputs, y) / self.likelihood.terms(outputs, y)
        return h + 0.5 * ETA * sum(p.square().sum() for p in self.model.parameters())

    def fisher(self, x: Tensor) -> Tensor:
        total = 0.0
        for case in x.split(1):
            outputs = self.model(case)
            rows = []
            for value in outputs.flatten():
                self.model.zero_grad()
                value.backward(retain_graph=True)
                rows.append(self.vector(lambda p: p.grad))
            J = torch.stack(rows)
            total = total + J.T @ self.likelihood.fisher(outputs, None) @ J
        return total / len(x)

    def statistics(self, x: Tensor) -> dict[object, tuple[Tensor, Tensor]]:
        new: dict[object, tuple[Tensor, Tensor]] = {
            name: oracles.kronecker(self.model, [name], x, None, self.likelihood) for name in LAYERS
        }
        for pair in itertools.pairwise(LAYERS) if self.coupled else ():
            new[pair] = oracles.cross_kronecker(self.model, pair, x, None, self.likelihood)
        if self.average is None:
            return new
        weight = min(1 - 1 / self.k, DECAY)
        return {
            key: tuple(
                weight * a + (1 - weight) * b
                for a, b in zip(self.average[key], new[key], strict=True)
            )
            for key in new
        }

    def inverted(self, gamma: float) -> Tensor:
        assert self.average is not None
        factors = {name: self.average[name] for name in LAYERS}
        if self.coupled:
            cross = {key: value for key, value in self.average.items() if key not in factors}
            return oracles.tridiagonal_inverse(factors, cross, gamma**2)[0]
        blocks = [
            torch.linalg.inv(torch.kron(*oracles.tikhonov(*factors[n], gamma**2))) for n in LAYERS
        ]
        return torch.block_diag(*blocks)

    def proposal(self, inverse: Tensor, F: Tensor, gradient: Tensor) -> tuple[Tensor, float]:
        directions = [-inverse @ gradient]
        directions += [] if self.previous is None else [self.previous]
        D = torch.stack(directions, 1)
        B = D.T @ (F + (self.lam + ETA) * torch.eye(len(F))) @ D
        coefficients = -torch.linalg.solve(B, D.T @ gradient)
        value = 0.5 * coefficients @ B @ coefficients + (D.T @ gradient) @ coefficients
        return D @ coefficients, float(value)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.k += 1
        self.model.zero_grad()
        before = self.objective(x, y)
        before.backward()
        gradient = self.vector(lambda p: p.grad.clone())
        self.average = self.statistics(x)
        F = self.fisher(x)
        gammas = [self.gamma]
        if self.k % T2 == 0:
            omega = (19 / 20) ** (T2 / 2)
            gammas = [self.gamma, self.gamma * omega, self.gamma / omega]
        if len(gammas) > 1 or self.k <= 3 or self.k % T3 == 0:
            inverses = [self.inverted(gamma) for gamma in gammas]
        else:
            inverses = [self.inverse]
        tried = [self.proposal(inverse, F, gradient) for inverse in inverses]
        best = min(range(len(tried)), key=lambda index: tried[index][1])
        self.gamma, self.inverse = gammas[best], inverses[best]
        self.previous, predicted = tried[best]
        self.move(self.previous)
        if self.k % T1 == 0:
            self.rho = rho = (self.objective(x, y) - before).item() / predicted
            omega = (19 / 20) ** T1
            if rho > 3 / 4:
                self.lam = max(self.lam * omega, 1e-6)
            elif rho < 1 / 4:
                self.lam /= omega


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
@pytest.mark.parametrize(
    "likelihood", [Categorical(), Bernoulli(), Normal(), JOINT], ids=lambda v: v.name
)
def test_trajectory(likelihood: Likelihood, structure: str) -> None:
    """Parameters, lambda, gamma and rho after every iteration."""
    joint = likelihood is JOINT
    ours, theirs = (network(4 if joint else 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    forward = {"forward": lambda net, x: JOINT.split(net(x))} if joint else {}
    optimizer = kfac_fx.KFAC(
        kfac_fx.transform(ours, structure=structure),
        SUM if joint else likelihood.name,
        damping=2.0,
        weight_decay=ETA,
        refresh_every=T3,
        fisher="exact",
        options=KFACOptions(
            damping_every=T1,
            gamma_every=T2,
            ema_decay=DECAY,
            statistics_fraction=1.0,
            products_fraction=1.0,
            smallest_damping=1e-6,
            gamma_limit=math.inf,
            **forward,
        ),
    )
    dense = Dense(theirs, likelihood, structure == "block_tridiagonal", 2.0)
    lambdas = set()
    for _ in range(20):
        x = torch.randn(6, 3)
        y = likelihood.draw(theirs(x).detach())
        optimizer.step(x, y)
        dense.step(x, y)
        assert optimizer.diagnostics["damping"] == pytest.approx(dense.lam, rel=1e-12)
        assert optimizer.diagnostics["gamma"] == pytest.approx(dense.gamma, rel=1e-12)
        if dense.k % T1 == 0:
            assert optimizer.diagnostics["rho"] == pytest.approx(dense.rho, rel=1e-6)
        lambdas.add(dense.lam)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert len(lambdas) > 2  # the rule was at work
