"""The block-tridiagonal program against the dense Xi^T Lambda Xi, on chains and on forests."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from support import oracles
from support.coupled_networks import Branches, RandomGraph, Residual, chain
from support.inside import covered, estimate_of, random_gradients, refreshed
from support.oracles import Categorical, Measure
from torch import Tensor, nn

import kfac_fx
from kfac_fx.codegen.program import Program
from kfac_fx.curvature.choose_couplings import mutual_informations, total
from kfac_fx.ir.coupling import Coupling

pytestmark = pytest.mark.usefixtures("float64")
DAMPING = 1e-2


def recorded(model: nn.Module, measure: Measure, inputs: int = 4, **options: object) -> object:
    net = kfac_fx.transform(model, **{"structure": "block_tridiagonal"} | options)
    x = torch.randn(6, inputs)
    return measure(net, x, None, Categorical(), damping=DAMPING).preconditioner


def stacked(pre: object, gradients: dict[str, Tensor], places: dict[str, slice]) -> Tensor:
    vectors = []
    for name in places:
        weight, bias = gradients[f"{name}.weight"], gradients.get(f"{name}.bias")
        V = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        vectors.append(oracles.column_stacked(V))
    return torch.cat(vectors)


def assert_dense(pre: object) -> Tensor:
    """``apply`` equals the dense matrix, which is returned."""
    dense, places = oracles.tridiagonal_inverse(pre.factors, pre.cross_factors, DAMPING)
    parameters = [p for n in places for p in pre.curvature.blocks[n].parameters]
    gradients = {n: torch.randn_like(covered(pre)[n]) for n in parameters}
    got = stacked(pre, pre.apply(gradients), places)
    want = dense @ stacked(pre, gradients, places)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * want.abs().max().item())
    return dense


@pytest.mark.parametrize("depth", range(3, 9))
def test_chain(depth: int, measure: Measure) -> None:
    """Each layer is coupled with the next."""
    pre = recorded(chain(depth), measure)
    layers = list(pre.curvature.blocks)
    assert pre.curvature.parent == dict(itertools.pairwise(layers))
    assert_dense(pre)


@pytest.mark.parametrize("build", [Residual, Branches])
@pytest.mark.parametrize("couplings", ["topology", "data"])
def test_forest(build: type[nn.Module], couplings: str, measure: Measure) -> None:
    """Forks and joins: one parent for every layer but the last."""
    pre = recorded(build(), measure, couplings=couplings)
    assert len(pre.couplings) == len(pre.curvature.blocks) - 1
    assert_dense(pre)


def test_chain_blocks_equal_those_of_ftilde(measure: Measure) -> None:
    """Diagonal and neighbouring blocks of Fhat are those of Ftilde (section 4.3, figure 5)."""
    pre = recorded(chain(4), measure)
    dense, places = oracles.tridiagonal_inverse(pre.factors, pre.cross_factors, DAMPING)
    Fhat = torch.linalg.inv(dense)
    for name, place in places.items():
        want = torch.kron(*oracles.tikhonov(*pre.factors[name], DAMPING))
        torch.testing.assert_close(Fhat[place, place], want, rtol=1e-7, atol=1e-10)
    for (child, parent), (A, G) in pre.cross_factors.items():
        got = Fhat[places[child], places[parent]]
        torch.testing.assert_close(got, torch.kron(A, G), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("seed", range(200))
def test_symmetric_and_positive(seed: int, measure: Measure) -> None:
    torch.manual_seed(seed)
    pre = recorded(RandomGraph(seed), measure, 3)
    dense = assert_dense(pre)
    torch.testing.assert_close(dense, dense.T, rtol=1e-9, atol=1e-9 * dense.abs().max().item())
    assert torch.linalg.eigvalsh(dense).min() > 0


@pytest.mark.parametrize("root", ["stem", "one", "two", "short", "head"])
def test_root_does_not_matter(root: str, measure: Measure) -> None:
    pre = recorded(Residual(), measure)
    gradients = [*random_gradients(pre).values()]
    want = pre.program.apply(refreshed(pre).inverses, gradients)
    turned = rooted_at(root, pre.couplings)
    program = Program(pre.curvature, turned)
    cross = [
        factor
        for c in turned
        for factor in pre.cross_factors.get((c.child, c.parent))
        or [f.mT for f in pre.cross_factors[c.parent, c.child]]
    ]
    factors = [factor for pair in pre.factors.values() for factor in pair]
    inverses = program.refresh(torch.tensor(DAMPING), [*factors, *cross]).inverses
    got = program.apply(inverses, gradients)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-10)


def rooted_at(root: str, couplings: tuple[Coupling, ...]) -> tuple[Coupling, ...]:
    """The same undirected tree with every parent on the way to ``root``."""
    found: list[Coupling] = []
    reached, rest = {root}, list(couplings)
    while rest:
        for c in list(rest):
            for child, parent in ((c.child, c.parent), (c.parent, c.child)):
                if parent in reached:
                    found.append(Coupling(child, parent))
                    reached.add(child)
                    rest.remove(c)
                    break
    return tuple(found)


def test_block_diagonal_of_a_tridiagonal_transform(measure: Measure) -> None:
    """structure="block_diagonal" leaves the couplings out, and records none."""
    model, x = chain(3), torch.randn(6, 4)
    net = kfac_fx.transform(model, structure="block_tridiagonal")
    torch.manual_seed(1)
    got = measure(net, x, None, Categorical(), structure="block_diagonal").preconditioner
    plain = kfac_fx.transform(model, structure="block_diagonal")
    want = measure(plain, x, None, Categorical()).preconditioner
    assert not got.couplings and not got.cross_factors
    gradients = random_gradients(got)
    for one, other in zip(
        got.apply(gradients).values(), want.apply(gradients).values(), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_data_choose_at_least_as_much_information(measure: Measure) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        pre = recorded(RandomGraph(seed), measure, 3, couplings="data")
        weights = mutual_informations(estimate_of(pre), DAMPING)
        chosen, given = total(weights, pre.couplings), total(weights, pre.curvature.couplings)
        assert chosen >= given - 1e-12


def test_indefinite_conditional_is_left_out(
    measure: Measure, caplog: pytest.LogCaptureFixture
) -> None:
    """A cross factor that no joint distribution has: the block falls back, and the log says so."""
    pre = recorded(chain(3), measure)
    first = pre.couplings[0]
    for factor in pre.cross_factors[first.child, first.parent]:
        factor.mul_(50.0)
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        pre.refresh()
    assert f"{first.child} given {first.parent} is not positive" in caplog.text
    kept = {k: v for k, v in pre.cross_factors.items() if k != (first.child, first.parent)}
    dense, places = oracles.tridiagonal_inverse(pre.factors, kept, DAMPING)
    gradients = random_gradients(pre)
    applied = pre.apply(gradients)
    got = stacked(pre, applied, places)
    torch.testing.assert_close(got, dense @ stacked(pre, gradients, places), rtol=1e-8, atol=1e-9)
    alone = oracles.solve_kronecker(
        *pre.factors[first.child],
        torch.cat(
            [gradients[f"{first.child}.weight"], gradients[f"{first.child}.bias"][:, None]], 1
        ),
        DAMPING,
    )
    torch.testing.assert_close(applied[f"{first.child}.weight"], alone[:, :-1])


def test_near_singular_conditional_is_clamped(measure: Measure) -> None:
    """Layers that see the same input with next to no damping: finite, and counted."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).float()
    net = kfac_fx.transform(model, structure="block_tridiagonal")
    pre = kfac_fx.Preconditioner(net, "normal", fisher="exact", damping=1e-12)
    pre.observe(outputs := net(torch.randn(64, 3, dtype=torch.float32)))
    outputs.square().sum().backward()
    pre.step()
    assert pre.clamped > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_state_survives(measure: Measure) -> None:
    """Another preconditioner with the state has the same forest and the same updates, bitwise."""
    pre = recorded(Residual(), measure, couplings="data")
    state = pre.state_dict()
    again = kfac_fx.Preconditioner(
        kfac_fx.transform(Residual(), couplings="data"), "categorical", damping=DAMPING
    )
    again.load_state_dict(state)
    assert again.couplings == pre.couplings
    gradients = random_gradients(pre)
    for one, other in zip(
        again.apply(gradients).values(), pre.apply(gradients).values(), strict=True
    ):
        assert torch.equal(one, other)


def test_code_stands_alone(measure: Measure) -> None:
    """The program's text needs torch only, and computes the same."""
    pre = recorded(Residual(), measure)
    assert "kfac_fx" not in pre.program.code
    names: dict[str, object] = {}
    exec(pre.program.code, names)
    groups = [*pre.factors.values(), *pre.cross_factors.values()]
    inverses = names["refresh"](torch.tensor(DAMPING), *(f for group in groups for f in group))
    gradients = [*random_gradients(pre).values()]
    given = [inverses[name] for name in pre.program.inverse_names]
    got = names["apply"](*given, *gradients)
    want = pre.program.apply(refreshed(pre).inverses, gradients)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
