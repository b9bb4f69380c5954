"""Factors of the per-case gradients of calls in forward mode, and what their streams leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.oracles import close
from torch import Tensor, nn

import kfac_fx
from kfac_fx import errors

pytestmark = pytest.mark.usefixtures("float64")
LAYERS = ("0", "2", "4")
Net = Callable[[Tensor], Tensor]


def network(outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    last = nn.Linear(4, outputs, bias=False)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), last)


# ------------------------------------------------------------------------- per-case gradients
def values_and_slopes(net: Net, x: Tensor) -> Tensor:
    """Two outputs a case, of one call of the network."""
    value, slope = torch.func.jvp(net, (x,), (torch.ones_like(x),))
    return torch.cat([value.square() + slope, 3 * slope * value.sin()], 1)


def gradients_by_definition(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """J of every case and output, [cases * outputs, d_out, d_in], by automatic differentiation."""

    def one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        def net(z: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (z,))

        return values_and_slopes(net, row.unsqueeze(0))[0]

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.vmap(torch.func.jacrev(one), (None, 0))(parameters, x)
    result = {}
    for name in LAYERS:
        parts = [found[f"{name}.weight"]]
        if f"{name}.bias" in found:
            parts.append(found[f"{name}.bias"].unsqueeze(-1))
        result[name] = torch.cat(parts, -1).flatten(0, 1)
    return result


@pytest.mark.parametrize("compile", [False, "eager"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_joint_factors_are_those_of_per_case_gradients(
    fisher: str, own: bool, compile: bool | str
) -> None:
    """A ~ sum J^T J, G ~ sum J J^T, tr A tr G = sum |J|^2 / N, whichever pass records them."""
    if fisher == "sampled":  # one output: then the sign of a draw cancels
        model, forward = network(), lambda net, x: values_and_slopes(net, x)[:, :1]
    else:
        model, forward = network(), values_and_slopes
    x = torch.randn(7, 2)
    net = kfac_fx.transform(model, structure="block_diagonal")
    preconditioner = kfac_fx.Preconditioner(
        net, "residual", fisher=fisher, forward=forward, compile=compile
    )
    outputs = forward(net, x)
    preconditioner.observe(outputs, inputs=x if own else None)
    outputs.sum().backward()
    preconditioner.step()
    for name, J in gradients_by_definition(model, x).items():
        J = J[::2] if fisher == "sampled" else J
        A, G = preconditioner.factors[name]
        close([A / A.trace()], [torch.einsum("noi,noj->ij", J, J) / J.square().sum()])
        close([G / G.trace()], [torch.einsum("noi,npi->op", J, J) / J.square().sum()])
        close([A.trace() * G.trace()], [J.square().sum() / len(x)])


def test_joint_factors_of_empirical_statistics() -> None:
    """The derivative of the loss is the residual's times that of the outputs."""
    model, x = network(), torch.randn(7, 2)
    net = kfac_fx.transform(model, structure="block_diagonal")
    preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="empirical")
    outputs = values_and_slopes(net, x)[:, :1]
    preconditioner.observe(outputs, torch.zeros_like(outputs))
    (0.5 * outputs.square().mean()).backward()
    preconditioner.step()
    for name, J in gradients_by_definition(model, x).items():
        J = J[::2] * outputs.detach().unsqueeze(-1)
        A, G = preconditioner.factors[name]
        close([A / A.trace()], [torch.einsum("noi,noj->ij", J, J) / J.square().sum()])
        close([A.trace() * G.trace()], [J.square().sum() / len(x)])


def test_several_draws_have_the_factors_of_one() -> None:
    """Signs cancel in the gradient of one output, so all draws are the same."""
    model, x = network(), torch.randn(7, 2)
    found = []
    for draws in (1, 3):
        curvature = kfac_fx.estimate(
            kfac_fx.transform(model, structure="block_diagonal"),
            [x],
            "residual",
            forward=lambda net, x: values_and_slopes(net, x)[:, :1],
            draws=draws,
        )
        found.append([f for fs in curvature.factors.values() for f in fs])
    close(*found)


def test_a_step_without_derivatives_has_factors_of_single_uses() -> None:
    """What one step has seen in forward mode is nothing for the next."""
    model, x = network(), torch.randn(7, 2)
    net = kfac_fx.transform(model, structure="block_diagonal")
    found = []
    for equations in (True, False):
        preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="exact", ema_decay=0.0)
        for forward in ([values_and_slopes] if equations else []) + [lambda net, x: net(x)]:
            outputs = forward(net, x)
            preconditioner.observe(outputs)
            outputs.sum().backward()
            preconditioner.step()
        found.append([f.clone() for fs in preconditioner.factors.values() for f in fs])
    close(*found)


def test_uses_with_positions_are_joined_by_position() -> None:
    """[cases, points, features]: a point's gradient is of its own, as in the expand form."""
    model, x = network(), torch.randn(3, 4, 2)
    found = []
    for rows in (x, x.flatten(0, 1)):
        net = kfac_fx.transform(model, structure="block_diagonal")
        preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="exact")
        value, slope = torch.func.jvp(net, (rows,), (torch.ones_like(rows),))
        preconditioner.observe(value.square() + slope)
        (value.square() + slope).sum().backward()
        preconditioner.step()
        found.append({name: A.trace() * G.trace() for name, (A, G) in net_factors(preconditioner)})
        shapes = [(A / A.trace(), G / G.trace()) for _, (A, G) in net_factors(preconditioner)]
        found.append([f.clone() for pair in shapes for f in pair])
    close(found[1], found[3])
    for name in LAYERS:  # N counts cases: four points each
        close([found[0][name]], [4 * found[2][name]])


class Twice(nn.Module):
    """A network that is used twice in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.body(2 * x)


def test_two_uses_in_a_graph_are_two_calls() -> None:
    """Where positions are counted at run time, joint factors count as one."""
    twice, x = Twice(), torch.randn(7, 2)
    found = []
    for model, forward in (
        (twice, values_and_slopes),
        (twice.body, lambda net, x: values_and_slopes(lambda z: net(z) + net(2 * z), x)),
    ):
        net = kfac_fx.transform(model, structure="block_diagonal")
        preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="exact")
        outputs = forward(net, x)
        preconditioner.observe(outputs)
        outputs.sum().backward()
        preconditioner.step()
        found.append([f.clone() for fs in preconditioner.factors.values() for f in fs])
        model.zero_grad()
    close(*found)


def net_factors(preconditioner: kfac_fx.Preconditioner) -> list[tuple[str, list[Tensor]]]:
    return [(name, list(preconditioner.factors[name])) for name in LAYERS]


# ------------------------------------------------------------------------------ what they leave
def equation(net: Net, x: Tensor) -> Tensor:
    """u_t - u_xx, with one more call for the second derivative."""
    time, space = (row.expand_as(x) for row in torch.eye(2))

    def slope(z: Tensor) -> Tensor:
        return torch.func.jvp(net, (z,), (space,))[1]

    return torch.func.jvp(net, (x,), (time,))[1] - torch.func.jvp(slope, (x,), (space,))[1]


def recorded(
    net: Any, x: Tensor, forward: Callable[[Any, Tensor], Tensor] = equation, **options: Any
) -> kfac_fx.Preconditioner:
    preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="exact", **options)
    outputs = forward(net, x)
    preconditioner.observe(outputs)
    outputs.square().mean().backward()
    preconditioner.step()
    return preconditioner


def factors(preconditioner: kfac_fx.Preconditioner) -> list[Tensor]:
    return [f.clone() for pair in preconditioner.factors.values() for f in pair]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_whose_gradients_are_zero(dtype: torch.dtype) -> None:
    """A last layer that begins at zero hands nothing on; rows may have any scale for the rest."""
    model = network().to(dtype)
    nn.init.zeros_(model[4].weight)
    x = torch.rand(6, 2, dtype=dtype)
    preconditioner = recorded(kfac_fx.transform(model, structure="block_diagonal"), x)
    assert preconditioner.skipped_statistics == 0
    for name in ("0", "2"):
        A, G = preconditioner.factors[name]
        assert A.trace() > 0.1
        assert not G.any()
    assert preconditioner.factors["4"][1].trace() > 0


def test_another_preconditioner_on_the_module_changes_nothing() -> None:
    """Factors beside cross factors are of single uses, whatever had the taps before."""
    x = torch.rand(6, 2)
    found = []
    for others in (False, True):
        net = kfac_fx.transform(network())
        if others:
            recorded(net, x, structure="block_diagonal")
            net.zero_grad()
        found.append(factors(recorded(net, x, structure="block_tridiagonal")))
    close(*found)


def test_an_estimate_between_steps_changes_nothing() -> None:
    x = torch.rand(6, 2)
    found = []
    for estimated in (False, True):
        net = kfac_fx.transform(network())
        preconditioner = kfac_fx.Preconditioner(
            net, "residual", fisher="exact", structure="block_diagonal"
        )
        if estimated:
            kfac_fx.estimate(net, [x], "residual", structure="block_tridiagonal")
        outputs = equation(net, x)
        preconditioner.observe(outputs)
        outputs.square().mean().backward()
        preconditioner.step()
        found.append(factors(preconditioner))
    close(*found)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_backwards_that_nobody_asked_keep_no_rows(fisher: str) -> None:
    """As of a warm-up with another optimizer, while taps are on."""
    net, x = kfac_fx.transform(network(), structure="block_diagonal"), torch.rand(6, 2)
    preconditioner = kfac_fx.Preconditioner(net, "residual", fisher=fisher)
    for _ in range(3):
        equation(net, x).square().mean().backward()
        assert not any(state.streams for state in preconditioner.recorder.sources.states)


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_forward_mode_beside_the_outputs_changes_nothing(fisher: str) -> None:
    """As of a derivative that is looked at and not trained."""
    x, found = torch.rand(6, 2), []
    for looked in (False, True):
        net = kfac_fx.transform(network(), structure="block_diagonal")
        preconditioner = kfac_fx.Preconditioner(net, "residual", fisher=fisher)
        if looked:
            equation(net, x)
        outputs = net(x) + net(2 * x)
        preconditioner.observe(outputs, torch.zeros_like(outputs))
        (0.5 * outputs.square().mean()).backward()
        preconditioner.step()
        found.append(factors(preconditioner))
    close(*found)


def test_empirical_statistics_of_another_equation_in_the_loss() -> None:
    """It cannot be told apart, and joint factors must not hide it."""
    net, x = kfac_fx.transform(network(), structure="block_diagonal"), torch.rand(6, 2)
    preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="empirical")
    outputs = equation(net, x)
    preconditioner.observe(outputs, torch.zeros_like(outputs))
    (0.5 * outputs.square().mean() + equation(net, x + 1).square().mean()).backward()
    with pytest.raises(errors.ObservationError, match="not observed"):
        preconditioner.step()


def test_all_draws_are_in_the_factors_of_inputs() -> None:
    """With several outputs the joint A depends on the draw as well."""
    net, x = kfac_fx.transform(network(2), structure="block_diagonal"), torch.rand(4, 2)
    want = kfac_fx.estimate(net, [x], "residual", forward=equation, fisher="exact").factors
    found = kfac_fx.estimate(net, [x], "residual", forward=equation, draws=300).factors
    for name, (A, G) in want.items():
        assert (found[name][0] - A).norm() < 0.02 * A.norm(), name
        assert (found[name][1] - G).norm() < 0.1 * G.norm(), name


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_a_forward_before_the_step_before_has_joint_factors(fisher: str) -> None:
    """As of a loop that runs the next forward early."""
    x, found = torch.rand(6, 2), []
    for early in (False, True):
        net = kfac_fx.transform(network(), structure="block_diagonal")
        preconditioner = kfac_fx.Preconditioner(net, "residual", fisher=fisher, ema_decay=0.0)
        outputs = equation(net, x)
        for _ in range(2):
            preconditioner.observe(outputs, torch.zeros_like(outputs))
            (0.5 * outputs.square().mean()).backward()
            following = equation(net, x) if early else None
            preconditioner.step()
            outputs = equation(net, x) if following is None else following
        found.append(factors(preconditioner))
    close(*found)


def test_moments_of_ekfac_are_refused_with_the_way_out() -> None:
    net, x = kfac_fx.transform(network(), structure="block_diagonal", ekfac=True), torch.rand(6, 2)
    with pytest.raises(errors.ObservationError, match="ekfac=False"):
        for _ in range(2):  # the first statistics have no bases yet
            recorded(net, x, tikhonov="ekfac")
