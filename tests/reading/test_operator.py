"""The curvature operator against dense matrices that are built from the factors by definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import oracles
from support.asserts import assert_near
from support.coupled_networks import Branches, RandomGraph, Residual, chain
from support.dense_blocks import assembled, dense_blocks, indices, matrices, product
from support.dense_updates import MODELS
from support.oracles import Categorical, Measure, Normal
from support.shared_weights import Packed, Tied
from support.sub_blocks import LIMITS, head, joined
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import OperatorError, StatisticsError

pytestmark = pytest.mark.usefixtures("float64")
DAMPING = 1e-2


def assert_operator(pre: object, dense: Tensor) -> None:
    """Everything that the operator knows, against Fhat as a matrix."""
    operator, n = pre.curvature_operator(), len(dense)
    assert operator.shape == (n, n) and operator.dtype == "float64"
    eye = torch.eye(n)
    assert_near(operator.dense(), dense)
    inverse = torch.linalg.inv(dense)
    x = torch.randn(n, 3)
    assert_near(operator @ x, dense @ x)
    assert_near(operator @ x[:, 0], dense @ x[:, 0])
    assert_near(operator.rmatvec(x[:, 0]), dense.T @ x[:, 0])
    assert_near(operator.rmatmat(x), dense.T @ x)
    solved = operator.solve(x[:, 0])
    assert_near(solved, inverse @ x[:, 0])
    named = operator.split(x[:, 0])
    assert_near(operator.flat(operator.solve(named)), solved)
    assert_near(operator.flat(operator @ named), dense @ x[:, 0])
    pre.refresh()
    assert_near(operator.flat(pre.apply(named)), solved)
    S = torch.stack([operator.sqrt_solve(column) for column in eye], 1)
    assert_near(S @ S.T, inverse)
    assert_near(operator.logdet(), torch.linalg.slogdet(dense)[1])
    assert_near(operator.trace(), dense.trace())
    assert_near(operator.diagonal(), dense.diagonal())
    z = torch.randn(n, generator=torch.Generator().manual_seed(3))
    drawn = operator.sample(torch.Generator().manual_seed(3))
    assert_near(operator.flat(drawn), S @ z)


@pytest.mark.parametrize("tikhonov", ["factored", "exact"])
@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"wide norms", "diagonal norm"}))
def test_block_diagonal(measure: Measure, kind: str, tikhonov: str) -> None:
    """Every kind of block."""
    build, shape, _ = MODELS[kind]
    if kind == "large elementwise":
        shape = (4,)
    model = build()
    net = kfac_fx.transform(model, structure="block_diagonal")
    found = measure(net, torch.randn(8, *shape), None, Normal(), tikhonov=tikhonov)
    n = sum(p.numel() for p in model.parameters())
    placed = dense_blocks(found.preconditioner, model, DAMPING, tikhonov)
    assert sum(len(index) for index, _ in placed) == n
    assert_operator(found.preconditioner, assembled(placed, n))


def test_pairs(measure: Measure) -> None:
    """Six hundred 2x2 blocks; dense matrices of the others are in the test above."""
    model = nn.LayerNorm(600)
    net = kfac_fx.transform(nn.Sequential(model), structure="block_diagonal")
    pre = measure(net, torch.randn(8, 600), None, Normal()).preconditioner
    assert next(iter(pre.curvature.blocks.values())).approximation == "pairs"
    placed = [
        (torch.tensor([k, 600 + k]), C + DAMPING * torch.eye(2))
        for k, C in enumerate(pre.factors["0"][0])
    ]
    assert_operator(pre, assembled(placed, 1200))


def forest(pre: object, model: nn.Module) -> Tensor:
    """Fhat by the dense Xi^T Lambda Xi, and the blocks of layers that are not coupled."""
    inverse, places = oracles.tridiagonal_inverse(pre.factors, pre.cross_factors, DAMPING)
    at = indices(model)
    index = torch.cat(
        [oracles.column_stacked(matrices(model, name, at).squeeze(0)) for name in places]
    )
    placed = [(index, torch.linalg.inv(inverse))]
    for name in pre.factors.keys() - places.keys():
        own = oracles.column_stacked(matrices(model, name, at).squeeze(0))
        placed.append((own, product(*pre.factors[name], DAMPING, "factored")))
    return assembled(placed, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(
    "build",
    [*(lambda depth=depth: chain(depth) for depth in range(2, 9)), Residual, Branches],
    ids=[*(f"chain of {depth}" for depth in range(2, 9)), "residual", "branches"],
)
@pytest.mark.parametrize("couplings", ["topology", "data"])
def test_block_tridiagonal(
    measure: Measure, build: Callable[[], nn.Module], couplings: str
) -> None:
    """Chains and forests, chosen by topology and by data."""
    model = build()
    net = kfac_fx.transform(model, couplings=couplings)
    pre = measure(net, torch.randn(6, 4), None, Categorical(), damping=DAMPING).preconditioner
    assert pre.couplings
    assert_operator(pre, forest(pre, model))


@pytest.mark.parametrize("seed", range(30))
def test_random_forests(measure: Measure, seed: int) -> None:
    """Forests of random graphs."""
    torch.manual_seed(seed)
    model = RandomGraph(seed)
    net = kfac_fx.transform(model)
    pre = measure(net, torch.randn(6, 3), None, Categorical(), damping=DAMPING).preconditioner
    assert pre.couplings
    assert_operator(pre, forest(pre, model))


def test_coupled_convolutions(measure: Measure) -> None:
    """A resolution that changes, and a dense layer after it."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 2)
    )
    net = kfac_fx.transform(model)
    x = torch.randn(6, 1, 5, 5)
    pre = measure(net, x, None, Normal(), damping=DAMPING).preconditioner
    assert len(pre.couplings) == 2
    assert_operator(pre, forest(pre, model))


def test_float32(measure: Measure) -> None:
    """The operator is float64 unless it is asked for another precision."""
    model = chain(3).float()
    x = torch.randn(6, 4, dtype=torch.float32)
    pre = measure(kfac_fx.transform(model), x, None, Categorical()).preconditioner
    double, single = pre.curvature_operator(), pre.curvature_operator(torch.float32)
    v = torch.randn(double.shape[0])
    assert (double @ v).dtype == torch.float64 and double.dtype == "float64"
    assert (single @ v).dtype == torch.float32 and single.dtype == "float32"
    assert_near((single @ v).double(), double @ v, 1e-4)
    assert_near(double @ double.solve(v), v)


class Mixed(nn.Module):
    """Coupled layers, and a normalisation that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.norm(self.one(x))))


def test_some_blocks_are_coupled(measure: Measure) -> None:
    model = Mixed()
    pre = measure(
        kfac_fx.transform(model), torch.randn(8, 4), None, Normal(), damping=DAMPING
    ).preconditioner
    at = indices(model)
    inverse, places = oracles.tridiagonal_inverse(
        {name: pre.factors[name] for name in ("one", "two")}, pre.cross_factors, DAMPING
    )
    index = torch.cat([oracles.column_stacked(matrices(model, n, at)[0]) for n in places])
    norm = torch.cat([at["norm.weight"], at["norm.bias"]])
    placed = [(index, torch.linalg.inv(inverse))]
    placed.append((norm, pre.factors["norm"][0] + DAMPING * torch.eye(6)))
    assert_operator(pre, assembled(placed, 15 + 6 + 8))


def test_conditional_that_is_left_out(measure: Measure) -> None:
    """As the program does: the child is a root."""
    model = chain(3)
    pre = measure(
        kfac_fx.transform(model), torch.randn(6, 4), None, Categorical(), damping=DAMPING
    ).preconditioner
    first = pre.couplings[0]
    for factor in pre.cross_factors[first.child, first.parent]:
        factor.mul_(50.0)
    operator = pre.curvature_operator()
    pre.refresh()
    x = operator.split(torch.randn(operator.shape[0]))
    assert_near(operator.flat(operator.solve(x)), operator.flat(pre.apply(x)))
    assert_near(operator.flat(operator @ operator.solve(x)), operator.flat(x))


@pytest.mark.parametrize("tikhonov", ["factored", "exact"])
@pytest.mark.parametrize("limit", LIMITS)
def test_cut_sides(measure: Measure, limit: int, tikhonov: str) -> None:
    """Sub-blocks stand where the whole factor would."""
    model = head()
    net = kfac_fx.transform(
        model, max_factor_dim=limit, large_factors="blocks", structure="block_diagonal"
    )
    pre = measure(net, torch.randn(9, 4), None, Normal(), tikhonov=tikhonov).preconditioner
    at, placed = indices(model), []
    for name, sides in {"0": (5, 6), "2": (7, 9)}.items():
        A, G = (joined(f, n) for f, n in zip(pre.factors[name], sides, strict=True))
        index = oracles.column_stacked(matrices(model, name, at)[0])
        placed.append((index, product(A, G, DAMPING, tikhonov)))
    assert_operator(pre, assembled(placed, 30 + 63))


@pytest.mark.parametrize("limit", [None, 4, 6, 7])
def test_sum_of_two_products(limit: int | None) -> None:
    """A tied embedding and head; the vocabulary's side of the head whole, or cut."""
    model, ids = Tied(bias=False), torch.randint(7, (5, 3))
    options = {} if limit is None else {"max_factor_dim": limit, "large_factors": "blocks"}
    net = kfac_fx.transform(model, structure="block_diagonal", **options)
    pre = kfac_fx.Preconditioner(net, fisher="exact", damping=DAMPING)
    outputs = net(ids)
    pre.observe(outputs)
    outputs.square().sum().backward()
    pre.step()
    assert pre.curvature.blocks["embedding"].approximation == "kronecker_sum"
    at = indices(model)
    counts, G, A_2, G_2 = pre.factors["embedding"]
    tied = torch.kron(torch.diag(counts), G)
    tied = tied + torch.kron(*oracles.tikhonov(joined(A_2, 7), joined(G_2, 4), DAMPING))
    A, G = (joined(f, n) for f, n in zip(pre.factors["mid"], (5, 4), strict=True))
    placed = [
        (at["embedding.weight"].flatten(), tied),
        (oracles.column_stacked(matrices(model, "mid", at)[0]), product(A, G, DAMPING, "factored")),
    ]
    assert set(pre.curvature.blocks) == {"embedding", "mid"}
    assert_operator(pre, assembled(placed, sum(p.numel() for p in model.parameters())))


@pytest.mark.parametrize("diagonal", [True, False])
def test_weight_and_its_transpose(measure: Measure, diagonal: bool) -> None:
    """Both pairs diagonal, or neither."""
    weight = nn.Parameter(torch.randn(3, 4))

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight.T) @ self.weight

    options = {"max_factor_dim": 2} if diagonal else {}
    net = kfac_fx.transform(Autoencoder(), structure="block_diagonal", **options)
    pre = measure(net, torch.randn(9, 4), None, Normal()).preconditioner
    A, G, A_2, G_2 = (torch.diag(f) if f.dim() == 1 else f for f in pre.factors["weight"])
    dense = torch.kron(A, G) + torch.kron(*oracles.tikhonov(A_2, G_2, DAMPING))
    index = oracles.column_stacked(torch.arange(12).reshape(3, 4))
    assert_operator(pre, assembled([(index, dense)], 12))


def test_slices_of_one_parameter(measure: Measure) -> None:
    """Blocks that share a parameter: the operator agrees with the program, and is symmetric."""
    net = kfac_fx.transform(Packed("chunk"))
    pre = measure(net, torch.randn(6, 4), None, Normal(), damping=DAMPING).preconditioner
    operator = pre.curvature_operator()
    assert len(pre.curvature.blocks) == 3 and operator.shape == (60, 60)
    dense = operator.dense()
    assert_near(dense, dense.T)
    x = torch.randn(60)
    assert_near(operator.flat(pre.apply(operator.split(x))), torch.linalg.solve(dense, x))
    assert_near(operator.logdet(), torch.linalg.slogdet(dense)[1])
    assert_near(operator.trace(), dense.trace())


def test_samples_have_the_covariance(measure: Measure) -> None:
    pre = measure(
        kfac_fx.transform(chain(2)), torch.randn(6, 4), None, Categorical(), damping=1.0
    ).preconditioner
    operator, generator = pre.curvature_operator(), torch.Generator().manual_seed(0)
    draws = torch.stack([operator.flat(operator.sample(generator)) for _ in range(4000)])
    covariance = draws.T @ draws / len(draws)
    want = torch.linalg.inv(operator.dense())
    error = (covariance - want).abs().max() / want.abs().max()
    assert error < 6 * math.sqrt(2 / len(draws))


def test_scipy_takes_it(measure: Measure) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    pre = measure(
        kfac_fx.transform(chain(3)), torch.randn(6, 4), None, Categorical(), damping=DAMPING
    ).preconditioner
    operator = pre.curvature_operator()
    dense, n = operator.dense(), operator.shape[0]
    wrapped = linalg.aslinearoperator(operator)
    x = torch.randn(n, 2)
    assert_near(torch.as_tensor(wrapped @ x.numpy()), dense @ x)
    assert_near(torch.as_tensor(wrapped @ x[:, 0].numpy()), dense @ x[:, 0])
    assert_near(torch.as_tensor(wrapped.rmatvec(x[:, 0].numpy())), dense @ x[:, 0])
    largest = linalg.eigsh(operator, k=3, return_eigenvectors=False)
    assert_near(torch.as_tensor(largest).sort()[0], torch.linalg.eigvalsh(dense)[-3:])
    solution, failed = linalg.cg(operator, x[:, 0].numpy(), rtol=1e-10, maxiter=10 * n)
    assert not failed
    assert_near(torch.as_tensor(solution), torch.linalg.solve(dense, x[:, 0]), 1e-5)


def test_wrong_vectors_are_an_error(measure: Measure) -> None:
    """No statistics, wrong sizes, unknown names, and wrong shapes."""
    net = kfac_fx.transform(chain(2))
    with pytest.raises(StatisticsError, match="block 0: no statistics"):
        kfac_fx.Preconditioner(net).curvature_operator()
    operator = measure(net, torch.randn(6, 4), None, Categorical()).preconditioner
    operator = operator.curvature_operator()
    n = operator.shape[0]
    with pytest.raises(OperatorError, match=rf"takes shape \({n},\)"):
        operator.matvec(torch.randn(n + 1))
    with pytest.raises(OperatorError, match="'typo' of shape"):
        operator.matvec({"typo": torch.randn(2)})
    with pytest.raises(OperatorError, match=r"the parameter has shape \(\d, 4\)"):
        operator.solve({"0.weight": torch.randn(4)})


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x * self.turn).real)


def test_complex_parameters_are_named(measure: Measure) -> None:
    net = kfac_fx.transform(Rotated(), structure="block_diagonal")
    pre = measure(net, torch.randn(6, 4), None, Normal(), fisher="sampled").preconditioner
    with pytest.raises(OperatorError, match="block turn: there is no operator of complex"):
        pre.curvature_operator()


def test_is_a_snapshot(measure: Measure) -> None:
    """Later statistics and dampings do not reach it."""
    net = kfac_fx.transform(chain(2))
    pre = measure(net, torch.randn(6, 4), None, Categorical()).preconditioner
    operator = pre.curvature_operator()
    x = torch.randn(operator.shape[0])
    before = operator @ x
    for factors in pre.factors.values():
        for factor in factors:
            factor.mul_(3.0)
    pre.damping = 1.0
    assert torch.equal(operator @ x, before)
    assert not torch.allclose(pre.curvature_operator() @ x, before)
