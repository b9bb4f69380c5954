"""The part of a batch that statistics and products are taken of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.optim import KFACOptions
from kfac_fx.optim.objective import case_count, first_cases


def test_what_counts_the_cases_is_cut() -> None:
    """Every tensor with as many rows as the first that has rows; nothing else."""
    cases, table = torch.arange(12.0).reshape(6, 2), torch.randn(4, 6)
    scale, weights = torch.tensor(2.0), torch.arange(6.0)
    held = {"x": cases, "table": table, "scale": scale, "weights": weights}
    batch = (torch.tensor(6), held, [6, None])
    assert case_count(batch) == 6
    one, found, rest = first_cases(batch, 2)
    assert torch.equal(one, torch.tensor(6)) and rest == [6, None]
    assert torch.equal(found["x"], cases[:2]) and torch.equal(found["weights"], weights[:2])
    assert found["table"] is table and found["scale"] is scale
    assert case_count([torch.tensor(1.0)]) == 1


@pytest.mark.parametrize(("closure", "expected"), [(False, 16), (True, 64)])
def test_of_how_many_cases_statistics_are(closure: bool, expected: int) -> None:
    """A closure has its batch inside, which cannot be cut."""
    x, y = torch.randn(64, 8, 3), torch.randint(2, (64, 8))
    seen: list[int] = []

    def forward(net: nn.Module, inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        return net(inputs)

    net = kfac_fx.transform(nn.Linear(3, 2))
    options = KFACOptions(statistics_fraction=1 / 4, forward=forward)
    optimizer = kfac_fx.KFAC(net, lr=1e-3, options=options)
    optimizer.step((lambda given: forward(given, x)) if closure else x, y)
    assert seen == [64, expected]
