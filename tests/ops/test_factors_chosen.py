"""Experts that the data choose one by one, against the definition for each of them."""

from __future__ import annotations

import pytest
import torch
from support.oracles import Measure, Normal, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
EXPERTS, INNER, WIDTH = 3, 5, 4


class Experts(nn.Module):
    """Stacked matrices of three experts; the last feature of a row says which one it goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Parameter(torch.randn(EXPERTS * INNER, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden, choice = torch.tanh(self.fc(x)), x[:, -1].long()
        result = torch.zeros_like(hidden)
        for expert in choice.unique():
            rows = torch.where(choice == expert)[0]
            up = self.up.view(EXPERTS, INNER, WIDTH)[expert]
            inner = torch.tanh(hidden[rows].matmul(up.T))
            result = result.index_add(0, rows, inner.matmul(self.down[expert]))
        return result


def rows_of(choice: list[int]) -> Tensor:
    x = torch.randn(len(choice), WIDTH)
    x[:, -1] = torch.tensor(choice)
    return x


@pytest.mark.parametrize("example", [[0, 2, 2], [1], [2, 1, 0]])
def test_every_expert_has_a_block(example: list[int]) -> None:
    """Whichever the example inputs reach, in the experts' order."""
    curvature = kfac_fx.transform(Experts(), rows_of(example)).curvature
    assert curvature.route == "eager" and not curvature.fallbacks and not curvature.unused
    for name in ("up", "down"):
        blocks = [curvature.blocks[f"{name}[{index}]"] for index in range(EXPERTS)]
        entries = torch.arange(EXPERTS * INNER * WIDTH).reshape(blocks[0].layouts[0].start)
        first = [int(block.layouts[0].apply(entries).min()) for block in blocks]
        assert first == [index * INNER * WIDTH for index in range(EXPERTS)]
        assert {block.approximation for block in blocks} == {"kronecker"}


def test_factors_of_experts_that_the_example_did_not_reach(measure: Measure) -> None:
    """A_e = mean over its rows of a a^T, G_e = sum over its rows of g g^T / N."""
    model, choice = Experts(), [0, 1, 1, 0, 1, 1]
    net, x = kfac_fx.transform(model, rows_of([0, 2])), rows_of(choice)
    y = Normal().draw(model(x))
    factors = measure(net, x, y, Normal(), "empirical").factors
    hidden = torch.tanh(model.fc(x)).detach()
    g = (model(x) - y).detach()
    for expert in (0, 1):
        rows = torch.tensor(choice) == expert
        up, down = model.up.view(EXPERTS, INNER, WIDTH)[expert], model.down[expert]
        inner = torch.tanh(hidden[rows] @ up.T).detach()
        g_up = ((g[rows] @ down.T) * (1 - inner.square())).detach()
        for name, a, s in (("up", hidden[rows], g_up), ("down", inner, g[rows])):
            close(factors[f"{name}[{expert}]"][:2], (a.T @ a / len(a), s.T @ s / len(x)))
    assert model.down.grad is not None
    assert not model.down.grad[2].any() and model.down.grad[:2].isfinite().all()
