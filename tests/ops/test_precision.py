"""Where a GPU may round float32 products to TF32, and where it may not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kfac_fx
from kfac_fx.linalg.precision import products_are_rounded, unrounded
from kfac_fx.ops.autocorrelation import suits

MATMUL, CONV = torch.backends.cuda.matmul, torch.backends.cudnn.conv


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    held = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(held)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_settings_are_put_back(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    before = MATMUL.fp32_precision, CONV.fp32_precision
    with pytest.raises(ZeroDivisionError), unrounded():
        assert MATMUL.fp32_precision == CONV.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert before == (MATMUL.fp32_precision, CONV.fp32_precision)
    assert torch.get_float32_matmul_precision() == precision
    assert products_are_rounded() == (precision != "highest")


def test_a_refresh_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    net = kfac_fx.transform(nn.Linear(3, 2))
    preconditioner = kfac_fx.Preconditioner(net, "normal")
    program, seen = preconditioner.program, []
    run = program._refresh._run

    def watched(*arguments: Tensor) -> object:
        seen.append(MATMUL.fp32_precision)
        return run(*arguments)

    monkeypatch.setattr(program._refresh, "_run", watched)
    torch.set_float32_matmul_precision("high")
    outputs = net(torch.randn(5, 3))
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    assert seen == ["ieee"] and MATMUL.fp32_precision == "tf32"


def test_where_correlations_serve() -> None:
    """On a GPU: where products are not rounded, and outside of a compiler's programs."""
    assert suits(torch.randn(2, 3))
    with FakeTensorMode():
        single = torch.empty(2, 3, device="cuda")
        double = torch.empty(2, 3, device="cuda", dtype=torch.float64)
    with FakeTensorMode():  # as a compiler traces
        assert suits(double) and not suits(single)
    assert suits(double) and suits(single)
    torch.set_float32_matmul_precision("high")
    assert suits(double) and not suits(single)
