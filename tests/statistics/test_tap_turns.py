"""Several objects on one module take turns with its taps, and say where they cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from support.inside import estimate_of
from torch import Tensor, nn
from torch.nn import functional as F

import kfac_fx
from kfac_fx.errors import KFACError, ObservationError, TapsTakenError


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 4), torch.randint(3, (16,))


def train(net: nn.Module, preconditioner: kfac_fx.Preconditioner) -> None:
    x, y = batch()
    net.zero_grad()
    outputs = net(x)
    preconditioner.observe(outputs, y)
    F.cross_entropy(outputs, y).backward()
    preconditioner.step()


def recorded(preconditioner: kfac_fx.Preconditioner) -> int:
    return estimate_of(preconditioner).recorded


def test_a_preconditioner_made_again_works() -> None:
    """As a notebook does that runs a cell again; the old one still lives when the new one comes."""
    net = kfac_fx.transform(build())
    made = []
    for _ in range(3):
        made.append(kfac_fx.Preconditioner(net))
        for _ in range(2):
            train(net, made[-1])
    assert [recorded(preconditioner) for preconditioner in made] == [2, 2, 2]


@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
def test_whole_steps_alternate(fisher: str) -> None:
    net = kfac_fx.transform(build())
    options = {"fisher": fisher, "statistics_every": 1}
    first, second = (kfac_fx.Preconditioner(net, **options) for _ in range(2))
    for _ in range(12):
        train(net, first)
        train(net, second)
    assert recorded(first) == recorded(second) == 12


def test_one_that_lacks_taps_says_so() -> None:
    """Without couplings the newer one leaves the taps of pairs off, which the older one needs."""
    net = kfac_fx.transform(build())
    old = kfac_fx.Preconditioner(net, structure="block_tridiagonal")
    train(net, old)
    kept = kfac_fx.Preconditioner(net, structure="block_diagonal")
    with pytest.raises(TapsTakenError, match="switched off taps that this one needs"):
        old.observe(net(batch()[0]))
    # What needs no taps goes on.
    old.refresh()
    assert set(old.apply({n: torch.ones_like(p) for n, p in net.named_parameters()}))
    old.report()
    assert recorded(old) == 1 and recorded(kept) == 0
    assert issubclass(TapsTakenError, KFACError)


def test_another_period_says_so() -> None:
    net = kfac_fx.transform(build())
    first = kfac_fx.Preconditioner(net)
    second = kfac_fx.Preconditioner(net, statistics_every=5)
    train(net, first)
    train(net, second)  # its next step records nothing
    with pytest.raises(TapsTakenError, match="a Preconditioner on the module"):
        train(net, first)


def test_two_in_one_step_say_so() -> None:
    """The taps of one forward serve one of them."""
    net = kfac_fx.transform(build())
    first, second = (kfac_fx.Preconditioner(net) for _ in range(2))
    x, y = batch()
    outputs = net(x)
    first.observe(outputs)
    with pytest.raises(TapsTakenError, match="in the middle of a step"):
        second.observe(outputs)
    F.cross_entropy(outputs, y).backward()
    first.step()
    train(net, second)
    assert recorded(first) == recorded(second) == 1


@pytest.mark.parametrize("other", ["new", "inputs", "kfac", "training step"])
def test_a_step_that_another_one_interrupts_says_so(other: str) -> None:
    net = kfac_fx.transform(build())
    between = kfac_fx.Preconditioner(net)
    kfac = kfac_fx.KFAC(net, damping=1.0) if other == "kfac" else None
    step = kfac_fx.TrainingStep(between) if other == "training step" else None
    first = kfac_fx.Preconditioner(net)
    x, y = batch()
    outputs = net(x)
    first.observe(outputs)
    F.cross_entropy(outputs, y).backward()
    if kfac:
        kfac.step(x, y)
    elif step:
        step(x, y)
    elif other == "inputs":
        between.observe(inputs=x)
    else:
        between = kfac_fx.Preconditioner(net)
    with pytest.raises(TapsTakenError, match=r"between observe\(\) and step\(\)"):
        first.step()
    assert recorded(first) == 0
    train(net, first)  # the step after the error is whole
    assert recorded(first) == 1


def test_an_abandoned_step_hinders_nobody() -> None:
    """An interrupt between observe() and step(); the next Preconditioner starts from nothing."""
    net = kfac_fx.transform(build())
    old = kfac_fx.Preconditioner(net)
    old.observe(net(batch()[0]))
    new = kfac_fx.Preconditioner(net)
    train(net, new)
    assert recorded(new) == 1


def test_copies_have_taps_of_their_own() -> None:
    net = kfac_fx.transform(build())
    old = kfac_fx.Preconditioner(net)
    twin = copy.deepcopy(net)
    new = kfac_fx.Preconditioner(twin)
    old.observe(net(batch()[0]))
    train(twin, new)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    old.step()
    assert recorded(old) == recorded(new) == 1


@pytest.mark.parametrize("way", ["outputs", "inputs", "step"])
def test_a_copy_says_that_it_cannot_record(way: str) -> None:
    net = kfac_fx.transform(build())
    first = kfac_fx.Preconditioner(net)
    train(net, first)
    copied, second = copy.deepcopy((net, first))
    x, _ = batch()
    copied(x).sum().backward()
    with pytest.raises(ObservationError, match=r"a copy by copy.deepcopy.*load_state_dict"):
        if way == "outputs":
            second.observe(copied(x))
        elif way == "inputs":
            second.observe(inputs=x)
        else:
            second.step()
    # The first one goes on, and so does one that is made as the message says.
    train(net, first)
    second = kfac_fx.Preconditioner(copied)
    second.load_state_dict(first.state_dict())
    train(copied, second)
    assert recorded(second) == recorded(first) + 1
