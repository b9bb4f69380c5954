"""LAPACK may leave NaN without an error: what is lost is made again, and nothing else is."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from support.networks import mlp
from torch import Tensor

import kfac_fx
from kfac_fx.codegen.program import Refresher

SIZE = 6
"""Of the factors that the broken routines spoil: A of the first layer."""


def gradients(dtype: torch.dtype, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = mlp(SIZE - 1, 4, 3).to(dtype)
    net = kfac_fx.transform(model, structure="block_diagonal", ekfac=options["tikhonov"] == "ekfac")
    pre = kfac_fx.Preconditioner(net, fisher="exact", damping=1e-2, **options)
    outputs = net(torch.linspace(-1, 1, 8 * (SIZE - 1)).reshape(8, -1).sin().to(dtype))
    pre.observe(outputs)
    outputs.square().sum().backward()
    pre.step()
    assert pre.skipped_gradients == 0
    return {name: p.grad.double() for name, p in net.named_parameters()}


def spoilt(function: Callable, part: int | None) -> Callable:
    """The function with NaN in one of its results, for float32 matrices of one size."""

    def call(matrix: Tensor, *args: object, **options: object) -> object:
        found = function(matrix, *args, **options)
        if matrix.dtype != torch.float32 or matrix.shape[-1] != SIZE:
            return found
        if part is None:
            return torch.full_like(found, float("nan"))
        return tuple(
            torch.full_like(f, float("nan")) if i == part else f for i, f in enumerate(found)
        )

    return call


@pytest.mark.parametrize(
    ("where", "name", "part", "tikhonov"),
    [
        (torch.linalg, "eigh", 0, "exact"),
        (torch.linalg, "eigh", 1, "exact"),
        (torch.linalg, "eigh", 1, "ekfac"),
        (torch, "cholesky_inverse", None, "factored"),
    ],
)
def test_only_what_is_lost_is_made_again(
    where: object,
    name: str,
    part: int | None,
    tikhonov: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    want = gradients(torch.float64, tikhonov=tikhonov)
    again = []
    whole = Refresher._raised
    monkeypatch.setattr(where, name, spoilt(getattr(where, name), part))
    monkeypatch.setattr(
        Refresher, "_raised", lambda self, *args: again.append(args[2]) or whole(self, *args)
    )
    caplog.set_level(logging.WARNING, logger="kfac_fx")
    got = gradients(torch.float32, tikhonov=tikhonov)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=2e-3, atol=1e-4 * float(value.abs().max()))
    (lost,) = again
    assert lost is not None
    assert {key.block for key in lost} == {next(iter(lost)).block}  # one layer's
    assert "not finite: these are made again in float64" in caplog.text
