"""Losses with derivatives of the network inside, and networks that are called several times.

In forward mode every layer is used once for the values and once for each derivative,
s' = W x' without the bias. The reference writes these uses out as Taylor coefficients. Factors of
such calls are those of per-case gradients, sums over the uses of a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.oracles import close
from torch import Tensor, nn

import kfac_fx
from kfac_fx import errors, likelihoods

pytestmark = pytest.mark.usefixtures("float64")
LAYERS = ("0", "2", "4")
WEIGHTS = 1.0, 0.3
SUM = likelihoods.Sum([("residual", WEIGHTS[0]), ("residual", WEIGHTS[1])])
Net = Callable[[Tensor], Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)
    )


def laplacian(net: Net, x: Tensor) -> Tensor:
    total = torch.zeros(())
    for direction in torch.eye(x.shape[1]):
        along = direction.expand_as(x)

        def slope(z: Tensor, along: Tensor = along) -> Tensor:
            return torch.func.jvp(net, (z,), (along,))[1]

        total = total + torch.func.jvp(slope, (x,), (along,))[1]
    return total


def poisson(net: Net, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, edge = batch
    return laplacian(net, x) + net(x) * x[:, :1], net(edge)


# ------------------------------------------------------------------------------ written-out uses
@dataclass(frozen=True)
class Use:
    """One use of a layer: rows [N, inputs], with the homogeneous coordinate, and outputs."""

    layer: str
    call: tuple[int, int]
    rows: Tensor
    s: Tensor


def layer(
    model: nn.Sequential, name: str, call: int, parts: list[Tensor], uses: list[Use]
) -> list[Tensor]:
    linear = model.get_submodule(name)
    result = []
    for index, part in enumerate(parts):
        rows = part.detach()
        s = part @ linear.weight.T
        if linear.bias is not None:
            value = float(index == 0)
            rows = torch.cat([rows, torch.full_like(rows[:, :1], value)], 1)
            s = s + value * linear.bias
        uses.append(Use(name, (call, index), rows, s))
        result.append(s)
    return result


def taylor(model: nn.Sequential, x: Tensor, along: Tensor, call: int, uses: list[Use]) -> Tensor:
    """Second derivative; value, both first derivatives (they are equal) and the second."""
    parts = [x, along, along, torch.zeros_like(x)]
    for name in LAYERS:
        s, one, two, both = layer(model, name, call, parts, uses)
        if name == LAYERS[-1]:
            return both
        h = torch.tanh(s)
        first = 1 - h**2
        parts = [h, first * one, first * two, first * both - 2 * h * first * one * two]
    raise AssertionError


def plain(model: nn.Sequential, x: Tensor, call: int, uses: list[Use]) -> Tensor:
    parts = [x]
    for name in LAYERS:
        parts = layer(model, name, call, parts, uses)
        if name != LAYERS[-1]:
            parts = [torch.tanh(part) for part in parts]
    return parts[0]


def written_out(
    model: nn.Sequential, batch: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], list[Use]]:
    x, edge = batch
    uses: list[Use] = []
    total = torch.zeros(())
    for call, direction in enumerate(torch.eye(2)):
        total = total + taylor(model, x, direction.expand_as(x), call, uses)
    outputs = total + plain(model, x, 2, uses) * x[:, :1], plain(model, edge, 3, uses)
    return outputs, uses


def per_case(outputs: tuple[Tensor, Tensor], uses: list[Use]) -> list[tuple[Use, Tensor]]:
    """The uses that the outputs depend on, with derivatives times sqrt(weight / terms)."""
    scaled = [(w / len(f)) ** 0.5 * f for w, f in zip(WEIGHTS, outputs, strict=True)]
    value = scaled[0].sum() + scaled[1].sum()  # a case has one output, and calls do not mix cases
    found = torch.autograd.grad(value, [u.s for u in uses], allow_unused=True, retain_graph=True)
    return [(use, g) for use, g in zip(uses, found, strict=True) if g is not None]


def moments(reached: list[tuple[Use, Tensor]]) -> dict[Any, tuple[Tensor, Tensor]]:
    """(A, G) of the layers and of neighbours; G divided by the number of uses."""
    by_layer = {n: {u.call: (u, g) for u, g in reached if u.layer == n} for n in LAYERS}
    result: dict[Any, tuple[Tensor, Tensor]] = {}
    for one, other in [(n, n) for n in LAYERS] + list(itertools.pairwise(LAYERS)):
        A, G = 0.0, 0.0
        for call in by_layer[one].keys() & by_layer[other].keys():
            (u, g), (v, h) = by_layer[one][call], by_layer[other][call]
            A = A + u.rows.T @ v.rows / len(u.rows)
            G = G + g.T @ h
        G = G / (len(by_layer[one]) * len(by_layer[other])) ** 0.5
        result[one if one == other else (one, other)] = A, G
    return result


def joint(reached: list[tuple[Use, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, G) of the layers by the per-case gradients of every call; tr A is that of the inputs."""
    result = {}
    for name in LAYERS:
        gradients: dict[int, Tensor] = {}
        size = torch.zeros(())
        for use, g in reached:
            if use.layer == name:
                more = torch.einsum("no,ni->noi", g, use.rows)
                call = use.call[0]
                gradients[call] = gradients[call] + more if call in gradients else more
                size = size + use.rows.square().sum() / len(use.rows)
        J = torch.cat([*gradients.values()])
        A, G = torch.einsum("noi,noj->ij", J, J), torch.einsum("noi,npi->op", J, J)
        result[name] = A * (size / A.trace()), G / size
    return result


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 2), torch.rand(4, 2)


# --------------------------------------------------------------------------------------- factors
@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
def test_factors_of_a_differential_equation(structure: str) -> None:
    model, points = network(), batch()
    net = kfac_fx.transform(model, structure=structure)
    preconditioner = kfac_fx.Preconditioner(net, SUM, fisher="exact")
    outputs = poisson(net, points)
    preconditioner.observe(outputs)
    (outputs[0].sum() + outputs[1].sum()).backward()
    preconditioner.step()
    reference, uses = written_out(model, points)
    close(outputs, reference)
    reached = per_case(reference, uses)
    want = moments(reached)
    # Cross factors are of single uses, and so must the factors be that they stand beside.
    blocks = joint(reached) if structure == "block_diagonal" else want
    for name in LAYERS:
        close(preconditioner.factors[name], blocks[name])
    assert len(preconditioner.cross_factors) == (2 if structure == "block_tridiagonal" else 0)
    for (child, parent), (A, G) in preconditioner.cross_factors.items():
        one, other = sorted((child, parent))
        if (child, parent) == (one, other):
            close((A, G), want[one, other])
        else:
            close((A.mT, G.mT), want[one, other])


def test_sampled_factors_of_residuals_have_the_exact_mean() -> None:
    model, points = network(), (torch.rand(2, 2), torch.rand(1, 2))
    many = points[0].repeat(200, 1), points[1].repeat(200, 1)
    net = kfac_fx.transform(model, structure="block_diagonal")
    runs = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        preconditioner = kfac_fx.Preconditioner(net, SUM, generator=generator)
        outputs = poisson(net, many)
        preconditioner.observe(outputs)
        (outputs[0].sum() + outputs[1].sum()).backward()
        preconditioner.step()
        runs.append({name: preconditioner.factors[name][1].clone() for name in LAYERS})
    want = joint(per_case(*written_out(model, points)))
    for name in LAYERS:
        draws = torch.stack([run[name] for run in runs])
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - want[name][1]).abs() <= 5 * error + 1e-12).all(), name


def test_two_calls_of_a_network() -> None:
    """Uses share the weight as positions do: A is their sum, G their mean."""
    model, x = network(), torch.randn(6, 2)
    once = kfac_fx.transform(model)
    factors = []
    for calls in (1, 2):
        preconditioner = kfac_fx.Preconditioner(
            once, "residual", fisher="exact", structure="block_tridiagonal"
        )
        outputs = sum(once(x) for _ in range(calls)) / calls**0.5
        preconditioner.observe(outputs)
        outputs.sum().backward()
        preconditioner.step()
        factors.append({n: [f.clone() for f in fs] for n, fs in preconditioner.factors.items()})
        factors[-1] |= {n: list(fs) for n, fs in preconditioner.cross_factors.items()}
    assert len(factors[0]) == 5
    for name, (A, G) in factors[0].items():
        close(factors[1][name], (2 * A, G / 2))


@pytest.mark.parametrize("compile", [False, "eager"])
@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_two_calls_in_a_pass_of_its_own(fisher: str, compile: bool | str) -> None:
    """As recorded in the forward; in a traced program too."""
    net, x = kfac_fx.transform(network()), torch.randn(6, 2)

    def forward(net: Net, x: Tensor) -> Tensor:
        return net(x) + net(2 * x)

    factors = []
    for inputs in (None, x):
        preconditioner = kfac_fx.Preconditioner(
            net,
            "residual",
            fisher=fisher,
            forward=forward,
            compile=compile,
            generator=torch.Generator().manual_seed(0),
        )
        outputs = forward(net, x)
        preconditioner.observe(outputs, inputs=inputs)
        outputs.sum().backward()
        preconditioner.step()
        groups = {**preconditioner.factors, **preconditioner.cross_factors}
        factors.append([f.clone() for fs in groups.values() for f in fs])
    close(*factors)


def test_closures_in_a_pass_of_its_own() -> None:
    """What a closure holds is no constant of a program, even where the closure is the same."""
    model, points = network(), [batch(), batch()]
    preconditioner = kfac_fx.Preconditioner(
        kfac_fx.transform(model), SUM, fisher="exact", ema_decay=0.0, compile="eager"
    )

    def equation(net: Net) -> tuple[Tensor, Tensor]:
        return poisson(net, points[-1])

    for _ in range(2):
        preconditioner.observe(inputs=equation)
        model(points[-1][0]).sum().backward()
        preconditioner.step()
        want = joint(per_case(*written_out(model, points.pop())))
        for name in LAYERS:
            close(preconditioner.factors[name], want[name])


def test_convolutions_in_forward_mode() -> None:
    """The same uses, one by one: values, and derivatives without the bias."""
    model = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(8, 1))
    net = kfac_fx.transform(model, structure="block_diagonal")
    x, along = torch.randn(5, 1, 4), torch.randn(5, 1, 4)
    preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="exact")
    value, slope = torch.func.jvp(net, (x,), (along,))
    preconditioner.observe(value + slope)
    (value + slope).sum().backward()
    preconditioner.step()
    patches = [torch.nn.functional.pad(t, (1, 1)).unfold(2, 3, 1)[:, 0] for t in (x, along)]
    ones = torch.ones(5, 4, 1)
    rows = [torch.cat([p, c * ones], 2).flatten(0, 1) for p, c in zip(patches, (1, 0), strict=True)]
    weight = model[2].weight.view(2, 4).T  # the derivative at each of the four positions
    want = sum(r.T @ r for r in rows) / 5, 2 * (5 * weight.T @ weight) / (5 * 4 * 2)
    close(preconditioner.factors["0"], want)


# ------------------------------------------------------------------------------------- optimizer
def test_products_with_the_exact_fisher() -> None:
    """Of a run's quadratic model: forward mode over forward mode, against the full Jacobian."""
    model, points = network(), batch()
    optimizer = kfac_fx.KFAC(
        kfac_fx.transform(model),
        SUM,
        damping=0.5,
        fisher="exact",
        weight_decay=1e-5,
        options=kfac_fx.KFACOptions(exact_rows=0),
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = optimizer.step(lambda net: poisson(net, points))
    parameters = {name: p.requires_grad_() for name, p in before.items()}

    def outputs(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        twin = network()
        return poisson(lambda x: torch.func.functional_call(twin, values, (x,)), points)

    scaled = [
        (w / len(f)) ** 0.5 * f.flatten() for w, f in zip(WEIGHTS, outputs(parameters), strict=True)
    ]
    flat = torch.cat(scaled)
    torch.testing.assert_close(loss, 0.5 * flat.detach().square().sum(), rtol=1e-12, atol=0.0)
    J = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(v, parameters.values(), retain_graph=True)
                ]
            )
            for v in flat
        ]
    )
    gradient = J.T @ flat.detach()
    gradient = gradient + 1e-5 * torch.cat([p.detach().flatten() for p in parameters.values()])
    moved = torch.cat([(p - before[n]).detach().flatten() for n, p in model.named_parameters()])
    # The step is alpha times the proposal, alpha the minimum of the model along it.
    curvature = (J @ moved).square().sum() + (0.5 + 1e-5) * moved.square().sum()
    torch.testing.assert_close(curvature, -(gradient @ moved), rtol=1e-9, atol=0.0)
    model_value = 0.5 * curvature + gradient @ moved
    assert optimizer.diagnostics["model"] == pytest.approx(float(model_value), rel=1e-9)


def test_an_equation_is_solved() -> None:
    """u'' = -sin on [0, pi] with u = 0 at both ends."""
    model = nn.Sequential(
        nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
    )
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), SUM, damping=1.0)
    ends = torch.tensor([[0.0], [torch.pi]])
    for _ in range(40):
        x = torch.pi * torch.rand(32, 1)
        loss = optimizer.step(lambda net, x=x: (laplacian(net, x) + torch.sin(x), net(ends)))
    x = torch.linspace(0, torch.pi, 50)[:, None]
    assert loss < 1e-3
    assert (model(x) - torch.sin(x)).abs().max() < 0.05


# ------------------------------------------------------------------- what cannot be, and is said
def by_autograd(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return slope[:, :1]


def by_hessian(net: Net, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.hessian(lambda z: net(z[None]).sum()))(x)[:, :1, 0]


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "autograd.grad": (by_autograd, "torch.func.jvp"),
    "func.grad": (
        lambda net, x: torch.func.grad(lambda z: net(z).sum())(x)[:, :1],
        "torch.func.jvp",
    ),
    "vmap": (lambda net, x: torch.func.vmap(lambda z: net(z[None])[0])(x), "batches"),
    "hessian": (
        lambda net, x: torch.func.vmap(torch.func.hessian(lambda z: net(z[None]).sum()))(x)[
            :, :1, 0
        ],
        "batches",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_derivatives_that_taps_do_not_see(kind: str) -> None:
    derivative, text = REFUSED[kind]
    model, x = network(), torch.rand(6, 2)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), "residual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(errors.ObservationError, match=text):
        optimizer.step(lambda net: derivative(net, x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.step(lambda net: laplacian(net, x))  # goes on as if nothing had been


def test_layers_without_statistics_of_derivatives() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    x = torch.rand(6, 2)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), "residual")
    with pytest.raises(errors.ObservationError, match="exclude"):
        optimizer.step(lambda net: laplacian(net, x))
    net = kfac_fx.transform(model, exclude=("1.*",))
    optimizer = kfac_fx.KFAC(net, "residual", damping=1.0)
    first = optimizer.step(lambda net: laplacian(net, x))
    assert optimizer.step(lambda net: laplacian(net, x)) < first


def test_a_penalty_on_derivatives_next_to_the_likelihood() -> None:
    """Statistics are of the outputs alone: a gradient penalty in the loss disturbs nothing."""
    model, x = network(), torch.rand(6, 2)
    net = kfac_fx.transform(model)
    factors = []
    for penalty in (False, True):
        preconditioner = kfac_fx.Preconditioner(net, "residual", fisher="exact")
        points = x.clone().requires_grad_()
        outputs = net(points)
        loss = outputs.square().mean()
        if penalty:
            (slope,) = torch.autograd.grad(outputs.sum(), points, create_graph=True)
            loss = loss + slope.square().mean()
        preconditioner.observe(outputs)
        loss.backward()
        preconditioner.step()
        factors.append([f.clone() for fs in preconditioner.factors.values() for f in fs])
    close(*factors)


def test_a_closure_takes_the_network() -> None:
    optimizer = kfac_fx.KFAC(kfac_fx.transform(network()), "normal")
    with pytest.raises(errors.UnknownOptionError, match="takes the network"):
        optimizer.step(lambda: torch.zeros(()))
