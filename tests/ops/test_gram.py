"""Symmetric products in every way that they are formed, and A of an input that layers share."""

from __future__ import annotations

import functools

import pytest
import torch
from support.asserts import assert_near
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import kfac_fx
from kfac_fx.ops import convolution, kronecker
from kfac_fx.ops import gram as second_moments
from kfac_fx.ops.gram import formed_once, gram, homogeneous_gram, multiplied
from kfac_fx.ops.kronecker import FactorForm, gradient_factor, input_factor, positioned_rows

assert_close = functools.partial(assert_near, rtol=1e-12)

SIZES = [(3, 5), (700, 40), (600, 128), (600, 150), (520, 333), (1100, 1100), (64, 500)]


def rows_of(count: int, d: int) -> Tensor:
    return torch.randn(count, d, dtype=torch.float64)


def bordered_rows(rows: Tensor, one: float) -> Tensor:
    return torch.cat([rows, torch.full_like(rows[:, :1], one)], 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_against_the_whole_product(size: tuple[int, int], scale: float) -> None:
    rows = rows_of(*size)
    assert_close(gram(rows, scale), scale * rows.T @ rows)
    for one in (1.0, 0.0):
        whole = bordered_rows(rows, one)
        assert_close(homogeneous_gram(rows, scale, one), scale * whole.T @ whole)


@pytest.mark.parametrize("size", SIZES)
def test_in_bfloat16_the_result_alone_is_rounded(size: tuple[int, int]) -> None:
    rows = rows_of(*size).bfloat16()
    for one in (None, 1.0, 0.0):
        found = gram(rows, 0.25) if one is None else homogeneous_gram(rows, 0.25, one)
        exact = rows.double() if one is None else bordered_rows(rows.double(), one)
        expected = 0.25 * exact.T @ exact
        assert found.dtype == torch.bfloat16 and torch.equal(found, found.mT)
        wide = 1e-5 * float(expected.abs().max())  # sums in float32 cancel
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=wide)


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_any_strides(size: tuple[int, int]) -> None:
    transposed, wide = rows_of(*size[::-1]).T, rows_of(size[0], 2 * size[1])[:, ::2]
    for rows in (transposed, wide):
        assert_close(gram(rows), rows.T @ rows)


@pytest.mark.parametrize("size", [(600, 150), (64, 500)])
def test_traced_it_is_one_call_on_a_cpu(size: tuple[int, int]) -> None:
    rows = rows_of(*size)

    def both(rows: Tensor) -> tuple[Tensor, Tensor]:
        return gram(rows, 0.5), homogeneous_gram(rows, 0.5)

    module = make_fx(both, tracing_mode="fake")(rows)
    opaque = [node for node in module.graph.nodes if "kfac_fx.gram" in str(node.target)]
    assert len(opaque) == (2 if size[0] > 100 else 0)  # few rows are one product
    for found, expected in zip(module(rows), both(rows), strict=True):
        assert_close(found, expected)
    torch.library.opcheck(torch.ops.kfac_fx.gram.default, (rows, 0.5, 1.0))


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("size", [(3, 5), (600, 150)])
def test_batched_by_vmap(size: tuple[int, int]) -> None:
    batch = torch.stack([rows_of(*size), rows_of(*size)])
    for form in (gram, homogeneous_gram):
        found = torch.vmap(lambda rows, form=form: form(rows, 0.25))(batch)
        assert_close(found, torch.stack([form(rows, 0.25) for rows in batch]))


def test_where_derivatives_are_taken_of_it() -> None:
    rows = rows_of(600, 150).requires_grad_()
    (found,) = torch.autograd.grad(homogeneous_gram(rows).square().sum(), rows)
    whole = bordered_rows(rows, 1.0)
    (expected,) = torch.autograd.grad((whole.T @ whole).square().sum(), rows)
    assert_close(found, expected)
    assert_close(
        torch.func.grad(lambda r: gram(r).sum())(rows.detach()).T[0], 2 * rows.detach().sum(1)
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.other = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.other((q @ k.mT).softmax(-1) @ v).mean(1)


def test_layers_that_share_an_input_form_its_factor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[torch.Size] = []

    def counted(rows: Tensor, **options: object) -> Tensor:
        formed.append(rows.shape)
        return whole(rows, **options)

    whole = kronecker.input_factor
    monkeypatch.setattr(kronecker, "input_factor", counted)
    net = kfac_fx.transform(Attention().double(), (x := torch.randn(4, 5, 24).double(),))
    pre = kfac_fx.Preconditioner(net, "normal", structure="block_diagonal", fisher="empirical")
    for _ in range(2):  # the averages of both passes
        formed.clear()
        outputs = net(x)
        pre.observe(outputs, torch.zeros_like(outputs))
        outputs.square().sum(-1).mean().backward()
        pre.step()
        assert len(formed) == 2
        assert second_moments._last is None  # nothing is kept alive between steps
    flat = bordered_rows(x.flatten(0, 1), 1.0)
    for name in "qkv":
        assert_close(pre.factors[name][0], flat.T @ flat / 4)


def test_what_is_formed_once_is_formed_again_when_it_must_be() -> None:
    calls: list[Tensor] = []

    def form_of(x: Tensor, option: int = 0) -> Tensor:
        def form() -> Tensor:
            calls.append(x)
            return x.T @ x

        return formed_once(x, (option,), form)

    x = rows_of(6, 3)
    first, again = form_of(x), form_of(x.detach())
    assert len(calls) == 1
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
    form_of(x, 1)  # other options
    form_of(x[:, :2], 1)  # other entries
    assert len(calls) == 3
    x.add_(1.0)
    assert_close(form_of(x[:, :2], 1), x[:, :2].T @ x[:, :2])
    found = form_of(x)
    found.mul_(2.0)  # as averages do
    assert_close(form_of(x), x.T @ x)
    assert len(calls) == 6
    del x, calls[:]
    for _ in range(20):  # new tensors in the memory of old ones
        assert_close(form_of(y := rows_of(6, 3)), y.T @ y)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_patches_of_some_cases_at_a_time(
    monkeypatch: pytest.MonkeyPatch, bias: bool, groups: int
) -> None:
    options = convolution.ConvolutionOptions(
        (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), "zeros", groups, bias, False
    )
    statistics = convolution.ConvolutionStatistics(options)
    x = torch.randn(7, 2, 16, 16, dtype=torch.float64)
    monkeypatch.setitem(convolution.AT_ONCE, "cpu", 1)
    counts: list[int] = []
    patches = convolution.Window.patches

    def counted(self: convolution.Window, x: Tensor, groups: int) -> Tensor:
        counts.append(len(x))
        return patches(self, x, groups)

    monkeypatch.setattr(convolution.Window, "patches", counted)
    found = statistics.formed(x, [8, 8])
    assert counts == [1] * 7
    rows = torch.nn.functional.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1)
    for group, part in zip(found, rows.chunk(groups, 1), strict=True):
        part = bordered_rows(part, 1.0) if bias else part
        assert_close(group, part.T @ part / 7)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("form", [FactorForm(), FactorForm(diagonal=True), FactorForm(blocks=2)])
def test_rows_without_positions_are_those_of_one_position(form: FactorForm, reduce: bool) -> None:
    """Bit by bit, with fewer views: plain layers read [N, d]."""
    x = torch.randn(9, 6)
    rows = positioned_rows(x, (1,), (), torch.float64)
    assert rows.shape == x.shape and rows.dtype == torch.float64
    assert positioned_rows(x, (0,), (), x.dtype).shape == (6, 1, 9)
    for bias in (True, False):
        pair = [input_factor(r, bias=bias, reduce=reduce, form=form) for r in (x, x.unsqueeze(1))]
        assert torch.equal(*map(multiplied, pair))
    pair = [gradient_factor(r, reduce=reduce, divide=True, form=form) for r in (x, x.unsqueeze(1))]
    assert torch.equal(*map(multiplied, pair))
