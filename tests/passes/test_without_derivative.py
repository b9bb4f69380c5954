"""Uses that no derivative comes back to are none, where the parameter has others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_fx


class LowRank(nn.Module):
    """A scaled sum of a frozen weight and a product, whose norm is a constant (DoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 5, bias=False).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 4))
        self.b = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.base.weight + self.b @ self.a).norm(dim=1).detach()
        return (self.base(x) + x @ self.a.T @ self.b.T) / norm


class Guided(nn.Module):
    """A layer whose weight is also compared with a table that nobody trains."""

    def __init__(self, stop: str) -> None:
        super().__init__()
        self.layer, self.stop = nn.Linear(4, 4, bias=False), stop

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer.weight @ x.T
        if self.stop == "argmax":
            chosen = scores.argmax(0).float()
        elif self.stop == "comparison":
            chosen = (scores > 0).float().sum(0)
        elif self.stop == "data":
            chosen = scores.sum(0).data
        else:
            with torch.no_grad():
                chosen = 2 * scores.sum(0)
        return self.layer(x) + chosen[:, None]


ROUTES = ("symbolic_trace", "export", "eager")


def stepped(net: torch.fx.GraphModule, x: Tensor) -> kfac_fx.Preconditioner:
    preconditioner = kfac_fx.Preconditioner(net, "normal", damping=0.1)
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.square().mean().backward()
    preconditioner.step()
    return preconditioner


@pytest.mark.parametrize("route", ROUTES)
def test_a_detached_norm_is_no_use(route: kfac_fx.config.Capture) -> None:
    torch.manual_seed(0)
    model, x = LowRank(), torch.randn(6, 4)
    net = kfac_fx.transform(model, x, capture=route)
    assert {(b.kind, b.approximation) for b in net.curvature.blocks.values()} == {
        ("linear", "kronecker")
    }
    raw = torch.autograd.grad(model(x).square().mean(), model.a)[0]
    preconditioner = stepped(net, x)
    assert all(one.recorded for one in preconditioner.inverse.estimate.blocks.values())
    assert model.a.grad is not None and not torch.allclose(model.a.grad, raw)


@pytest.mark.parametrize("stop", ["argmax", "comparison", "data", "no_grad"])
def test_a_block_does_not_wait_for_what_has_no_derivative(stop: str) -> None:
    torch.manual_seed(0)
    net = kfac_fx.transform(Guided(stop), structure="block_diagonal")
    (block,) = net.curvature.blocks.values()
    assert len(block.uses) == 1 and block.approximation == "kronecker"
    assert stepped(net, torch.randn(6, 4)).inverse.estimate.blocks[block.name].recorded == 1


def test_what_has_no_other_use_keeps_its_block() -> None:
    class Choosing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)  # type: ignore[no-any-return]

    net = kfac_fx.transform(Choosing(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    assert not net.curvature.unused and set(net.curvature.blocks) == {"0", "2"}
