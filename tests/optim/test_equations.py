"""Iterations of KFAC on residuals of equations: how many passes they take, and what of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.likelihoods.batch import BatchLikelihood, batch_likelihood
from kfac_fx.likelihoods.named import likelihood_of
from kfac_fx.optim import KFACOptions
from kfac_fx.optim.few_rows import FewRows
from kfac_fx.optim.last_step import LastStep
from kfac_fx.optim.products import Parameters, root_derivatives
from kfac_fx.optim.situation import Situation, Update
from kfac_fx.torch_internals.modes import function_modes

Net = Callable[[Tensor], Tensor]


def residuals(net: Net, x: Tensor) -> Tensor:
    """Return u'' + u of the points."""
    along = torch.ones_like(x)

    def first(z: Tensor) -> Tensor:
        return torch.func.jvp(net, (z,), (along,))[1]

    return torch.func.jvp(first, (x,), (along,))[1] + net(x) - torch.sin(3 * x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def points(seed: int = 0) -> Tensor:
    return torch.rand(32, 1, generator=torch.Generator().manual_seed(seed))


class Calls:
    """A closure that counts its calls, and whether a mode of kfac_fx was on in all of them."""

    def __init__(self) -> None:
        self.count = 0
        self.in_mode = True

    def batch(self, x: Tensor) -> Callable[[Net], Tensor]:
        def closure(net: Net) -> Tensor:
            self.count += 1
            self.in_mode = self.in_mode and function_modes() == 1
            return residuals(net, x)

        return closure


def run(
    fresh: bool, steps: int, calls: Calls, exact_rows: int = 0
) -> tuple[list[int], kfac_fx.KFAC]:
    """Return how often the closure was called in each step."""
    net = kfac_fx.transform(network())
    generator = torch.Generator().manual_seed(0)
    options = KFACOptions(exact_rows=exact_rows)
    optimizer = kfac_fx.KFAC(net, "residual", generator=generator, options=options)
    counts = []
    for step in range(steps):
        before = calls.count
        optimizer.step(calls.batch(points(step if fresh else 0)))
        counts.append(calls.count - before)
    return counts, optimizer


def test_a_compiler_sees_no_mode() -> None:
    calls = Calls()
    net = kfac_fx.transform(network())
    optimizer = kfac_fx.KFAC(net, "residual", compile="eager")
    first = float(optimizer.step(calls.batch(points())))
    for _ in range(3):
        last = float(optimizer.step(calls.batch(points())))
    assert last < first
    assert not calls.in_mode  # in the gradient's pass


@pytest.mark.parametrize("fresh", [False, True])
def test_passes_of_an_iteration(fresh: bool) -> None:
    """The gradient, the products and the loss after the step; before it, where points are new."""
    calls = Calls()
    counts, optimizer = run(fresh, 5, calls)
    assert optimizer.rejected_steps == 0
    # Iterations 1 to 3 and 5 have statistics, too.
    products = 2  # duals are tried first
    assert counts[3] == 2 + products + fresh
    assert counts[4] == counts[3] + 1
    assert calls.in_mode


@pytest.mark.parametrize("fresh", [False, True])
def test_passes_of_an_iteration_with_few_rows(fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the gradient and of the rows, and one for each step that is tried."""
    calls = Calls()
    tried: list[int] = []
    make = FewRows.make

    def counted(rows: FewRows, at: Situation) -> Update | None:
        tried.append(at.iteration)
        return make(rows, at)

    monkeypatch.setattr(FewRows, "make", counted)
    counts, _ = run(fresh, 5, calls, 1024)
    # Steps after the first are judged where they began, too, if the points are new.
    assert counts[3] == 2 + tried.count(4) + fresh


def test_what_is_known_is_what_a_pass_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    _, known = run(False, 6, Calls())
    monkeypatch.setattr(LastStep, "began_at", lambda *_: None)
    _, told = run(False, 6, Calls())
    for name, value in told.diagnostics.items():
        if not name.startswith("seconds"):
            assert known.diagnostics[name] == pytest.approx(value, rel=1e-6), name


def test_a_loss_of_zero_tells_nothing() -> None:
    last = LastStep()
    assert last.began_at(1.0) is None
    last.objectives = 2.0, 1.0
    assert last.began_at(1.0) == 2.0
    assert last.began_at(1.0 + 1e-6) is None
    assert last.began_at(float("nan")) is None
    last.objectives = 2.0, 0.0
    assert last.began_at(0.0) is None


@pytest.mark.parametrize("known", [True, False])
def test_objectives_are_part_of_the_state(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of earlier versions have none, and a pass tells them."""
    _, optimizer = run(False, 4, Calls())
    state = optimizer.state_dict()
    if not known:
        del state["kfac"]["before"][2]
    other = kfac_fx.KFAC(kfac_fx.transform(network()), "residual")
    other.load_state_dict(state)
    found: list[float | None] = []
    began_at = LastStep.began_at

    def heard(last: LastStep, objective: float) -> float | None:
        found.append(began_at(last, objective))
        return found[-1]

    monkeypatch.setattr(LastStep, "began_at", heard)
    # The parameters are not part of an optimizer's state.
    with torch.no_grad():
        pairs = zip(other.param_groups, optimizer.param_groups, strict=True)
        for mine, its in pairs:
            for p, q in zip(mine["params"], its["params"], strict=True):
                p.copy_(q)
    other.step(Calls().batch(points()))
    assert [value is not None for value in found] == [known]


class Doubled(torch.autograd.Function):
    """A function of the user's that has no rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(*_: object) -> None:
        pass

    @staticmethod
    def jvp(_: object, tangent: Tensor) -> Tensor:
        return 2 * tangent


@pytest.mark.parametrize("refuses", [False, True])
def test_products_of_all_directions_in_one_pass(refuses: bool) -> None:
    """Where vmap does not take the user's code, they have a pass each."""
    net, x = network(), points()
    likelihood = likelihood_of("residual")
    calls = 0

    def outputs(given: Parameters) -> BatchLikelihood:
        nonlocal calls
        calls += 1

        def call(z: Tensor) -> Tensor:
            return torch.func.functional_call(net, dict(given), (z,))

        found = residuals(call, x)
        if refuses:
            found = Doubled.apply(found)
        return batch_likelihood(likelihood, found)

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    directions = [[torch.randn_like(p) for p in parameters.values()] for _ in range(3)]
    alone = [root_derivatives(outputs, parameters, [one]).rows for one in directions]
    calls = 0
    together = root_derivatives(outputs, parameters, directions).rows
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert calls == (2 + 3 if refuses else 2)  # and the first try, by duals
