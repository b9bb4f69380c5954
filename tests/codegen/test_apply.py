"""The preconditioner program against dense inverses of dense damped blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import oracles
from support.networks import Conv1D
from support.oracles import Categorical, Measure, Normal, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
Gradients = dict[str, Tensor]


def kronecker_linear(
    g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float
) -> Gradients:
    weight, bias = g[f"{name}.weight"], g.get(f"{name}.bias")
    V = weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)
    u = oracles.solve_kronecker(*factors, V, damping)
    if bias is None:
        return {f"{name}.weight": u}
    return {f"{name}.weight": u[:, :-1], f"{name}.bias": u[:, -1]}


def kronecker_transposed(
    g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float
) -> Gradients:
    turned = {key: value.T if value.dim() == 2 else value for key, value in g.items()}
    u = kronecker_linear(turned, name, factors, damping)
    return {key: value.T if value.dim() == 2 else value for key, value in u.items()}


def kronecker_conv(
    g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float
) -> Gradients:
    """Each group is a block of its own, with its own pi."""
    A, G = (f if f.dim() == 3 else f[None] for f in factors)
    weight, bias = g[f"{name}.weight"], g.get(f"{name}.bias")
    given = weight.reshape(len(A), -1, weight[0].numel())
    if bias is not None:
        given = torch.cat([given, bias.reshape(len(A), -1, 1)], dim=2)
    parts = zip(A, G, given, strict=True)
    groups = [oracles.solve_kronecker(a, b, V, damping) for a, b, V in parts]
    u = torch.stack(groups)
    if bias is None:
        return {f"{name}.weight": u.reshape(weight.shape)}
    return {
        f"{name}.weight": u[..., :-1].reshape(weight.shape),
        f"{name}.bias": u[..., -1].reshape(bias.shape),
    }


def full(g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float) -> Gradients:
    """One covariance (or its diagonal) of the parameters of the block, concatenated."""
    keys = [key for key in g if key == name or key.startswith(f"{name}.")]
    u = oracles.solve_full(factors[0], torch.cat([g[key].flatten() for key in keys]), damping)
    parts = u.split([g[key].numel() for key in keys])
    return {key: part.reshape(g[key].shape) for key, part in zip(keys, parts, strict=True)}


def rows(g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float) -> Gradients:
    """Rows as embeddings: A is the diagonal of a matrix."""
    A, G = factors
    return {name: oracles.solve_kronecker(torch.diag(A), G, g[name].T, damping).T}


def pairs(g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float) -> Gradients:
    v = torch.stack([g[f"{name}.weight"].flatten(), g[f"{name}.bias"].flatten()], dim=1)
    found = zip(factors[0], v, strict=True)
    u = torch.stack([oracles.solve_full(C, row, damping) for C, row in found])
    return {f"{name}.weight": u[:, 0], f"{name}.bias": u[:, 1]}


class Elementwise(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.rand(size, 4))
        self.q = nn.Parameter(torch.rand(4))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x[:, None] + self.p).sum(1) * self.q.cumsum(0))


Solver = Callable[[Gradients, str, tuple[Tensor, ...], float], Gradients]
Model = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, tuple[str, Solver]]]
MODELS: dict[str, Model] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        (4,),
        {"0": ("kronecker", kronecker_linear), "2": ("kronecker", kronecker_linear)},
    ),
    "one by one": (
        lambda: nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1)),
        (1,),
        {"0": ("kronecker", kronecker_linear), "2": ("kronecker", kronecker_linear)},
    ),
    "transposed": (
        lambda: nn.Sequential(Conv1D(4, 5), nn.Tanh(), Conv1D(5, 3)),
        (4,),
        {"0": ("kronecker", kronecker_transposed), "2": ("kronecker", kronecker_transposed)},
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, (2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)),
        (2, 3, 3),
        {"0": ("kronecker", kronecker_conv), "3": ("kronecker", kronecker_linear)},
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten()),
        (4, 3),
        {"0": ("kronecker", kronecker_conv)},
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 2, groups=3, bias=False), nn.Tanh(), nn.Flatten()),
        (3, 3, 2),
        {"0": ("kronecker", kronecker_conv)},
    ),
    "norms": (
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.RMSNorm(5)),
        (4,),
        {"0": ("full", full), "1": ("kronecker", kronecker_linear), "2": ("full", full),
         "3": ("full", full)},
    ),
    "wide norms": (
        lambda: nn.Sequential(nn.LayerNorm(600), nn.Tanh(), nn.RMSNorm(600), nn.Linear(600, 2)),
        (600,),
        {"0": ("pairs", pairs), "2": ("full", full)},
    ),
    "diagonal norm": (
        lambda: nn.Sequential(nn.RMSNorm(1200), nn.Linear(1200, 1)),
        (1200,),
        {"0": ("diagonal", full)},
    ),
    "elementwise": (
        lambda: Elementwise(3),
        (4,),
        {"p": ("full", full), "q": ("diagonal", full), "out": ("kronecker", kronecker_linear)},
    ),
    "large elementwise": (lambda: Elementwise(300), (4,), {"p": ("kronecker", rows)}),
}  # fmt: skip


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
    model, x, likelihood = MODELS["linear"][0](), torch.randn(6, 4), Categorical()
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
    model = MODELS["linear"][0]()
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
    measure(net, x, y, likelihood)
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
    model = MODELS["linear"][0]().to(dtype)
    net, x = kfac_fx.transform(model, structure="block_diagonal"), torch.randn(8, 4, dtype=dtype)
    measured = measure(net, x, None, Normal())
    assert {f.dtype for factors in measured.factors.values() for f in factors} == {torch.float32}
    V = torch.randn(3, 5, dtype=dtype)
    found = measured.preconditioner.apply({"2.weight": V})["2.weight"]
    factors = [factor.double() for factor in measured.factors["2"]]
    want = oracles.solve_kronecker(*factors, V.double(), 1e-2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), want, rtol=torch.finfo(dtype).eps * 64, atol=0.05)
