"""Exported graphs take tensors whose memory is laid out otherwise than at the capture."""

from __future__ import annotations

import pytest
import torch
from support.oracles import close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")


class Turned(nn.Module):
    """Makes its input contiguous, which has nothing to do where that is turned already."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2).contiguous().view(x.shape[0], -1))


class Written(nn.Module):
    """Writes through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).clone()
        y.view(-1).mul_(2.0)
        return y


def turned(cases: int) -> Tensor:
    return torch.randn(cases, 4, 3).transpose(1, 2)


@pytest.mark.parametrize("program", [False, True], ids=["model", "program"])
def test_other_inputs(program: bool) -> None:
    model = Turned()
    captured = torch.export.export(model, (turned(4),)) if program else model
    net = kfac_fx.transform(captured, None if program else turned(4), capture="export")
    for x in (turned(4), torch.randn(4, 3, 4)):
        assert torch.equal(net(x), model(x))
        want = torch.autograd.grad(model(x).square().sum(), model.layer.weight)
        close(torch.autograd.grad(net(x).square().sum(), next(iter(net.parameters()))), want)


def test_a_view_that_is_written_through_stays_one() -> None:
    """A copy would be right today, and wrong in silence for another layout."""
    model, x = Written(), torch.randn(5, 3)
    net = kfac_fx.transform(model, x, capture="export")
    assert torch.ops.aten.view.default in {node.target for node in net.graph.nodes}
    assert torch.equal(net(x), model(x))
