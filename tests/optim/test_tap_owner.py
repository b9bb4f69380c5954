"""One object at a time records with the taps of a module; the others say so."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import KFACError, TapsTakenError


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 4), torch.randint(3, (16,))


def train(net: nn.Module, preconditioner: kfac_fx.Preconditioner) -> None:
    x, y = batch()
    net.zero_grad()
    outputs = net(x)
    preconditioner.observe(outputs)
    F.cross_entropy(outputs, y).backward()
    preconditioner.step()


def test_a_preconditioner_made_again_works() -> None:
    """As a notebook does that runs a cell again; the old one still lives when the new one comes."""
    net = kfac_fx.transform(build())
    for _ in range(3):
        preconditioner = kfac_fx.Preconditioner(net)
        for _ in range(2):
            train(net, preconditioner)
        assert preconditioner._inverse.estimate.recorded == 2


@pytest.mark.parametrize("newer", [kfac_fx.Preconditioner, kfac_fx.KFAC])
def test_the_older_one_says_that_it_records_no_more(newer: Callable[..., object]) -> None:
    net = kfac_fx.transform(build())
    old = kfac_fx.Preconditioner(net)
    train(net, old)
    before = {name: value.clone() for name, (value, _) in old.factors.items()}
    other = newer(net)
    x, _ = batch()
    for call in (
        lambda: old.observe(net(x)),
        lambda: old.observe(inputs=x),
        old.step,
        lambda: old.load_state_dict(old.state_dict()),
    ):
        with pytest.raises(TapsTakenError, match="made on this module after this Preconditioner"):
            call()
    # What needs no taps goes on: factors, reports, the inverse.
    for name, value in before.items():
        torch.testing.assert_close(old.factors[name][0], value, rtol=0, atol=0)
    old.refresh()
    assert set(old.apply({n: torch.ones_like(p) for n, p in net.named_parameters()}))
    assert issubclass(TapsTakenError, KFACError) and other is not None


def test_an_older_kfac_says_so_too() -> None:
    net = kfac_fx.transform(build())
    old, new = kfac_fx.KFAC(net, damping=1.0), kfac_fx.KFAC(net, damping=1.0)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(TapsTakenError, match="a KFAC was made on this module after this KFAC"):
        old.step(*batch())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    new.step(*batch())
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_training_step_of_the_older_one_says_so() -> None:
    net = kfac_fx.transform(build())
    step = kfac_fx.TrainingStep(kfac_fx.Preconditioner(net))
    step(*batch())
    other = kfac_fx.Preconditioner(net)
    with pytest.raises(TapsTakenError):
        step(*batch())
    train(net, other)


def test_the_older_one_goes_on_when_the_newer_one_is_gone() -> None:
    """A trial that was dropped takes nothing with it."""
    net = kfac_fx.transform(build())
    old = kfac_fx.Preconditioner(net)
    train(net, old)
    trial = kfac_fx.Preconditioner(net)
    train(net, trial)
    del trial
    gc.collect()
    old.observe(inputs=batch()[0])
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    assert old._inverse.estimate.recorded == 2


def test_copies_have_taps_of_their_own() -> None:
    net = kfac_fx.transform(build())
    old = kfac_fx.Preconditioner(net)
    twin = copy.deepcopy(net)
    new = kfac_fx.Preconditioner(twin)
    train(net, old)
    train(twin, new)
    assert old._inverse.estimate.recorded == new._inverse.estimate.recorded == 1
