"""Steps with the exact Fisher of a batch whose rows are few, against a dense oracle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from support.networks import mlp
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kfac_fx
from kfac_fx import likelihoods
from kfac_fx.errors import UnknownOptionError
from kfac_fx.optim import KFACOptions
from kfac_fx.optim.case_rows import CaseRows, NoRowsError
from kfac_fx.optim.few_rows import MOMENTUM, RowsModel
from kfac_fx.optim.held_out import LEARNT, HeldOutRule
from kfac_fx.optim.objective import Batch

Net = Callable[[Tensor], Tensor]
Residuals = Callable[[Any, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def optimizer_of(model: nn.Module, likelihood: Any, **kwargs: Any) -> kfac_fx.KFAC:
    net = kfac_fx.transform(model)
    return kfac_fx.KFAC(net, likelihood, generator=torch.Generator().manual_seed(0), **kwargs)


def rows_of(optimizer: kfac_fx.KFAC, batch: Batch, most: int = 1024) -> CaseRows:
    return optimizer._objective.rows(batch, optimizer._groups.parameters(), most)


def dense(
    net: nn.Module, run: Callable[[Any], Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The derivatives of ``run``, [rows], by each parameter, as the definition has it."""

    def of(given: dict[str, Tensor]) -> Tensor:
        return run(lambda *args: functional_call(net, given, args))

    found = jacrev(of)({name: p.detach() for name, p in parameters.items()})
    return {name: J.flatten(1) for name, J in found.items()}


def compared(
    optimizer: kfac_fx.KFAC, rows: CaseRows, run: Callable[[Any], Tensor], columns: int
) -> None:
    """Compare with the oracle, whose rows are in the order of cases and not of columns."""
    parameters = optimizer._groups.parameters()
    expected = dense(optimizer._objective.net, run, parameters)
    order = torch.arange(len(rows.residuals)).view(-1, columns).T.flatten()
    assert rows.jacobian.keys() == expected.keys()
    for name, J in expected.items():
        torch.testing.assert_close(rows.jacobian[name], J[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_rows_of_plain_batches(columns: int, variance: float) -> None:
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(4, 5, columns), likelihoods.Normal(variance))
    x, y = torch.randn(7, 4), torch.randn(7, columns)
    rows = rows_of(optimizer, Batch(x, y))
    compared(optimizer, rows, lambda net: net(x).flatten() / variance**0.5, columns)
    wanted = (optimizer._objective.net(x) - y).T.flatten() / variance**0.5
    torch.testing.assert_close(rows.residuals, wanted)
    assert rows.terms == 7


class Positions(nn.Module):
    """Positions of a case in their own dimension, and one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.last = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.inner(x).tanh()).tanh()).mean(1)


def test_rows_of_positions_and_of_layers_that_are_used_twice() -> None:
    torch.manual_seed(0)
    optimizer = optimizer_of(Positions(), "normal")
    x, y = torch.randn(6, 4, 3), torch.randn(6, 1)
    rows = rows_of(optimizer, Batch(x, y))
    compared(optimizer, rows, lambda net: net(x).flatten(), 1)


def apart(net: Net, inside: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """u_xx + u u_y inside, and u at the edge."""

    def along(axis: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        direction = torch.zeros_like(inside)
        direction[:, axis] = 1.0
        return lambda z: torch.func.jvp(net, (z,), (direction,))

    ones = torch.zeros_like(inside)
    ones[:, 0] = 1.0
    second = torch.func.jvp(lambda z: along(0)(z)[1], (inside,), (ones,))[1]
    value, slope = along(1)(inside)
    return second + value * slope, net(edge)


def together(net: Net, inside: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """The values at all points come of one call."""
    second, _ = apart(net, inside, edge)
    values = net(torch.cat([edge, inside]))
    return second - values[len(edge) :], values[: len(edge)]


@pytest.mark.parametrize("residuals", [apart, together])
@pytest.mark.parametrize("sizes", [(6, 4), (5, 5)])
def test_rows_of_an_equation(residuals: Residuals, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    likelihood = likelihoods.Sum([("residual", 1.0), ("residual", 9.0)])
    optimizer = optimizer_of(mlp(2, 5, 4, 1), likelihood)
    points = torch.randn(sizes[0], 2), torch.randn(sizes[1], 2)
    rows = rows_of(optimizer, Batch(lambda net: residuals(net, *points), None))

    # h = 1/2 mean r^2 + 9/2 mean s^2 = ||e||^2 / (2 T): a part weighs w T / (its size).
    total = sum(sizes)
    weights = [(w * total / size) ** 0.5 for w, size in zip((1.0, 9.0), sizes, strict=True)]

    def run(net: Any) -> Tensor:
        found = residuals(net, *points)
        return torch.cat([w * r.flatten() for w, r in zip(weights, found, strict=True)])

    compared(optimizer, rows, run, 1)
    torch.testing.assert_close(rows.residuals, run(optimizer._objective.net))


@pytest.mark.parametrize("again", [False, True])
def test_a_step_is_the_damped_minimum(again: bool) -> None:
    """Of ||e + J d||^2 / 2T + eta/2 ||theta + d||^2 + lambda/2 ||d - mu d_0||^2, solved densely."""
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(4, 5, 2), "normal")
    names = optimizer._groups.parameters()
    x, y = torch.randn(7, 4), torch.randn(7, 2)
    rows = rows_of(optimizer, Batch(x, y))
    decays = {name: 0.3 if name.endswith("bias") else 0.01 for name in names}
    previous = {} if again else {name: torch.randn_like(p) for name, p in names.items()}
    step, change = RowsModel(rows, names, decays).minimum(0.05, previous)

    J = torch.cat(list(rows.jacobian.values()), 1)
    theta = torch.cat([p.detach().flatten() for p in names.values()])
    eta = torch.cat([torch.full((p.numel(),), decays[n]) for n, p in names.items()])
    before = torch.cat(
        [previous[n].flatten() if previous else 0 * p.detach().flatten() for n, p in names.items()]
    )
    matrix = J.T @ J / rows.terms + torch.diag(eta + 0.05)
    right = -J.T @ rows.residuals / rows.terms - eta * theta + 0.05 * MOMENTUM * before
    expected = torch.linalg.solve(matrix, right)
    found = torch.cat([step[name].flatten() for name in names])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    def model(d: Tensor) -> Tensor:
        fit = (rows.residuals + J @ d).square().sum() / (2 * rows.terms)
        return fit + 0.5 * (eta * (theta + d).square()).sum()

    assert change == pytest.approx(float(model(expected) - model(torch.zeros_like(expected))))
    trace = float(J.square().sum()) / rows.terms / J.shape[1]
    assert RowsModel(rows, names, decays).mean_eigenvalue == pytest.approx(trace)


class ByItself(nn.Module):
    """A factor that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() * self.factor


class ElsewhereToo(nn.Module):
    """A weight that is used outside of its layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh() + (x * self.layer.weight).sum(1, keepdim=True)


class Mixing(nn.Module):
    """Cases that depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).tanh()
        return self.last(x - x.mean(0))


class OtherCases(nn.Module):
    """Two rows of a layer for each output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x.reshape(-1, 2)).tanh().unflatten(0, (-1, 2)).sum(1))


@pytest.mark.parametrize("model", [ByItself, ElsewhereToo, Mixing, OtherCases])
def test_what_has_no_rows_has_steps_of_blocks(
    model: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    made = model()
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    plain = optimizer_of(made, "normal", options=KFACOptions(exact_rows=0))
    state = {name: value.clone() for name, value in made.state_dict().items()}
    wanted = [float(plain.step(x, y)) for _ in range(4)]
    made.load_state_dict(state)
    with caplog.at_level(logging.DEBUG, "kfac_fx"):
        tried = optimizer_of(made, "normal")
        found = [float(tried.step(x, y)) for _ in range(4)]
    assert found == wanted
    assert sum("steps are of blocks" in record.getMessage() for record in caplog.records) == 1
    assert "rows" not in tried.diagnostics


@pytest.mark.parametrize(
    "kwargs",
    [
        {"options": KFACOptions(exact_rows=0)},
        {"options": KFACOptions(exact_rows=15)},
        {"options": KFACOptions.paper(), "damping": 1.0},
        {"structure": "block_tridiagonal"},
        {"lr": 0.1},
    ],
)
def test_who_asks_for_blocks_gets_them(kwargs: Any) -> None:
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(4, 5, 1), "normal", **kwargs)
    for _ in range(3):
        optimizer.step(torch.randn(16, 4), torch.randn(16, 1))
    assert "rows" not in optimizer.diagnostics


def test_likelihoods_that_are_not_quadratic_have_blocks() -> None:
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(4, 5, 3), "categorical")
    optimizer.step(torch.randn(16, 4), torch.randint(3, (16,)))
    assert "rows" not in optimizer.diagnostics


def test_rows_that_are_too_many_are_not_made() -> None:
    optimizer = optimizer_of(mlp(4, 5, 1), "normal")
    with pytest.raises(NoRowsError, match="16 rows of 31 parameters are too many"):
        rows_of(optimizer, Batch(torch.randn(16, 4), torch.randn(16, 1)), most=15)


def test_a_number_of_rows_is_not_negative() -> None:
    with pytest.raises(UnknownOptionError, match="exact_rows"):
        KFACOptions(exact_rows=-1)


def test_a_fit_is_exact_in_few_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(48, 4)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2]
    optimizer = optimizer_of(mlp(4, 24, 24, 1), "normal")
    losses = [float(optimizer.step(x, y)) for _ in range(40)]
    assert losses[-1] < 1e-10 * losses[0]
    assert optimizer.diagnostics["rows"] == 48


@pytest.mark.parametrize("done", [2, 9])
def test_a_resumed_run_goes_on_bitwise(done: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(30, 20, 4), torch.randn(30, 20, 1)
    model = mlp(4, 6, 1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = optimizer_of(model, "normal")
    for k in range(done):
        whole.step(x[k], y[k])
    state = whole.state_dict()
    there = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [float(whole.step(x[k], y[k])) for k in range(done, 14)]
    model.load_state_dict(start)
    other = optimizer_of(model, "normal")
    other.load_state_dict(state)
    model.load_state_dict(there)
    assert [float(other.step(x[k], y[k])) for k in range(done, 14)] == wanted


def test_a_step_that_fails_is_tried_with_more_damping_on_the_same_rows() -> None:
    """The first lambda is too small: a step raises the loss of its batch."""
    torch.manual_seed(0)
    x = torch.randn(12, 4)
    optimizer = optimizer_of(mlp(4, 8, 1), "normal", damping=1e-4)
    made = []
    rows = optimizer._objective.rows

    def counted(*args: Any) -> CaseRows:
        made.append(1)
        return rows(*args)

    optimizer._objective.rows = counted  # type: ignore[method-assign]
    first = float(optimizer.step(x, 30 * x[:, :1].sin()))
    assert optimizer.diagnostics["damping"] > 1e-4
    assert len(made) == 1
    assert float(optimizer.step(x, 30 * x[:, :1].sin())) < first


def exact_rule(average: float, gain: float, differ: float = 1.0) -> HeldOutRule:
    made = HeldOutRule(1.0, 0.0, KFACOptions())
    made.scaled(1.0)
    own = {"held_out": average, "gain": gain, "differ": differ, "judged": LEARNT, "exact": True}
    made.load({**made.state(), **own})
    return made


def test_steps_have_a_rate_where_they_fit_noise() -> None:
    assert exact_rule(0.05, 0.01).why_not == "batches disagree"
    assert exact_rule(0.05, 0.1).why_not is None  # the loss falls all the same
    assert exact_rule(0.3, 0.01).why_not is None
    assert exact_rule(0.05, 0.01, differ=0.0).why_not is None  # nothing is left to take away


@pytest.mark.parametrize(("noise", "steps"), [(0.0, 20), (1.0, 40)])
def test_noise_of_the_targets_ends_them(noise: float, steps: int) -> None:
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(2, 24, 24, 1), "normal")
    for _ in range(steps):
        x = torch.randn(64, 2)
        y = x.sum(1, keepdim=True).sin()
        optimizer.step(x, y + noise * torch.randn(64, 1))
    assert ("rate" in optimizer.diagnostics) == bool(noise)
