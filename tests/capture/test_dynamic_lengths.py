"""One transform for all batch sizes and sequence lengths."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.oracles import Categorical, Measure, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(self.norm(x)).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.scale * self.out(y.transpose(1, 2).reshape(n, t, d))


class Transformer(nn.Module):
    """Tied tokens, learned positions; with a check that only torch.export can follow."""

    def __init__(self, checks: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(20, 4)
        self.block, self.head = Block(4, 2), nn.Linear(4, 7, bias=False)
        self.head.weight, self.checks = self.tokens.weight, checks

    def forward(self, ids: Tensor) -> Tensor:
        if self.checks and ids.shape[1] > 20:
            raise ValueError("too long")
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.block(x))


@pytest.mark.parametrize("route", ["symbolic_trace", "export"])
def test_transformer_at_other_lengths(measure: Measure, route: str) -> None:
    """Outputs are the model's, factors those of a fresh transform at that length."""
    model, likelihood = Transformer(route == "export"), Categorical()
    net = kfac_fx.transform(model, torch.randint(7, (3, 6)), strict=True)
    assert net.curvature.route == route
    for cases, length in ((4, 5), (2, 9), (3, 16), (5, 1)):
        ids = torch.randint(7, (cases, length))
        y = torch.randint(7, (cases, length))
        close((net(ids),), (model(ids),))
        fresh = kfac_fx.transform(copy.deepcopy(model), torch.randint(7, (max(cases, 2), length)))
        if length > 1 or route != "export":
            want = measure(fresh, ids, y, likelihood, "empirical").factors
            found = measure(net, ids, y, likelihood, "empirical").factors
            assert set(found) == set(want)
            for name, factors in want.items():
                close(found[name], factors)


class Table(nn.Module):
    """Positions from a plain parameter of a fixed length."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 4:
            raise ValueError("four features, please")
        return self.head(x + self.position)


def test_a_length_that_the_export_fixed_goes_to_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the graph has sizes for constants, another one could be broadcast without a word."""
    model = Table()
    net = kfac_fx.transform(model, torch.randn(3, 6, 4))
    assert net.curvature.route == "export" and net(torch.randn(5, 6, 4)).shape == (5, 6, 3)
    assert "was captured" not in caplog.text
    x = torch.randn(3, 1, 4)
    close((net(x),), (model(x),))
    assert "[3, 1, 4]. The model itself runs" in caplog.text
    with pytest.raises(RuntimeError, match="must match the size"):
        net(torch.randn(3, 5, 4))


def test_the_check_of_sizes_compiles() -> None:
    net = kfac_fx.transform(Table(), torch.randn(3, 6, 4))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.randn(5, 6, 4)
    close((compiled(x),), (net(x),))
