"""KFAC with a learning rate against its formula (Grosse & Martens 2016, section 5), written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.oracles import close
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import LikelihoodError
from kfac_fx.optim import KFACOptions

pytestmark = pytest.mark.usefixtures("float64")
DAMPING, ETA = 0.3, 0.02
RATES, MOMENTA, DECAYS = (0.1, 0.05), (0.9, 0.5), (ETA, 0.0)


def damped_solution(A: Tensor, G: Tensor, V: Tensor, damping: float = DAMPING + ETA) -> Tensor:
    """((A + pi gamma I) (x) (G + gamma / pi I))^-1 vec(V)."""
    gamma = damping**0.5
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))) ** 0.5
    left = torch.linalg.inv(G + gamma / pi * torch.eye(len(G)))
    return left @ V @ torch.linalg.inv(A + pi * gamma * torch.eye(len(A)))


@pytest.mark.parametrize("trust_region", [None, 1e-4, 1e4])
def test_steps_are_those_of_the_formula(trust_region: float | None) -> None:
    """Two groups with options of their own, five batches, rates that a scheduler changes."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    layers = [model[0], model[2]]
    groups = [
        {"params": [*layer.parameters()], "lr": lr, "momentum": mu, "weight_decay": decay}
        for layer, lr, mu, decay in zip(layers, RATES, MOMENTA, DECAYS, strict=True)
    ]
    net = kfac_fx.transform(model, structure="block_diagonal")
    optimizer = kfac_fx.KFAC(
        net,
        params=groups,
        lr=1.0,
        refresh_every=1,
        weight_decay=ETA,
        damping=DAMPING,
        options=KFACOptions(trust_region=trust_region),
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    previous, shortened = [torch.zeros(5, 5), torch.zeros(3, 6)], []
    for step in range(5):
        x, y = torch.randn(16, 4), torch.randint(3, (16,))
        before, plain = [whole(layer) for layer in layers], copy.deepcopy(model)
        F.cross_entropy(plain(x), y).backward()
        optimizer.step(x, y)
        gradients = [
            whole(layer, gradient=True) + decay * w
            for layer, w, decay in zip((plain[0], plain[2]), before, DECAYS, strict=True)
        ]
        rates = [rate * 0.7**step for rate in RATES]
        pairs = zip(optimizer.factors.values(), gradients, strict=True)
        proposals = [damped_solution(*factors, g) for factors, g in pairs]
        lengths = zip(rates, gradients, proposals, strict=True)
        length = float(sum(rate**2 * (g * p).sum() for rate, g, p in lengths))
        scale = 1.0 if trust_region is None else min(1.0, (trust_region / length) ** 0.5)
        assert optimizer.diagnostics["trust"] == pytest.approx(scale)
        shortened.append(scale < 1)
        terms = zip(MOMENTA, previous, rates, proposals, strict=True)
        previous = [mu * last - scale * rate * p for mu, last, rate, p in terms]
        moved = [whole(layer) - w for layer, w in zip(layers, before, strict=True)]
        close(moved, previous)
        assert all(value.norm() > 0 for value in moved)
        schedule.step()
    assert any(shortened) == (trust_region == 1e-4)


@pytest.mark.parametrize("lr", [0.03, 3.0])
def test_adaptive_lengths(lr: float) -> None:
    """Lambda, the lag of averages, the factor, layers and steps, each by its definition."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    layers = [model[0], model[2]]
    net = kfac_fx.transform(model, structure="block_diagonal")
    optimizer = kfac_fx.KFAC(net, lr=lr, momentum=0.5, refresh_every=1, statistics_every=1)
    previous, old, newest = [torch.zeros(5, 5), torch.zeros(3, 6)], None, None
    factor, past, squared, usual, bounded, restraint = 1.0, None, 0.0, 0.0, [], 1.0
    bold, way = 1.0, None
    for step in range(14):
        # Inputs that get shorter make a Fisher that shrinks.
        x, y = torch.randn(16, 4) * 0.7**step, torch.randint(3, (16,))
        before, plain = [whole(layer) for layer in layers], copy.deepcopy(model)
        F.cross_entropy(plain(x), y).backward()
        optimizer.step(x, y)
        gradients = [whole(layer, gradient=True) for layer in (plain[0], plain[2])]
        factors = [[f.clone() for f in both] for both in optimizer.factors.values()]
        weight = 1 - min(1 - 1 / (step + 1), 0.9)
        new = factors
        if old is not None:
            both = zip(factors, old, strict=True)
            new = [
                [(f - (1 - weight) * o) / weight for f, o in zip(fs, os, strict=True)]
                for fs, os in both
            ]
        traces = [float(A.trace() * G.trace()) for A, G in new]
        newest = (
            traces
            if newest is None
            else [0.2 * o + 0.8 * t for o, t in zip(newest, traces, strict=True)]
        )
        mean = sum(float(A.trace() * G.trace()) for A, G in factors) / (25 + 18)
        grown = max(0.0, (step - 10) / 20)
        damping = 0.2 * mean / (max(1.0, factor) ** 2 * bold) ** grown
        assert optimizer.diagnostics["damping"] == pytest.approx(damping)
        lag = max(1.0, mean / (sum(newest) / (25 + 18)))
        pairs = zip(factors, gradients, strict=True)
        proposals = [damped_solution(A, G, g, damping) for (A, G), g in pairs]
        flat, update = (torch.cat([t.flatten() for t in ts]) for ts in (gradients, proposals))
        length = float(flat @ update)
        if past is not None:
            along = float(update @ past)
            cosine = along / (length * squared) ** 0.5
            factor *= math.exp(cosine * (0.1 if cosine > 0 else 0.3))
            trend = float(torch.cosine_similarity(update, way, dim=0)) - 0.02
            bold = min(max(bold * math.exp(0.3 * trend), 1.0), 5.0)
        usual = 0.9 * usual + 0.1 * lag * length if usual else lag * length
        measured = max(usual, lag * length)
        scale = lag * min(1.0, (0.01 / measured) ** 0.5) * factor * restraint
        if past is None:
            past, way, squared = scale * flat, scale * update, scale**2 * length
        else:
            so_far = 0.997**2 * squared + 2 * 0.997 * scale * along + scale**2 * length
            squared = max(so_far, scale**2 * length)
            past, way = 0.997 * past + scale * flat, 0.997 * way + scale * update
        assert optimizer.diagnostics["trust"] == pytest.approx(scale)
        widest = max(0.02, 0.1 / lag**0.5) * max(1.0, factor) ** 0.5 * restraint
        taken = []
        for proposal, w in zip(proposals, before, strict=True):
            share = min(1.0, widest * float(w.norm()) / (scale * float(proposal.norm())))
            taken.append(scale * share * proposal)
        steps = [0.5 * last - lr * t for last, t in zip(previous, taken, strict=True)]
        limits = [0.05 * w.norm() for w in before]
        pairs = zip(steps, limits, strict=True)
        previous = [step * min(1.0, float(limit / step.norm())) for step, limit in pairs]
        shares = [float(limit / step.norm()) for step, limit in zip(steps, limits, strict=True)]
        bounded += [share < 1 for share in shares]
        kept = sum(float(step.norm()) ** 2 for step in previous)
        restraint *= (kept / sum(float(step.norm()) ** 2 for step in steps)) ** 0.025
        close([whole(layer) - w for layer, w in zip(layers, before, strict=True)], previous)
        old = factors
    assert lag > 1
    assert any(bounded) == (lr > 1)


def test_the_length_rule_is_restored() -> None:
    """A run that goes on from a state makes the steps that it would have made."""
    torch.manual_seed(1)
    batches = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(8)]
    runs = []
    for parts in ((8,), (4, 4)):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        at, state = 0, None
        for count in parts:
            generator = torch.Generator().manual_seed(0)
            optimizer = kfac_fx.KFAC(kfac_fx.transform(model), lr=0.3, generator=generator)
            if state is not None:
                optimizer.load_state_dict(state)
            for x, y in batches[at : at + count]:
                optimizer.step(x, y)
            at, state = at + count, optimizer.state_dict()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))


def test_a_batch_that_is_refused_leaves_the_draws_as_they_were() -> None:
    model = nn.Linear(4, 3)
    optimizer = kfac_fx.KFAC(kfac_fx.transform(model), lr=0.1)
    before = optimizer.generator.get_state()
    with pytest.raises(LikelihoodError):
        optimizer.step(torch.randn(16, 4), torch.randint(3, (15,)))
    assert torch.equal(optimizer.generator.get_state(), before)


def whole(layer: nn.Linear, gradient: bool = False) -> Tensor:
    """[W b], or its gradient."""
    weight, bias = (p.grad if gradient else p.detach() for p in (layer.weight, layer.bias))
    return torch.cat([weight, bias[:, None]], 1)
