"""Passes of oneDNN's LSTM (float32, on a CPU) that run as their traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.codegen.replay import replayable
from kfac_fx.statistics import replays
from kfac_fx.statistics.replays import BEFORE, PROOFS

STEPS = BEFORE + PROOFS + 4


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 6)
        self.recurrent = nn.LSTM(6, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.recurrent(self.embedding(x))[0][:, -1])
        return out


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 5, 8), torch.randint(4, (16,))


def by_kfac(net: Any) -> list[Tensor]:
    """The stochastic form, in whose passes of the gradient the LSTM is one operator."""
    optimizer = kfac_fx.KFAC(net, lr=0.05, generator=torch.Generator().manual_seed(1))
    return [optimizer.step(*batch()) for _ in range(STEPS)]


def by_training_step(net: Any) -> list[Tensor]:
    """Passes of ``Preconditioner``, with and without statistics."""
    generator = torch.Generator().manual_seed(1)
    pre = kfac_fx.Preconditioner(net, statistics_every=2, generator=generator)
    step = kfac_fx.TrainingStep(pre)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    found = []
    for _ in range(2 * STEPS):
        optimizer.zero_grad()
        found.append(step(*batch()))
        pre.step()
        optimizer.step()
    return found


@pytest.mark.parametrize("run", [by_kfac, by_training_step])
@pytest.mark.parametrize("exclude", [(), ("recurrent",)], ids=["all", "heads"])
def test_steps_are_those_without_traces(
    run: Any, exclude: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for largest in (replays.LARGEST, -1):
        monkeypatch.setattr(replays, "LARGEST", largest)
        torch.manual_seed(0)
        net = kfac_fx.transform(Reader(), exclude=exclude)
        found.append([*run(net), *(p.detach().clone() for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_trace_has_the_workspace_of_the_backward() -> None:
    """Though gradients are off where it runs."""
    layer = nn.LSTM(3, 4)

    def function(x: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            weights = [*layer.parameters()]
            out = layer(x)[0].square().sum()
            return [out.detach(), *torch.autograd.grad(out, weights)]

    x = torch.randn(5, 2, 3)
    module = replayable(function, [x])
    with torch.no_grad():
        replayed = module(x)
    assert not any(t.requires_grad for t in replayed)
    for one, other in zip(replayed, function(x), strict=True):
        assert torch.equal(one, other)
