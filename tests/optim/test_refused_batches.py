"""Hard batches, broken ones, and steps after which there is no loss, in whole runs of KFAC."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

import kfac_fx
from kfac_fx.optim import KFACOptions


def task(cases: int = 32) -> tuple[Tensor, Tensor]:
    """Classes that a linear layer tells apart."""
    x = torch.randn(cases, 3)
    return x, x.argmax(1)


def fitted(**options: Any) -> kfac_fx.KFAC:
    """An optimizer whose batches have had small losses for a while."""
    torch.manual_seed(0)
    net = kfac_fx.transform(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))
    optimizer = kfac_fx.KFAC(net, generator=torch.Generator().manual_seed(1), **options)
    for _ in range(100):
        loss = optimizer.step(*task())
    assert loss < 0.3 and optimizer.skipped_batches == 0
    return optimizer


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"lr": 0.1}, True),
        ({"lr": 0.02, "options": KFACOptions(trust_region=None)}, False),
        ({"lr": 0.1, "options": KFACOptions(trust_region=1e-2)}, False),
        ({"damping": 1.0, "options": KFACOptions.paper()}, False),
    ],
    ids=["bounded", "unbounded", "trust_region", "model"],
)
def test_hard_batches_are_used_where_steps_are_bounded(options: Any, used: bool) -> None:
    """A finite loss far above the usual, at parameters that the last step did not spoil."""
    optimizer = fitted(**options)
    x, y = task()
    loss = optimizer.step(x, (y + 1) % 3)
    assert loss > 2
    assert optimizer.skipped_batches == (not used) and optimizer.rejected_steps == 0
    optimizer.step(x * math.nan, y)
    assert optimizer.skipped_batches == 2 - used
    assert all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"])


def test_cases_that_come_seldom_are_fitted() -> None:
    """Of one batch in twelve, whose loss is an outlier as long as it is left out."""
    torch.manual_seed(0)
    net = kfac_fx.transform(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)))
    optimizer = kfac_fx.KFAC(net, lr=0.1, generator=torch.Generator().manual_seed(1))
    rare = torch.randn(32, 3) + 4, torch.randint(3, (32,))
    losses = []
    for step in range(600):
        hard = step >= 60 and step % 12 == 0
        loss = optimizer.step(*(rare if hard else task()))
        losses += [float(loss)] if hard else []
    assert optimizer.skipped_batches == 0
    assert losses[-1] < 0.5 * losses[0]


def test_broken_statistics_are_refused_there_too() -> None:
    """Inputs of another unit: tanh units saturate, so that the loss is nothing special."""
    optimizer = fitted(lr=0.1, statistics_every=1)
    x, y = task()
    optimizer.step(1e8 * x, y)
    assert optimizer.skipped_statistics == optimizer.skipped_batches == 1
    assert optimizer.factors["0"][0].norm() < 10


def test_the_same_warning_comes_ever_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = fitted(lr=0.1)
    with caplog.at_level(logging.WARNING, "kfac_fx"):
        for _ in range(20):
            x, y = task()
            optimizer.step(x * math.nan, y)
    assert optimizer.skipped_batches == 20
    found = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert [text.rpartition("(")[2] for text in found] == [
        f"{count} times so far)" for count in (1, 2, 4, 8, 16)
    ]


# Steps after which there is no loss.


def with_scale(outputs: Tensor) -> Distribution:
    mean, log_scale = outputs.chunk(2, -1)
    return Independent(Normal(mean, log_scale.exp(), validate_args=True), 1)


def regression(scale: float) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
    model.append(nn.Linear(48, 2))
    x = torch.randn(64, 4)
    return model, x, ((x[:, :1] * 2).sin() + x[:, 1:2]) * scale


def test_a_step_after_which_a_scale_overflows_is_tried_again() -> None:
    """torch's distributions raise a ValueError for it; to the optimizer it is a loss of NaN."""
    model, x, y = regression(100.0)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), with_scale)
    losses = [float(optimizer.step(x, y)) for _ in range(30)]
    assert losses[-1] < 0.01 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_an_error_puts_the_parameters_back(error: type[BaseException]) -> None:
    model, x, y = regression(1.0)
    before = [p.detach().clone() for p in model.parameters()]

    def forward(net: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        if any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)):
            raise error("of the user's code")
        return net(inputs)

    options = KFACOptions(forward=forward)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), with_scale, options=options)
    with pytest.raises(error, match="of the user's code"):
        optimizer.step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("lr", [None, 0.05])
def test_a_step_that_leaves_the_next_batch_without_a_loss_is_undone(lr: float | None) -> None:
    model, x, y = regression(1.0)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), with_scale, lr=lr)

    def spoil() -> None:
        with torch.no_grad():
            model[4].bias.fill_(-1e4)

    for _ in range(3):
        first = optimizer.step(x, y)
    rejected = optimizer.rejected_steps
    spoil()
    assert optimizer.step(x, y) < 2 * first.abs() + 1
    assert optimizer.rejected_steps == rejected + 1
    # Where there was no loss before the last step either, the user is told.
    with pytest.raises(ValueError, match="Expected parameter"):
        optimizer.step(x * math.nan, y)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), with_scale, lr=lr)
    spoil()
    with pytest.raises(ValueError, match="Expected parameter"):
        optimizer.step(x, y)
