"""The derivatives of outputs, row by row, against a dense oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from support.few_rows import Mixing, optimizer_of, plain_batches_have_rows, rows_of
from support.networks import mlp
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kfac_fx
from kfac_fx import likelihoods
from kfac_fx.optim import case_rows
from kfac_fx.optim.case_rows import CaseRows, NoRowsError
from kfac_fx.optim.objective import Batch
from kfac_fx.optim.rows_model import RowsModel

Net = Callable[[Tensor], Tensor]
Residuals = Callable[[Any, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def _small_and_precise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain_batches_have_rows(monkeypatch)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


class InPlace(nn.Module):
    """Outputs of layers that are written over."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h *= 2
        return self.last(nn.functional.relu(h, inplace=True))


@pytest.mark.parametrize("capture", ["symbolic_trace", "export"])
def test_rows_of_layers_whose_outputs_are_written_over(capture: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 4), torch.randn(7, 1)
    example = (x,) if capture == "export" else None
    net = kfac_fx.transform(InPlace(), capture=capture, example_inputs=example)
    optimizer = kfac_fx.KFAC(net, "normal")
    compared(optimizer, rows_of(optimizer, Batch(x, y)), lambda net: net(x).flatten(), 1)


def test_rows_where_units_are_off() -> None:
    """A point of one batch of two kinds may reach some layers not at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    optimizer = optimizer_of(model, likelihoods.Sum([("residual", 1.0), ("residual", 1.0)]))
    inside, edge = torch.randn(9, 2), torch.randn(9, 2)

    def run(net: Any) -> tuple[Tensor, Tensor]:
        values = net(torch.cat([edge, inside]))
        return values[9:], values[:9]

    rows = rows_of(optimizer, Batch(run, None))
    assert not rows.jacobian["0.bias"].any(1).all()  # the case that this is about
    compared(optimizer, rows, lambda net: torch.cat(run(net)).flatten() * 2**0.5, 1)


class TwoHeads(nn.Module):
    """Outputs of two likelihoods."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(4, 2)
        self.label = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.value(x), self.label(x)


def test_a_part_of_no_weight_may_have_any_likelihood() -> None:
    torch.manual_seed(0)
    likelihood = likelihoods.Sum([("normal", 1.0), ("categorical", 0.0)])
    optimizer = optimizer_of(TwoHeads(), likelihood)
    optimizer.step(torch.randn(8, 4), (torch.randn(8, 2), torch.randint(3, (8,))))
    assert optimizer.diagnostics["rows"] == 16


def test_residuals_of_a_fit_in_float32_are_exact() -> None:
    """Outputs over sigma, less targets over sigma, would be rounding."""
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(4, 5, 1).float(), likelihoods.Normal(0.3))
    x = torch.randn(7, 4, dtype=torch.float32)
    outputs = optimizer._objective.net(x).detach()
    y = outputs * (1 + 3e-7)
    wanted = (outputs.double() - y.double()).flatten() / 0.3**0.5
    torch.testing.assert_close(rows_of(optimizer, Batch(x, y)).residuals, wanted, rtol=1e-7, atol=0)


def test_rows_that_are_too_many_are_not_made() -> None:
    optimizer = optimizer_of(mlp(4, 5, 1), "normal")
    with pytest.raises(NoRowsError, match="16 rows of 31 parameters are too many"):
        rows_of(optimizer, Batch(torch.randn(16, 4), torch.randn(16, 1)), most=15)


def test_plain_batches_of_few_cases_have_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_rows, "FEWEST", 17)
    optimizer = optimizer_of(mlp(4, 5, 1), "normal")
    with pytest.raises(NoRowsError, match="too few"):
        rows_of(optimizer, Batch(torch.randn(16, 4), torch.randn(16, 1)))
    points = torch.randn(16, 2), torch.randn(4, 2)
    likelihood = likelihoods.Sum([("residual", 1.0), ("residual", 1.0)])
    equation = optimizer_of(mlp(2, 5, 1), likelihood)
    assert len(rows_of(equation, Batch(lambda net: apart(net, *points), None)).residuals) == 20


class Off(nn.Module):
    """Units that are off for most points."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.inner(x) - 0.5).relu().square())


@pytest.mark.parametrize("residuals", [apart, together])
@pytest.mark.parametrize("most", [8, 11])
def test_rows_are_drawn_of_more(residuals: Residuals, most: int) -> None:
    """Scaled, so that the mean of J^T J / T is F; the gradient of the others is in the model."""
    torch.manual_seed(0)
    likelihood = likelihoods.Sum([("residual", 1.0), ("residual", 9.0)])
    optimizer = optimizer_of(Off(), likelihood)
    names = optimizer._groups.parameters()
    points = torch.randn(12, 2), torch.randn(8, 2)
    batch = Batch(lambda net: residuals(net, *points), None)
    whole, drawn = rows_of(optimizer, batch), rows_of(optimizer, batch, most)
    assert whole.whole and not drawn.whole
    counts = [int(most / 20 * 12), int(most / 20 * 8)]
    assert len(drawn.residuals) == sum(counts)

    # Each drawn row is one of the batch, and scaled.
    scale = torch.cat(
        [torch.full((k,), (n / k) ** 0.5) for n, k in zip((12, 8), counts, strict=True)]
    )
    J, some = (torch.cat([r.residuals[:, None], *r.jacobian.values()], 1) for r in (whole, drawn))
    same = torch.cdist(some / scale[:, None], J) < 1e-9
    assert same[: counts[0], :12].any(1).all()
    assert same[counts[0] :, 12:].any(1).all()

    gradient = {n: g.view(names[n].shape) for n, g in whole.gradient().items()}
    decays = dict.fromkeys(names, 0.01)
    step, change = RowsModel(drawn, gradient, names, decays).minimum(0.05, {})
    J = torch.cat(list(drawn.jacobian.values()), 1)
    theta, g = (torch.cat([v[n].detach().flatten() for n in names]) for v in (names, gradient))
    F = J.T @ J / drawn.terms
    expected = torch.linalg.solve(F + 0.06 * torch.eye(len(F)), -g - 0.01 * theta)
    found = torch.cat([step[name].flatten() for name in names])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    l2 = 0.005 * ((theta + expected).square() - theta.square()).sum()
    assert change == pytest.approx(float(expected @ (g + 0.5 * F @ expected) + l2))


def test_drawn_rows_of_cases_that_mix_are_found_out() -> None:
    optimizer = optimizer_of(Mixing(), "residual")
    x, ones = torch.randn(32, 4), torch.ones(32, 4)
    batch = Batch(lambda net: torch.func.jvp(net, (x,), (ones,))[1], None)
    with pytest.raises(NoRowsError, match="one by one"):
        rows_of(optimizer, batch, 16)
