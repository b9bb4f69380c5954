"""Steps with the exact Fisher of a batch whose rows are few."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.few_rows import Mixing, optimizer_of, plain_batches_have_rows, rows_of
from support.networks import mlp
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.distributions import Normal as TorchNormal

from kfac_fx.errors import UnknownOptionError
from kfac_fx.optim import KFACOptions
from kfac_fx.optim.case_rows import CaseRows
from kfac_fx.optim.held_out import LEARNT, HeldOutRule
from kfac_fx.optim.objective import Batch
from kfac_fx.optim.rows_model import MOMENTUM, RowsModel


@pytest.fixture(autouse=True)
def _small_and_precise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain_batches_have_rows(monkeypatch)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_rows_stay_at_a_minimum_where_gradients_are_rounding() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 4).float(), torch.randn(40, 2).float()
    optimizer = optimizer_of(nn.Linear(4, 2).float(), "normal")
    for _ in range(25):
        optimizer.step(x, y)
    assert optimizer.diagnostics["rows"] == 80


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
    step, change = RowsModel(rows, {}, names, decays).minimum(0.05, previous)

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
    assert RowsModel(rows, {}, names, decays).mean_eigenvalue == pytest.approx(trace)


def test_cases_that_come_twice_have_a_step_for_any_damping() -> None:
    """J J^T has no full rank, and T is lost in its rounding."""
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(4, 5, 2), "normal")
    x, y = torch.randn(7, 4).repeat(3, 1), torch.randn(7, 2).repeat(3, 1)
    parameters = optimizer._groups.parameters()
    rows = rows_of(optimizer, Batch(x, y))
    model = RowsModel(rows, {}, parameters, dict.fromkeys(parameters, 0.0))
    with torch.no_grad():
        step, change = model.minimum(1e-25, {})
    assert all(bool(value.isfinite().all()) for value in step.values())
    assert change < 0


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


class OtherCases(nn.Module):
    """Two rows of a layer for each output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x.reshape(-1, 2)).tanh().unflatten(0, (-1, 2)).sum(1))


class Off(nn.Module):
    """No unit is on, so that no output depends on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)
        self.last = nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.layer(x) * 0).relu())


class Single(nn.Module):
    """The weights of one unit, without a dimension of units."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.last = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(x.unflatten(1, (2, 2)), self.weight).tanh())


@pytest.mark.parametrize("model", [ByItself, ElsewhereToo, Mixing, OtherCases, Off, Single])
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


class Named:
    """A user's likelihood: outputs are a mapping, and targets are not."""

    casewise = True
    quadratic = True

    def distribution(self, outputs: Any) -> Distribution:
        return Independent(TorchNormal(outputs["mean"], torch.ones_like(outputs["mean"])), 1)

    def terms(self, outputs: Any, targets: Tensor) -> tuple[Tensor, None]:
        return targets, None


class WithName(nn.Module):
    """One output, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": self.layer(x)}


def test_likelihoods_whose_targets_are_no_outputs_have_blocks() -> None:
    torch.manual_seed(0)
    optimizer = optimizer_of(WithName(), Named())
    optimizer.step(torch.randn(16, 4), torch.randn(16, 1))
    assert "model" in optimizer.diagnostics
    assert "rows" not in optimizer.diagnostics


def test_nothing_is_kept_of_a_batch() -> None:
    """J may be half a gigabyte."""
    optimizer = optimizer_of(mlp(4, 5, 1), "normal")
    made = []
    rows = optimizer._objective.rows

    def noted(*args: Any) -> CaseRows:
        found = rows(*args)
        made.append(weakref.ref(found))
        return found

    optimizer._objective.rows = noted  # type: ignore[method-assign]
    optimizer.step(torch.randn(16, 4), torch.randn(16, 1))
    assert [one() for one in made] == [None]


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


def test_a_run_goes_on_with_blocks_where_there_are_no_rows() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    first = optimizer_of(mlp(4, 5, 1), "normal")
    first.step(x, y)
    other = optimizer_of(mlp(4, 5, 1), "normal", compile="eager")
    other.load_state_dict(first.state_dict())
    other.step(x, y)
    assert "rows" not in other.diagnostics


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


@pytest.mark.parametrize("plain", [False, True])
def test_the_first_steps_tell_a_data_set_from_walkers(plain: bool) -> None:
    wanted = "batches disagree" if plain else None
    for judged, average, why in ((4, 0.5, wanted), (4, 0.9, None), (LEARNT, 0.5, None)):
        made = exact_rule(average, 0.5)
        made.load({**made.state(), "judged": judged, "plain": plain})
        assert made.why_not == why
    made.load({**made.state(), "judged": 4, "differ": 0.0})
    assert made.why_not is None  # all cases each time


def test_steps_have_a_rate_where_they_fit_noise() -> None:
    assert exact_rule(0.05, 0.01).why_not == "batches disagree"
    assert exact_rule(0.05, 0.1).why_not is None  # the loss falls all the same
    assert exact_rule(0.3, 0.01).why_not is None
    assert exact_rule(0.05, 0.01, differ=0.0).why_not is None  # nothing is left to take away


def test_noise_of_the_targets_ends_them() -> None:
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(2, 24, 24, 1), "normal")
    for _ in range(40):
        x = torch.randn(64, 2)
        optimizer.step(x, x.sum(1, keepdim=True).sin() + torch.randn(64, 1))
    assert "rate" in optimizer.diagnostics


def test_fresh_points_of_an_equation_do_not_end_them() -> None:
    """u' = cos 3t."""
    torch.manual_seed(0)
    optimizer = optimizer_of(mlp(1, 16, 16, 1), "residual")
    losses = []
    for _ in range(20):
        t, ones = torch.rand(64, 1), torch.ones(64, 1)

        def residuals(net: Any, t: Tensor = t, ones: Tensor = ones) -> Tensor:
            return torch.func.jvp(net, (t,), (ones,))[1] - (3 * t).cos()

        losses.append(float(optimizer.step(residuals)))
    assert optimizer.diagnostics["rows"] == 64
    assert losses[-1] < 1e-3 * losses[0]
