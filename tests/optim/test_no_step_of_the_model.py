"""KFAC goes on with a rate where steps of the model cannot be made, or never lower the loss."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.networks import mlp
from torch import Tensor, nn
from torch import distributions as D

import kfac_fx
from kfac_fx.errors import UnknownOptionError
from kfac_fx.optim import KFACOptions
from kfac_fx.optim.failed_steps import EARLY, HARMLESS, STUCK, FailedSteps

Case = tuple[nn.Module, Any, Tensor, Tensor]


def heavy_tails() -> Case:
    x = torch.randn(96, 4)
    y = x[:, 0] * x[:, 1] + 0.1 * D.StudentT(2.0).sample((96,))
    return mlp(4, 16, 2), lambda f: D.StudentT(3.0, f[:, 0], f[:, 1].exp()), x, y


def mixture() -> Case:
    x = torch.randn(96, 4)
    y = x[:, 0] + torch.randint(2, (96,)) * 4

    def likelihood(f: Tensor) -> D.Distribution:
        parts = D.Normal(f[:, 2:4], f[:, 4:].exp())
        return D.MixtureSameFamily(D.Categorical(logits=f[:, :2]), parts)

    return mlp(4, 16, 6), likelihood, x, y


def learnt_count() -> Case:
    x = torch.randn(96, 4)
    y = D.NegativeBinomial(4.0, logits=x[:, 0]).sample()
    return mlp(4, 16, 2), lambda f: D.NegativeBinomial(f[:, 0].exp(), logits=f[:, 1]), x, y


def bags() -> Case:
    model = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 3))
    x = torch.randint(20, (96, 5))
    return model, "categorical", x, (x > 9).sum(1) // 2


CASES = {
    "StudentT": heavy_tails,
    "MixtureSameFamily": mixture,
    "NegativeBinomial": learnt_count,
    "_embedding_bag": bags,
}


def sure_and_wrong() -> Case:
    """Inputs of a thousand: the first weights say one class, whatever the target is."""
    x = torch.cat([torch.randn(128, 8), torch.full((128, 8), 1000.0)], 1)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    return model, "categorical", x, (4 * x[:, 0]).long() % 10


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def built(make: Callable[[], Case], **options: Any) -> tuple[nn.Module, kfac_fx.KFAC, Any]:
    torch.manual_seed(0)
    model, likelihood, x, y = make()
    generator = torch.Generator().manual_seed(1)
    net = kfac_fx.transform(model)
    return model, kfac_fx.KFAC(net, likelihood, generator=generator, **options), (x, y)


@pytest.mark.parametrize("name", CASES)
def test_what_has_no_products_is_trained_with_a_rate(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, optimizer, batch = built(CASES[name])
    losses = [float(optimizer.step(*batch)) for _ in range(40)]
    assert losses[-1] < losses[0] - 0.2 * abs(losses[0])
    assert optimizer.diagnostics["rate"] == 0.1 and optimizer.rejected_steps == 0
    (found,) = warnings(caplog)
    assert name in found and "rate of 0.1" in found and "lr=" in found
    assert "iteration 1:" in found


@pytest.mark.parametrize("name", ["StudentT", "_embedding_bag", "sure and wrong"])
@pytest.mark.parametrize("at", [1, STUCK, 25])
def test_a_resumed_run_goes_on_bit_by_bit_and_says_no_more(
    name: str, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    make = CASES.get(name, sure_and_wrong)
    model, optimizer, batch = built(make)
    for _ in range(at):
        optimizer.step(*batch)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, resumed, _ = built(make)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(10):
        optimizer.step(*batch)
    caplog.clear()
    for _ in range(10):
        resumed.step(*batch)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert resumed.diagnostics["rate"] == 0.1
    assert len(warnings(caplog)) == (name not in CASES and at < STUCK)


def test_the_rule_of_the_paper_says_why_it_cannot_be_used() -> None:
    model, optimizer, batch = built(heavy_tails, options=KFACOptions.paper())
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(UnknownOptionError, match=r"paper.*StudentT.*lr="):
            optimizer.step(*batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_network_that_is_sure_and_wrong_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    """Lambda is a multiple of a Fisher of 1e-9 there, and steps once were too long for ever."""
    _, optimizer, batch = built(sure_and_wrong)
    losses = [float(optimizer.step(*batch)) for _ in range(100)]
    assert losses[0] > 20 and losses[-1] < losses[0] / 10
    (found,) = warnings(caplog)
    assert f"iteration {STUCK}: {STUCK} batches in a row" in found
    assert optimizer.rejected_steps == STUCK


def test_a_fit_to_the_last_digit_is_nothing_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(mlp(6, 32, 1)), "bernoulli")
    optimizer._choice.open = False  # what becomes of steps of the model, of which there are more
    for _ in range(200):
        loss = optimizer.step(x, (x[:, :1] * x[:, 1:2] > 0).float())
    assert loss < 1e-6 and optimizer.rejected_steps > 0
    assert "rate" not in optimizer.diagnostics
    assert not warnings(caplog)


def failed(iteration: int, rise: float, times: int = 1) -> list[bool]:
    """What is said of batches whose loss of one was raised, after a first loss of ten."""
    made = FailedSteps()
    made.begin(10.0)
    found = []
    for _ in range(times):
        made.raised(1.0, 1.0 + rise)
        found.append(made.none_made(iteration))
    return found


def test_which_failures_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Neither those of the search for lambda, nor those of rounding."""
    caplog.set_level(logging.DEBUG, "kfac_fx")
    assert failed(EARLY, 0.5, STUCK) == [False] * (STUCK - 1) + [True]
    assert failed(EARLY + 1, HARMLESS, STUCK) == [False] * STUCK
    assert not warnings(caplog) and len(caplog.records) == 2 * STUCK
    assert failed(EARLY + 1, float("nan"), STUCK)[-1]
    assert len(warnings(caplog)) == 2  # the first and the second of three


def test_a_step_that_is_made_ends_the_row() -> None:
    made = FailedSteps()
    made.begin(1.0)
    for _ in range(STUCK - 1):
        made.raised(1.0, 2.0)
        assert not made.none_made(1)
    other = FailedSteps()
    other.load(made.state())
    made.made()
    for each, stuck in ((made, False), (other, True)):
        each.raised(1.0, 2.0)
        assert each.none_made(1) is stuck
