"""Products and inverses of triangles by parts, whiteners and conditionals, against dense ones."""

from __future__ import annotations

import functools

import pytest
import torch
from support.asserts import assert_near
from torch import Tensor

from kfac_fx.linalg.conditional import conditional_scale, conditional_side, correlation
from kfac_fx.linalg.levels import inverse_by_levels, product_of_triangles
from kfac_fx.linalg.positive import CHOLESKY, FLOORED, cholesky_whitener
from kfac_fx.linalg.triangular import (
    column_parts,
    symmetric_product,
    triangular_inverse,
    triangular_product,
)

assert_close = functools.partial(assert_near, rtol=1e-9)
pytestmark = pytest.mark.usefixtures("float64")
SIZES = (1, 2, 63, 128, 129, 200, 401, 600)


def positive(d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * d, d, generator=generator, dtype=torch.float64)
    return rows.mT @ rows / (2 * d) + 0.1 * torch.eye(d, dtype=torch.float64)


def test_parts_cover_all_columns() -> None:
    ranges = column_parts(torch.empty(401, 401), 96, 4)
    assert len(ranges) == 4
    assert [i for start, end in ranges for i in range(start, end)] == list(range(401))
    assert column_parts(torch.empty(3, 401, 401), 96, 4) == [(0, 401)]


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_product(d: int, transposed: bool) -> None:
    """A triangle times a matrix."""
    T, X = torch.randn(d, d).tril(), torch.randn(d, 7)
    assert_close(triangular_product(T, X, transposed=transposed), (T.mT if transposed else T) @ X)


@pytest.mark.parametrize("d", SIZES)
def test_symmetric_product(d: int) -> None:
    """X^T X, of a matrix and of a triangle."""
    X, T = torch.randn(d + 3, d), torch.randn(d, d).tril()
    assert_close(symmetric_product(X), X.mT @ X)
    assert_close(symmetric_product(T, triangular=True), T.mT @ T)


@pytest.mark.parametrize("shape", [(1,), (256,), (257,), (3, 300), (2, 1100)], ids=str)
def test_levels(shape: tuple[int, ...]) -> None:
    """What a GPU runs."""
    *stack, d = shape
    matrix = positive(d)
    if stack:
        matrix = torch.stack([positive(d, seed) for seed in range(*stack)])
    L = torch.linalg.cholesky(matrix)
    found = inverse_by_levels(L + torch.randn_like(L).triu(1))  # what lies above is not read
    assert torch.equal(found, found.tril())
    assert_close(found @ L, torch.eye(d).expand_as(L))
    assert_close(product_of_triangles(found), torch.linalg.inv(matrix))


@pytest.mark.parametrize("d", SIZES)
def test_inverse(d: int) -> None:
    """Of a triangle; what stands on its other side is not read."""
    L = torch.linalg.cholesky(positive(d))
    for given in (L, L.contiguous(), L + torch.randn(d, d).triu(1)):  # what lies above is not read
        found = triangular_inverse(given)
        assert torch.equal(found, found.tril())
        assert_close(found @ L, torch.eye(d))


def test_inverse_of_a_batch() -> None:
    L = torch.linalg.cholesky(torch.stack([positive(200, seed) for seed in range(3)]))
    assert_close(triangular_inverse(L) @ L, torch.eye(200).expand(3, -1, -1))


@pytest.mark.parametrize("factorise", [CHOLESKY, FLOORED])
@pytest.mark.parametrize("shape", [(1, 1), (3, 40, 40), (300, 300)])
def test_whitener(factorise: object, shape: tuple[int, ...]) -> None:
    """W with W M W^T = I and W^T W = M^-1, triangular."""
    matrix = positive(shape[-1]).expand(shape)
    W, failed = factorise.whitener(matrix)
    assert not failed.any() and failed.shape == shape[:-2]
    assert torch.equal(W, W.tril())
    assert_close(W @ matrix @ W.mT, torch.eye(shape[-1]).expand(shape))
    assert_close(W.mT @ W, torch.linalg.inv(matrix))


@pytest.mark.parametrize("d", [3, 300])
def test_whitener_of_what_is_not_positive(d: int) -> None:
    given = torch.stack([positive(d), -torch.eye(d)])
    kept = given.clone()
    W, failed = cholesky_whitener(given)
    assert failed[0] == 0 and failed[1] != 0
    assert torch.equal(given, kept)
    assert_close(W[1], torch.eye(d))
    W, failed = cholesky_whitener(given[1])
    assert failed != 0
    assert_close(W, torch.eye(d))


@pytest.mark.parametrize("n, m", [(5, 5), (4, 9), (9, 4), (130, 260), (400, 200)])
@pytest.mark.parametrize("from_child", [False, True])
def test_conditional_side(n: int, m: int, from_child: bool) -> None:
    """In the coordinates both blocks are white, and their correlation is diagonal."""
    joint = positive(n + m)
    child, cross, parent = joint[:n, :n], joint[:n, n:], joint[n:, n:]
    W, W_parent = (cholesky_whitener(each)[0] for each in (child, parent))
    assert_close(correlation(W, cross, W_parent), W @ cross @ W_parent.mT)
    L, s, R = conditional_side(W, cross, W_parent, from_child=from_child)
    k = n if from_child else m
    assert L.shape == (n, k) and R.shape == (m, k) and s.shape == (k,)
    whole, carrying = ((L, child), (R, parent)) if from_child else ((R, parent), (L, child))
    assert_close(whole[0].mT @ whole[1] @ whole[0], torch.eye(k))
    assert_close(carrying[0].mT @ carrying[1] @ carrying[0], torch.diag(s))
    assert_close(L.mT @ cross @ R, torch.diag(s))


def test_conditional_scale() -> None:
    """1 / (1 - s_G s_A); a product that reaches one is clamped and counted."""
    s_A, s_G = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.9, 1.0])
    scale, clamped, indefinite = conditional_scale(s_A, s_G)
    want = 1 / (1 - s_G[:, None] * s_A)
    assert_close(scale.flatten()[:5], want.flatten()[:5])
    assert clamped == 1 and not indefinite and scale.isfinite().all()
    assert conditional_scale(s_A, s_G + 1e-3)[2]


def test_a_compiler_takes_wide_ones() -> None:
    matrix = torch.randn(450, 400)
    matrix = matrix.T @ matrix
    run = torch.compile(
        lambda m: symmetric_product(cholesky_whitener(m)[0]), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(run(matrix) @ matrix, torch.eye(400), rtol=1e-6, atol=1e-6)
