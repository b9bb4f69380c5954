"""The same step on a CUDA device and on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kfac_fx

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_step_equals_that_on_the_cpu() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Flatten(), nn.Linear(144, 5)
    ).double()
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        net = kfac_fx.transform(copy.deepcopy(model).to(device))
        preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact", damping=1e-2)
        outputs = net(x.to(device))
        preconditioner.observe(outputs)
        outputs.square().sum().backward()
        preconditioner.step()
        found.append([parameter.grad.cpu() for parameter in net.parameters()])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tikhonov", ["factored", "exact"])
def test_the_operator_equals_that_on_the_cpu(tikhonov: str) -> None:
    structure = "block_tridiagonal" if tikhonov == "factored" else "block_diagonal"
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, v, found = torch.randn(8, 4, dtype=torch.float64), torch.randn(53, dtype=torch.float64), []
    for device in ("cpu", "cuda"):
        net = kfac_fx.transform(copy.deepcopy(model).to(device), structure=structure)
        preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact", tikhonov=tikhonov)
        outputs = net(x.to(device))
        preconditioner.observe(outputs)
        outputs.square().sum().backward()
        preconditioner.step()
        operator = preconditioner.curvature_operator()
        drawn = operator.flat(operator.sample(torch.Generator().manual_seed(0)))
        values = operator @ v, operator.solve(v), operator.logdet(), operator.diagonal(), drawn
        found.append([value.cpu() for value in values])
    for cpu, gpu in zip(found[0][:4], found[1][:4], strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-7, atol=1e-8)
    assert found[1][4].isfinite().all()  # eigenvectors differ by signs, so draws do
