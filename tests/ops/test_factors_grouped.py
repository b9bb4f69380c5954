"""Grouped products of a mixture of experts, against loops over experts (the kernel is float32)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.oracles import Measure, Normal
from torch import Tensor, nn

import kfac_fx

ROWS = (3, 0, 4)


class Experts(nn.Module):
    """Three experts of four to four features; the rows come sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(3, 4, 4) / 2)
        self.register_buffer("ends", torch.tensor(ROWS).cumsum(0).to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return F.grouped_mm(torch.tanh(self.fc(x)), self.weight, offs=self.ends)


@pytest.mark.parametrize("route", ["symbolic_trace", "eager"])
def test_experts(measure: Measure, route: str) -> None:
    """One block an expert, over the rows that it got; one got none."""
    model, x = Experts(), torch.randn(sum(ROWS), 4)
    y = Normal().draw(model(x))
    net = kfac_fx.transform(model, (x,), capture=route)
    A, G = measure(net, x, y, Normal(), "empirical").factors["weight"][:2]
    rows = torch.tanh(model.fc(x)).detach().split(ROWS)
    derivatives = (model(x) - y).detach().split(ROWS)
    for index, (a, g) in enumerate(zip(rows, derivatives, strict=True)):
        torch.testing.assert_close(A[index], a.T @ a / max(len(a), 1))
        torch.testing.assert_close(G[index], g.T @ g / len(x))
