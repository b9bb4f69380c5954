"""Containers of the user's whose length and items mean something else than those of their class."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import kfac_fx

Route = Literal["symbolic_trace", "export", "eager"]


class Parts(tuple):
    """A formal sum of parts, which has a dimension and no length."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __contains__(self, item: object) -> bool:
        raise NotImplementedError


class Graded(nn.Module):
    """A layer for each part, and settings in a plain object."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = Parts([2, 3])
        self.settings = {"inner": Parts([(1, 2)])}
        self.first, self.second = nn.Linear(2, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        size = self.parts[0]
        return self.first(x[:, :size]) + self.second(x[:, size:]) * self.settings["inner"][0][1]


@pytest.mark.parametrize("route", ["symbolic_trace", "export", "eager"])
def test_a_model_that_holds_them_is_captured(route: Route) -> None:
    torch.manual_seed(0)
    model, x = Graded(), torch.randn(5, 5)
    net = kfac_fx.transform(model, (x,), capture=route)
    assert net.curvature.route == route
    for _ in range(2):
        torch.testing.assert_close(net(x), model(x))
    # What the graph was made with is still compared, in the container and in one within it.
    model.settings["inner"] = Parts([(1, 3)])
    torch.testing.assert_close(net(x), model(x))
