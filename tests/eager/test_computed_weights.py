"""Weights that a running model computes from its parameters, in passes of the library's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kfac_fx


class Rounded(nn.Linear):
    """A layer whose weight is rounded, with a straight-through gradient, as for a small device."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 1e9):  # no graph has this, so the model runs as it is written
            return x
        scaled = (self.weight / 0.1).clamp(-3, 3)
        rounded = scaled + (scaled.round() - scaled).detach()
        return nn.functional.linear(x, rounded * 0.1, self.bias)


def test_statistics_of_a_pass_of_its_own() -> None:
    """They are those that the user's forward records, though copies stand for the parameters."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 8), torch.randint(3, (16,))
    found = []
    for own_pass in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(Rounded(8, 6), nn.Tanh(), Rounded(6, 3))
        net = kfac_fx.transform(model, (x,))
        assert net.curvature.route == "eager"
        block = next(b for b in net.curvature.blocks.values() if "0.weight" in b.parameters)
        (use,) = block.uses
        assert use.tap is not None and use.tap.scale is not None and use.tap.scale.entrywise
        preconditioner = kfac_fx.Preconditioner(net, "categorical", fisher="empirical")
        outputs = net(x)
        if own_pass:
            preconditioner.observe(targets=y, inputs=x)
        else:
            preconditioner.observe(outputs, y)
        nn.functional.cross_entropy(outputs, y).backward()
        preconditioner.step()
        found.append([t for factors in preconditioner.factors.values() for t in factors])
    torch.testing.assert_close(found[0], found[1])


def test_kfac_trains_it() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    net = kfac_fx.transform(nn.Sequential(Rounded(8, 6), nn.Tanh(), Rounded(6, 3)), (x,))
    optimizer = kfac_fx.KFAC(net, "categorical")
    losses = [float(optimizer.step(x, y)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
