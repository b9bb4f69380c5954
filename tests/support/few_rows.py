"""Optimizers whose batches have few rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.optim import case_rows
from kfac_fx.optim.case_rows import CaseRows
from kfac_fx.optim.objective import Batch


def plain_batches_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain batches have rows however few they are."""
    monkeypatch.setattr(case_rows, "FEWEST", 1)
    monkeypatch.setattr(case_rows, "PLAIN", 10**6)


def optimizer_of(model: nn.Module, likelihood: Any, **kwargs: Any) -> kfac_fx.KFAC:
    net = kfac_fx.transform(model)
    return kfac_fx.KFAC(net, likelihood, generator=torch.Generator().manual_seed(0), **kwargs)


def rows_of(optimizer: kfac_fx.KFAC, batch: Batch, most: int = 1024) -> CaseRows:
    parameters = optimizer._groups.parameters()
    _, gradient = optimizer._objective.gradient(batch, parameters)
    named = dict(zip(parameters, gradient, strict=True))
    return optimizer._objective.rows(batch, parameters, named, most)


class Mixing(nn.Module):
    """Cases that depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).tanh()
        return self.last(x - x.mean(0))
