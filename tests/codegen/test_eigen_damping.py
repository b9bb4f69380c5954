"""Exact Tikhonov damping, A (x) G + lambda I, against dense inverses of dense blocks."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from support import oracles
from support.asserts import assert_near
from support.dense_updates import MODELS, Gradients
from support.inside import random_gradients, refreshed
from support.networks import Conv1D
from support.oracles import Categorical, Measure, Normal
from support.shared_weights import Tied
from support.sub_blocks import LIMITS, head, joined
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import StatisticsError, UnknownOptionError

assert_close = functools.partial(assert_near, rtol=1e-9)
pytestmark = pytest.mark.usefixtures("float64")
DAMPINGS = [1e-6, 1e-2, 10.0]


def solve(A: Tensor, G: Tensor, V: Tensor, damping: float) -> Tensor:
    """(A (x) G + lambda I)^-1 vec(V), dense; vectors are diagonals."""
    A, G = (torch.diag(f) if f.dim() == 1 else f for f in (A, G))
    dense = torch.kron(A, G)
    dense = dense + damping * torch.eye(len(dense))
    return torch.linalg.solve(dense, oracles.column_stacked(V)).reshape(V.T.shape).T


def expected(
    g: Gradients, name: str, factors: tuple[Tensor, ...], damping: float, groups: int, turned: bool
) -> Gradients:
    """Each group's block is solved alone."""
    weight, bias = g[f"{name}.weight"], g.get(f"{name}.bias")
    A, G = (f if groups > 1 else f[None] for f in factors)
    V = (weight.T if turned else weight).reshape(groups, -1, A.shape[1] - (bias is not None))
    V = V if bias is None else torch.cat([V, bias.reshape(groups, -1, 1)], 2)
    parts = zip(A, G, V, strict=True)
    U = torch.stack([solve(a, b, v, damping) for a, b, v in parts])
    if bias is None:
        return {f"{name}.weight": U.reshape(weight.shape)}
    W = U[..., :-1].flatten(0, 1).T if turned else U[..., :-1].reshape(weight.shape)
    return {f"{name}.weight": W, f"{name}.bias": U[..., -1].flatten()}


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize(
    "kind", ["linear", "one by one", "transposed", "convolution", "grouped", "depthwise"]
)
def test_against_dense_inverse(measure: Measure, kind: str, damping: float) -> None:
    build, shape, blocks = MODELS[kind]
    model = build()
    net = kfac_fx.transform(model, structure="block_diagonal")
    options = {"damping": damping, "tikhonov": "exact"}
    found = measure(net, torch.randn(8, *shape), None, Normal(), **options)
    given = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    updates = found.preconditioner.apply(given)
    for name in blocks:
        layer = model.get_submodule(name)
        options = getattr(layer, "groups", 1), isinstance(layer, Conv1D)
        want = expected(given, name, found.factors[name], damping, *options)
        for key, value in want.items():
            assert_close(updates[key], value)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_other_blocks_do_not_change(measure: Measure, damping: float) -> None:
    """Covariances have exact damping as it is."""
    for kind in ("norms", "wide norms", "diagonal norm", "elementwise"):
        build, shape, blocks = MODELS[kind]
        model = build()
        net = kfac_fx.transform(model, structure="block_diagonal")
        options = {"damping": damping, "tikhonov": "exact"}
        found = measure(net, torch.randn(8, *shape), None, Normal(), **options)
        given = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        updates = found.preconditioner.apply(given)
        for name, (approximation, solve_block) in blocks.items():
            if approximation != "kronecker":
                want = solve_block(given, name, found.factors[name], damping)
                for key, value in want.items():
                    assert_close(updates[key], value)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_cut_sides(measure: Measure, limit: int, bias: bool, damping: float) -> None:
    """Sides in sub-blocks: the blocks that are left out count as zero."""
    net = kfac_fx.transform(
        head(bias), max_factor_dim=limit, large_factors="blocks", structure="block_diagonal"
    )
    options = {"damping": damping, "tikhonov": "exact"}
    found = measure(net, torch.randn(5, 4), None, Normal(), **options)
    sides = (6 + bias, 9)
    A, G = (joined(f, n) for f, n in zip(found.factors["2"], sides, strict=True))
    V = torch.randn(9, 6 + bias)
    names = ["2.weight", "2.bias"][: 1 + bias]
    given = dict(zip(names, (V[:, :6], V[:, -1]), strict=False))
    U = found.preconditioner.apply(given)
    got = torch.cat([U["2.weight"], *(U[n][:, None] for n in names[1:])], 1)
    assert_close(got, solve(A, G, V, damping))


@pytest.mark.parametrize("limit", [5, 6, 8])
def test_diagonal_sides(measure: Measure, limit: int) -> None:
    """A vector for A, for G, for both: no basis is computed for it."""
    net = kfac_fx.transform(head(), max_factor_dim=limit, structure="block_diagonal")
    found = measure(net, torch.randn(5, 4), None, Normal(), tikhonov="exact")
    A, G = found.factors["2"]
    assert [f.dim() for f in (A, G)] == [1 + (limit > 7), 1]
    V = torch.randn(9, 7)
    U = found.preconditioner.apply({"2.weight": V[:, :6], "2.bias": V[:, 6]})
    assert_close(torch.cat([U["2.weight"], U["2.bias"][:, None]], 1), solve(A, G, V, 1e-2))
    names = found.preconditioner.program.inverse_names
    assert ("A_basis_2" in names, "G_basis_2" in names) == (limit > 7, False)


def test_embedding(measure: Measure) -> None:
    """A diagonal A with words that never came: damping alone is inverted there."""
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 2))
    net = kfac_fx.transform(model, structure="block_diagonal")
    found = measure(net, torch.randint(6, (5, 4)), None, Categorical(), tikhonov="exact")
    A, G = found.factors["0"]
    V = torch.randn(7, 3)
    assert A.dim() == 1 and A.min() == 0
    assert_close(found.preconditioner.apply({"0.weight": V})["0.weight"].T, solve(A, G, V.T, 1e-2))


def test_dead_units_leave_lambda(measure: Measure) -> None:
    """A factor of zeros: the block is lambda I, where the factored form has sqrt(lambda) G."""
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    net = kfac_fx.transform(model, structure="block_diagonal")
    found = measure(net, torch.zeros(6, 4), None, Normal(), damping=0.04, tikhonov="exact")
    V = torch.randn(5, 4)
    assert_close(found.preconditioner.apply({"0.weight": V})["0.weight"], V / 0.04)


def test_sums_stay_factored_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = Tied(bias=False), torch.randint(7, (5, 3))
    net = kfac_fx.transform(model, structure="block_diagonal")
    updates = []
    for tikhonov in ("factored", "exact"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kfac_fx"):
            pre = kfac_fx.Preconditioner(
                net, fisher="exact", damping=1e-3, tikhonov=tikhonov, trust_region=None
            )
        assert ("factored damping for embedding: sums" in caplog.text) == (tikhonov == "exact")
        model.zero_grad()
        pre.observe(outputs := net(ids))
        outputs.square().sum().backward()
        V = model.mid.weight.grad.clone()
        pre.step()
        updates.append((model.embedding.weight.grad.clone(), model.mid.weight.grad.clone()))
    assert torch.equal(updates[0][0], updates[1][0])
    assert not torch.allclose(updates[0][1], updates[1][1]) and V.any()


def test_couplings_are_refused(measure: Measure) -> None:
    net = kfac_fx.transform(head())
    with pytest.raises(UnknownOptionError, match="structure='block_diagonal'"):
        kfac_fx.Preconditioner(net, tikhonov="exact", structure="block_tridiagonal")
    with pytest.raises(UnknownOptionError, match="structure='block_diagonal'"):
        kfac_fx.KFAC(net, tikhonov="exact", structure="block_tridiagonal")
    with pytest.raises(UnknownOptionError, match="'factored', 'exact'"):
        kfac_fx.Preconditioner(net, tikhonov="diagonal")
    x = torch.randn(5, 4)
    options = {"structure": "block_diagonal", "tikhonov": "exact"}
    A, G = (found := measure(net, x, None, Normal(), **options)).factors["2"]
    V = torch.randn(9, 7)
    U = found.preconditioner.apply({"2.weight": V[:, :6], "2.bias": V[:, 6]})
    assert_close(torch.cat([U["2.weight"], U["2.bias"][:, None]], 1), solve(A, G, V, 1e-2))


def test_program_reads_and_compiles(measure: Measure) -> None:
    build, shape, _ = MODELS["convolution"]
    net = kfac_fx.transform(build(), structure="block_diagonal")
    found = measure(net, torch.randn(6, *shape), None, Normal(), tikhonov="exact")
    program = found.preconditioner.program
    assert "= eigenbasis(A_0)" in program.code and "eigen_product(A_basis_0" in program.code
    names: dict[str, object] = {}
    exec(program.code, names)
    factors = [f for fs in found.factors.values() for f in fs]
    inverses = names["refresh"](torch.tensor(1e-2), *factors)
    gradients = [torch.randn_like(p) for p in net.parameters()]
    given = [inverses[name] for name in program.inverse_names]
    want = program.apply({key: inverses[key.name] for key in program.inverses}, gradients)
    refresh = torch.compile(program.refresh_module, backend="eager", fullgraph=True)
    again = refresh(torch.tensor(1e-2), *factors)
    apply = torch.compile(program.apply_module, backend="eager", fullgraph=True)
    for name, value in want.items():
        assert_close(names["apply"](*given, *gradients)[name], value)
        assert_close(apply(*(again[n] for n in program.inverse_names), *gradients)[name], value)


def test_text_of_a_sum_is_complete() -> None:
    """The apply has formulas of its own, which go along too."""
    model, ids = Tied(bias=False), torch.randint(7, (5, 3))
    net = kfac_fx.transform(model, structure="block_diagonal")
    pre = kfac_fx.Preconditioner(
        net, fisher="exact", damping=1e-3, tikhonov="exact", trust_region=None
    )
    pre.observe(outputs := net(ids))
    outputs.square().sum().backward()
    pre.step()
    names: dict[str, object] = {}
    exec(pre.program.code, names)
    factors = [factor for group in pre.factors.values() for factor in group]
    inverses = names["refresh"](torch.tensor(1e-3), *factors)
    gradients = random_gradients(pre)
    given = [inverses[name] for name in pre.program.inverse_names]
    want = pre.apply(gradients)
    for name, value in names["apply"](*given, *gradients.values()).items():
        assert_close(value, want[name])


def test_inverses_of_another_form_are_not_restored(measure: Measure) -> None:
    """Averages are; the inverses come with the next refresh."""
    net = kfac_fx.transform(head(), structure="block_diagonal")
    old = measure(net, torch.randn(5, 4), None, Normal()).preconditioner
    pre = kfac_fx.Preconditioner(net, "normal", damping=1e-2, tikhonov="exact")
    pre.load_state_dict(old.state_dict())
    V = torch.randn(9, 7)
    with pytest.raises(StatisticsError, match="refresh"):
        pre.apply({"2.weight": V[:, :6]})
    pre.refresh()
    U = pre.apply({"2.weight": V[:, :6], "2.bias": V[:, 6]})["2.weight"]
    assert_close(U, solve(*old.factors["2"], V, 1e-2)[:, :6])
    again = kfac_fx.Preconditioner(net, "normal", tikhonov="exact")
    again.load_state_dict(pre.state_dict())
    given = {"2.weight": V[:, :6]}
    assert torch.equal(again.apply(given)["2.weight"], pre.apply(given)["2.weight"])


@pytest.mark.parametrize("lr", [None, 0.1])
def test_kfac_takes_it(lr: float | None) -> None:
    model, x = head(), torch.randn(32, 4)
    y = torch.randn(32, 9)
    net = kfac_fx.transform(model, structure="block_diagonal")
    options = kfac_fx.KFACOptions(exact_rows=0)
    optimizer = kfac_fx.KFAC(net, "normal", lr=lr, damping=1.0, tikhonov="exact", options=options)
    losses = [float(optimizer.step(x, y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert any(key.kind == "basis" for key in refreshed(optimizer).inverses)
