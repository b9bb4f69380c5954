"""Every bad input gives one typed error that says what to do, and leaves nothing half-done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.networks import mlp
from support.steps import one_step
from torch import Tensor, nn

import kfac_fx
from kfac_fx import errors


def make(net: nn.Module, **options: Any) -> kfac_fx.Preconditioner:
    given = {"likelihood": "categorical", "damping": 1e-2} | options
    return kfac_fx.Preconditioner(net, **given)


@pytest.fixture
def net() -> nn.Module:
    return kfac_fx.transform(mlp(4, 5, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4)


@pytest.fixture
def y() -> Tensor:
    return torch.randint(3, (6,))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def cycle(preconditioner: kfac_fx.Preconditioner, net: nn.Module, x: Tensor, y: Tensor) -> None:
    one_step(preconditioner, net, x, lambda outputs: F.cross_entropy(outputs, y), y)


def snapshot(preconditioner: kfac_fx.Preconditioner) -> list[Tensor]:
    return [factor.clone() for group in preconditioner.factors.values() for factor in group]


def assert_works(net: nn.Module, preconditioner: kfac_fx.Preconditioner) -> None:
    """The next proper cycle runs as if nothing had happened."""
    cycle(preconditioner, net, torch.randn(6, 4), torch.randint(3, (6,)))
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert all(factor.isfinite().all() for factor in snapshot(preconditioner))


# ------------------------------------------------------------------------------------- transform
class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line to be named
            x = -x
        return self.fc(x)


def test_untraceable_model_without_inputs() -> None:
    with pytest.raises(errors.CaptureError) as caught:
        kfac_fx.transform(Untraceable())
    message = str(caught.value)
    line = Untraceable.forward.__code__.co_firstlineno + 1
    assert "example_inputs" in message
    assert f"test_bad_input.py:{line}" in message or f"line {line}" in message
    assert "if x.sum() > 0" in message


def test_model_that_fails_by_itself() -> None:
    """An exception of the model on the example inputs is chained, not swallowed."""
    with pytest.raises(errors.CaptureError) as caught:
        kfac_fx.transform(Untraceable(), torch.randn(2, 7))
    assert caught.value.__cause__ is not None


def frozen() -> nn.Module:
    return mlp(4, 5, 3).requires_grad_(False)


@pytest.mark.parametrize("build", [nn.Tanh, nn.Identity, frozen], ids=["tanh", "empty", "frozen"])
def test_no_trainable_parameters(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(errors.NoParametersError):
        kfac_fx.transform(build())


def test_everything_excluded() -> None:
    """Nothing is left to precondition."""
    with pytest.raises(errors.NoParametersError):
        kfac_fx.transform(mlp(4, 5, 3), exclude=("*",))


class Cumulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.phase = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.phase.cumsum(0)


def test_strict_names_the_fallback() -> None:
    with pytest.raises(errors.CoverageError, match="phase"):
        kfac_fx.transform(Cumulated(), strict=True)
    assert kfac_fx.transform(mlp(4, 5, 3), strict=True).curvature.blocks


def test_fallback_is_reported() -> None:
    curvature = kfac_fx.transform(Cumulated()).curvature
    block = curvature.blocks["phase"]
    assert block.approximation == "diagonal" and block.reason
    assert "phase" in str(curvature)


OPTIONS = [
    ({"structure": "block_triangular"}, "block_diagonal"),
    ({"weight_sharing": "repeat"}, "reduce"),
]


@pytest.mark.parametrize("options, valid", OPTIONS, ids=lambda one: str(one))
def test_unknown_option_of_transform(options: dict[str, Any], valid: str) -> None:
    with pytest.raises(errors.UnknownOptionError, match=valid) as caught:
        kfac_fx.transform(mlp(4, 5, 3), **options)
    assert isinstance(caught.value, ValueError)


def test_couplings_that_were_not_recorded() -> None:
    net = kfac_fx.transform(mlp(4, 5, 3), structure="block_diagonal")
    with pytest.raises(errors.UnknownOptionError, match="records no cross factors"):
        kfac_fx.Preconditioner(net, structure="block_tridiagonal")


# -------------------------------------------------------------------------------- preconditioner
@pytest.mark.parametrize(
    "options, valid",
    [
        ({"likelihood": "categorial"}, ("categorical", "bernoulli", "normal")),
        ({"fisher": "true"}, ("sampled", "exact", "empirical")),
    ],
    ids=["likelihood", "fisher"],
)
def test_unknown_option(net: nn.Module, options: dict[str, Any], valid: tuple[str, ...]) -> None:
    """The message lists what is valid."""
    with pytest.raises(errors.UnknownOptionError) as caught:
        make(net, **options)
    assert all(name in str(caught.value) for name in valid)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_bad_damping(net: nn.Module, damping: float) -> None:
    """Damping that is not positive and finite."""
    with pytest.raises(errors.DampingError) as caught:
        make(net, damping=damping)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "options",
    [
        {"statistics_every": 0},
        {"refresh_every": -1},
        {"ema_decay": 1.5},
        {"trust_region": -1.0},
    ],
    ids=str,
)
def test_bad_numbers(net: nn.Module, options: dict[str, Any]) -> None:
    """Periods, decays and limits out of their range."""
    with pytest.raises((errors.KFACError, ValueError)):
        make(net, **options)


def test_net_that_was_not_transformed() -> None:
    with pytest.raises(errors.KFACError, match="transform"):
        make(mlp(4, 5, 3))


def test_all_errors_have_one_root() -> None:
    named = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(named) > 10 and all(issubclass(one, errors.KFACError) for one in named)


# --------------------------------------------------------------------------------------- observe
BAD_TARGETS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "too few": ("categorical", lambda f: torch.zeros(5, dtype=torch.long)),
    "one-hot": ("categorical", lambda f: torch.zeros(6, 3)),
    "floating": ("categorical", lambda f: torch.zeros(6)),
    "bernoulli shape": ("bernoulli", lambda f: torch.zeros(6)),
    "normal shape": ("normal", lambda f: torch.zeros(6, 2)),
}


@pytest.mark.parametrize("kind", BAD_TARGETS)
def test_targets_that_do_not_fit(net: nn.Module, x: Tensor, kind: str) -> None:
    likelihood, targets = BAD_TARGETS[kind]
    preconditioner = make(net, likelihood=likelihood, fisher="empirical")
    outputs = net(x)
    with pytest.raises(errors.LikelihoodError) as caught:
        preconditioner.observe(outputs, targets(outputs))
    assert isinstance(caught.value, ValueError)


def test_targets_out_of_range(net: nn.Module, x: Tensor) -> None:
    preconditioner = make(net, fisher="empirical")
    with pytest.raises(errors.LikelihoodError):
        preconditioner.observe(net(x), torch.full((6,), 7))


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_outputs_without_a_class_axis(fisher: str) -> None:
    net = kfac_fx.transform(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    preconditioner = make(net, fisher=fisher)
    with pytest.raises(errors.LikelihoodError):
        preconditioner.observe(net(torch.randn(6, 4)), torch.zeros(6, dtype=torch.long))


def test_observe_works_after_an_error(net: nn.Module, x: Tensor, y: Tensor) -> None:
    preconditioner = make(net, fisher="empirical")
    outputs = net(x)
    with pytest.raises(errors.LikelihoodError):
        preconditioner.observe(outputs, y[:3])
    preconditioner.observe(outputs, y)
    F.cross_entropy(outputs, y).backward()
    preconditioner.step()


def test_empirical_without_targets(net: nn.Module, x: Tensor) -> None:
    preconditioner = make(net, fisher="empirical")
    with pytest.raises((errors.ObservationError, errors.LikelihoodError), match="targets"):
        preconditioner.observe(net(x))


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_observe_after_backward(net: nn.Module, x: Tensor, y: Tensor, fisher: str) -> None:
    """At the latest in step(); the gradients stay, and the next cycle is not refused."""
    preconditioner = make(net, fisher=fisher)
    outputs = net(x)
    F.cross_entropy(outputs, y).backward()
    before = gradients(net)
    with pytest.raises(errors.ObservationError, match="backward"):
        preconditioner.observe(outputs, y)
        preconditioner.step()
    after = gradients(net)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert_works(net, preconditioner)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_observe_twice(net: nn.Module, x: Tensor, y: Tensor, fisher: str) -> None:
    """A forward is observed once; the step goes on as if the second call had not been."""
    preconditioner = make(net, fisher=fisher)
    outputs = net(x)
    preconditioner.observe(outputs, y)
    with pytest.raises(errors.ObservationError):
        preconditioner.observe(outputs, y)
    F.cross_entropy(outputs, y).backward()
    preconditioner.step()
    assert_works(net, preconditioner)


FOREIGN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "detached": lambda net, x: net(x).detach(),
    "a leaf": lambda net, x: torch.randn(6, 3, requires_grad=True),
    "another model": lambda net, x: mlp(4, 5, 3)(x),
    "no grad": lambda net, x: without_grad(net, x),
}


def without_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_outputs_of_another_network(
    net: nn.Module, x: Tensor, y: Tensor, kind: str, fisher: str
) -> None:
    """The empirical estimator may notice in step(), when no statistics have come."""
    preconditioner = make(net, fisher=fisher)
    outputs = FOREIGN[kind](net, x)
    with pytest.raises(errors.ObservationError):
        preconditioner.observe(outputs, y)
        F.cross_entropy(outputs, y).backward()
        preconditioner.step()
    assert_works(net, preconditioner)


def test_outputs_that_are_not_a_tensor(net: nn.Module, x: Tensor) -> None:
    with pytest.raises((errors.ObservationError, errors.LikelihoodError)):
        make(net).observe({"logits": net(x)})


# ------------------------------------------------------------------------------------------ step
def test_step_before_statistics(net: nn.Module, x: Tensor, y: Tensor) -> None:
    preconditioner = make(net)
    F.cross_entropy(net(x), y).backward()
    before = gradients(net)
    with pytest.raises(errors.StatisticsError, match="observe"):
        preconditioner.step()
    after = gradients(net)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert_works(net, preconditioner)


def test_apply_and_refresh_before_statistics(net: nn.Module) -> None:
    preconditioner = make(net)
    with pytest.raises(errors.StatisticsError):
        preconditioner.apply({"0.weight": torch.randn(5, 4)})
    with pytest.raises(errors.StatisticsError):
        preconditioner.refresh()


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_step_without_gradients(net: nn.Module, x: Tensor, y: Tensor, fisher: str) -> None:
    preconditioner = make(net, fisher=fisher)
    preconditioner.observe(net(x), y)
    with pytest.raises(errors.GradientError, match="backward"):
        preconditioner.step()
    assert all(p.grad is None for p in net.parameters())


def test_unknown_name_in_apply(net: nn.Module, x: Tensor, y: Tensor) -> None:
    preconditioner = make(net)
    cycle(preconditioner, net, x, y)
    with pytest.raises(errors.KFACError, match="wight"):
        preconditioner.apply({"0.wight": torch.randn(5, 4)})
    with pytest.raises(errors.KFACError, match="weight"):
        preconditioner.apply({"0.weight": torch.randn(4, 5)})


@pytest.mark.parametrize("change", ["nothing", "other blocks", "other shapes"])
def test_state_of_another_net(net: nn.Module, x: Tensor, y: Tensor, change: str) -> None:
    preconditioner = make(net)
    cycle(preconditioner, net, x, y)
    before, state = snapshot(preconditioner), {}
    if change != "nothing":
        hidden = 7 if change == "other shapes" else 5
        blocks = [nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3), nn.Linear(3, 3)]
        other = nn.Sequential(*blocks[: 3 if change == "other shapes" else 4])
        other_net = kfac_fx.transform(other)
        other_preconditioner = make(other_net)
        cycle(other_preconditioner, other_net, x, y)
        state = other_preconditioner.state_dict()
    with pytest.raises(errors.KFACError):
        preconditioner.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(preconditioner), before, strict=True))
    assert_works(net, preconditioner)


# ------------------------------------------------------------------------------- non-finite values
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_non_finite_statistics(
    net: nn.Module, x: Tensor, y: Tensor, fisher: str, value: float,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Counted and logged; the averages stay, and the poisoned gradients become zero."""
    preconditioner = make(net, fisher=fisher, statistics_every=1, refresh_every=1)
    cycle(preconditioner, net, x, y)
    before = snapshot(preconditioner)
    bad = x.clone()
    bad[0, 0] = value
    with caplog.at_level(logging.WARNING, logger="kfac_fx"):
        cycle(preconditioner, net, bad, y)
    assert preconditioner.skipped_statistics == 1
    assert any(record.name.startswith("kfac_fx") for record in caplog.records)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(preconditioner), before, strict=True))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())
    assert_works(net, preconditioner)
    assert preconditioner.skipped_statistics == 1


def test_non_finite_first_batch(net: nn.Module, x: Tensor, y: Tensor) -> None:
    preconditioner = make(net)
    cycle(preconditioner, net, x * float("nan"), y)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())
    assert_works(net, preconditioner)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients(
    net: nn.Module, x: Tensor, y: Tensor, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The statistics of such a step are good, and kept; its gradients are not."""
    preconditioner = make(net)
    outputs = net(x)
    preconditioner.observe(outputs, y)
    F.cross_entropy(outputs, y).backward()
    net.get_parameter("2.bias").grad[0] = value
    with caplog.at_level(logging.WARNING, logger="kfac_fx"):
        preconditioner.step()
    assert preconditioner.skipped_gradients == 1 and preconditioner.skipped_statistics == 0
    assert any(record.name.startswith("kfac_fx") for record in caplog.records)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())
    assert_works(net, preconditioner)


# --------------------------------------------------------------------------- parameters that change
def resize(model: nn.Module) -> None:
    model.get_parameter("0.weight").data = torch.randn(5, 6)


def replace(model: nn.Module) -> None:
    model.get_submodule("0").weight = nn.Parameter(torch.randn(5, 4))


def retype(model: nn.Module) -> None:
    model.double()


def to_meta(model: nn.Module) -> None:
    model.to("meta")


@pytest.mark.parametrize("change", [resize, replace, retype, to_meta])
def test_parameter_changed(
    net: nn.Module, x: Tensor, y: Tensor, change: Callable[[nn.Module], None]
) -> None:
    """Found at the next step (or observe), by name."""
    preconditioner = make(net)
    cycle(preconditioner, net, x, y)
    net.zero_grad()
    before = snapshot(preconditioner)
    change(net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(errors.ParameterChangedError, match="weight"):
        preconditioner.step()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(preconditioner), before, strict=True))


def test_optimizer_updates_are_no_change(net: nn.Module, x: Tensor, y: Tensor) -> None:
    preconditioner = make(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(3):
        cycle(preconditioner, net, x, y)
        optimizer.step()
    net.load_state_dict(mlp(4, 5, 3).state_dict())
    cycle(preconditioner, net, x, y)


# ------------------------------------------------------------------------------- frozen, excluded
def test_frozen_parameters_are_listed_and_untouched(x: Tensor, y: Tensor) -> None:
    model = mlp(4, 5, 3)
    model[0].requires_grad_(False)
    net = kfac_fx.transform(model)
    assert set(net.curvature.frozen) == {"0.weight", "0.bias"}
    assert set(net.curvature.blocks) == {"2"}
    before = [p.clone() for p in model[0].parameters()]
    cycle(make(net), net, x, y)
    assert all(torch.equal(a, b) for a, b in zip(model[0].parameters(), before, strict=True))
    assert all(p.grad is None and not p.requires_grad for p in model[0].parameters())


@pytest.mark.parametrize("pattern", ["0", "0.*", ("0.weight", "0.bias")])
def test_excluded_parameters_keep_their_gradients(
    x: Tensor, y: Tensor, pattern: str | tuple[str, ...]
) -> None:
    model = mlp(4, 5, 3)
    net = kfac_fx.transform(model, exclude=(pattern,) if isinstance(pattern, str) else pattern)
    assert set(net.curvature.excluded) == {"0.weight", "0.bias"}
    F.cross_entropy(model(x), y).backward()
    plain = gradients(model)
    cycle(make(net), net, x, y)
    torch.testing.assert_close(model[0].weight.grad, plain["0.weight"])
    torch.testing.assert_close(model[0].bias.grad, plain["0.bias"])
    assert not torch.allclose(model[2].weight.grad, plain["2.weight"])
