"""Batches that grow: sizes, draws, and their use by a DataLoader."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kfac_fx
from kfac_fx import errors


def test_sizes_of_the_paper() -> None:
    batches = kfac_fx.GrowingBatches(20_000, 600)
    assert batches.size(1) == 1000
    assert batches.size(500) == batches.size(600) == 20_000
    middle = batches.size(250) / batches.size(249)
    assert middle == pytest.approx((20_000 / 1000) ** (1 / 499), rel=1e-3)


def test_a_loader_takes_them() -> None:
    data = TensorDataset(torch.arange(50))
    batches = kfac_fx.GrowingBatches(50, 4, first=10, full_at=4)
    seen = [x for (x,) in DataLoader(data, batch_sampler=batches)]
    assert [len(x) for x in seen] == [batches.size(k) for k in (1, 2, 3, 4)] and len(seen[-1]) == 50
    assert all(len(x.unique()) == len(x) for x in seen)


def test_a_run_goes_on_where_it_stopped() -> None:
    late = kfac_fx.GrowingBatches(50, 2, first=10, full_at=4, first_iteration=3)
    assert [len(rows) for rows in late] == [late.size(3), 50]


def test_numbers_must_be_positive() -> None:
    with pytest.raises(errors.UnknownOptionError):
        kfac_fx.GrowingBatches(0, 4)
