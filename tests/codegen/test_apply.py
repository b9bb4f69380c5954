"""The preconditioner program against dense inverses of dense damped blocks."""

from __future__ import annotations

import pytest
import torch
from support import oracles
from support.dense_updates import MODELS
from support.oracles import Categorical, Measure, Normal, close
from torch import nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("kind", MODELS)
def test_against_dense_inverse(measure: Measure, kind: str, damping: float) -> None:
    build, shape, blocks = MODELS[kind]
    model, x = build(), torch.randn(8, *shape)
    net = kfac_fx.transform(model, structure="block_diagonal")
    measured = measure(net, x, None, Normal(), damping=damping)
    given = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in given.items()}
    found = measured.preconditioner.apply(given)
    assert found.keys() == given.keys()
    assert all(torch.equal(given[name], before[name]) for name in given)
    for name, (approximation, solve) in blocks.items():
        assert net.curvature.blocks[name].approximation == approximation
        want = solve(given, name, measured.factors[name], damping)
        for key, value in want.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)


def test_step_replaces_gradients_by_apply(measure: Measure) -> None:
    model, x, likelihood = MODELS["linear"].build(), torch.randn(6, 4), Categorical()
    net, y = kfac_fx.transform(model, structure="block_diagonal"), torch.randint(3, (6,))
    model.zero_grad()
    gradients = dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(likelihood.nll(model(x), y), list(model.parameters())),
            strict=True,
        )
    )
    measured = measure(net, x, y, likelihood)
    want = measured.preconditioner.apply(gradients)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-12, atol=1e-12)


def test_gradients_not_given_are_zero(measure: Measure) -> None:
    model = MODELS["linear"].build()
    measured = measure(
        kfac_fx.transform(model, structure="block_diagonal"), torch.randn(6, 4), None, Categorical()
    )
    weight = torch.randn(5, 4)
    whole = {"0.weight": weight, "0.bias": torch.zeros(5), "2.weight": torch.zeros(3, 5)}
    found = measured.preconditioner.apply({"0.weight": weight})
    assert set(found) == {"0.weight"}
    close((found["0.weight"],), (measured.preconditioner.apply(whole)["0.weight"],))


def test_dead_units(measure: Measure) -> None:
    """A zero factor: pi is 1, and the result is finite."""
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    net = kfac_fx.transform(model, structure="block_diagonal")
    measured = measure(net, torch.zeros(6, 4), None, Normal(), damping=0.04)
    A, G = measured.factors["0"]
    assert A.abs().max() == 0 and G.abs().max() > 0
    V = torch.randn(5, 4)
    want = oracles.solve_kronecker(A, G, V, 0.04)
    close((measured.preconditioner.apply({"0.weight": V})["0.weight"],), (want,))
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("trust_region", [1e-6, 1e-2, 1e6])
def test_trust_region(measure: Measure, trust_region: float) -> None:
    """The step is scaled by min(1, sqrt(delta / (grad^T F^-1 grad))), all blocks together."""
    build, shape, _ = MODELS["norms"]
    model, x, likelihood = build(), torch.randn(6, *shape), Normal()
    y = likelihood.draw(model(x))
    net = kfac_fx.transform(model, structure="block_diagonal")
    measure(net, x, y, likelihood, trust_region=None)
    free = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    likelihood.nll(model(x), y).backward()
    inner = sum((p.grad * free[name]).sum() for name, p in model.named_parameters())
    model.zero_grad()
    measure(net, x, y, likelihood, trust_region=trust_region)
    scale = min(1.0, float((trust_region / inner).sqrt()))
    assert (scale == 1.0) == (trust_region == 1e6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, scale * free[name], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(measure: Measure, dtype: torch.dtype) -> None:
    """Factors are kept and inverted in float32 at least; results take the gradient's type."""
    model = MODELS["linear"].build().to(dtype)
    net, x = kfac_fx.transform(model, structure="block_diagonal"), torch.randn(8, 4, dtype=dtype)
    measured = measure(net, x, None, Normal())
    assert {f.dtype for factors in measured.factors.values() for f in factors} == {torch.float32}
    V = torch.randn(3, 5, dtype=dtype)
    found = measured.preconditioner.apply({"2.weight": V})["2.weight"]
    factors = [factor.double() for factor in measured.factors["2"]]
    want = oracles.solve_kronecker(*factors, V.double(), 1e-2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=torch.finfo(dtype).eps * 64, atol=0.05)
