"""Methods of nn.Module that a model has written anew are the net's too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.errors import CaptureError

ROUTES = ("symbolic_trace", "export", "eager")


class Rewritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale, self.table = 1.0, torch.ones(2)

    def eval(self) -> Rewritten:
        self.scale = 0.5
        return super().eval()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.head.parameters(recurse)

    def requires_grad_(self, requires_grad: bool = True) -> Rewritten:
        self.head.requires_grad_(requires_grad)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rewritten:
        self.table = fn(self.table)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)) * self.scale * self.table


@pytest.mark.parametrize("route", ROUTES)
def test_the_net_runs_what_the_model_has_rewritten(route: Any) -> None:
    model, x = Rewritten(), torch.randn(5, 3)
    net = kfac_fx.transform(model, x, capture=route)
    assert [*map(id, net.parameters())] == [*map(id, model.head.parameters())]
    assert net.eval() is net and model.scale == 0.5 and not net.training
    assert torch.equal(net(x), model(x))
    net.train()
    net.requires_grad_(False)
    assert model.layer.weight.requires_grad and not model.head.weight.requires_grad
    assert net.double() is net and model.table.dtype == torch.float64
    assert torch.equal(net(x.double()), model(x.double()))


def test_hidden_parameters_are_refused() -> None:
    class Hiding(nn.Sequential):
        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            return self[1].named_parameters(*args, **kwargs)

    with pytest.raises(CaptureError, match=r"a named_parameters\(\) of its own"):
        kfac_fx.transform(Hiding(nn.Linear(3, 4), nn.Linear(4, 2)))
