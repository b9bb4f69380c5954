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
