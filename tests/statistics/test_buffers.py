"""The sources of statistics: their names and order, and what becomes of the derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.ir.use import StatisticKey
from kfac_fx.statistics.buffers import StatisticSources, sources_of, squared


class Untapped(nn.Module):
    """A layer, and a parameter that no rule knows: its gradient is all that there is of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.p = nn.Parameter(0.1 * torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ torch.linalg.matrix_exp(self.p)


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def sources() -> StatisticSources:
    net = kfac_fx.transform(chain(), structure="block_diagonal")
    return sources_of(net, net.curvature.blocks.values())


def keys(net: nn.Module, *names: str) -> list[StatisticKey]:
    """Of block and factor, `0.A`."""
    blocks = net.curvature.blocks
    pairs = (name.rsplit(".", 1) for name in names)
    return [StatisticKey(blocks[block].slot, factor) for block, factor in pairs]


def test_factors_of_inputs_come_first() -> None:
    """A backward that is asked for them alone is the first of the exact Fisher's."""
    net = kfac_fx.transform(chain(), structure="block_diagonal")
    sources = sources_of(net, net.curvature.blocks.values())
    wanted = keys(net, "0.A", "2.A", "0.G", "2.G")
    assert [one.key for one in sources.names.tapped] == wanted
    assert [tuple(f.shape) for f in sources.factors] == [(5, 5), (6, 6), (5, 5), (3, 3)]
    assert len(sources.inputs) == len(sources.gradients) == 2
    assert all(one.symmetric for one in sources.names.tapped)
    named = sources.statistics([torch.ones(2) * k for k in range(4)], [])
    assert list(named) == wanted and [float(value[0]) for value in named.values()] == [0, 1, 2, 3]


def test_what_did_not_come_has_no_statistic(sources: StatisticSources) -> None:
    found = sources.statistics([None, torch.ones(1), None, None], [])
    assert list(found) == [sources.names.tapped[1].key]


@pytest.mark.parametrize("calls", [1, 3])
def test_several_calls_of_a_layer_share_the_mean_of_their_derivatives(
    sources: StatisticSources, calls: int
) -> None:
    sources.states[0].deliveries = calls
    values = [torch.full((1,), 6.0)] * 4
    found = [float(value) for value in sources.statistics(values, []).values()]
    assert found == pytest.approx([6.0, 6.0, 6.0 / calls, 6.0])


def test_a_pair_shares_the_geometric_mean_of_its_calls() -> None:
    net = kfac_fx.transform(chain())
    curvature = net.curvature
    sources = sources_of(net, [*curvature.blocks.values(), *curvature.pairs])
    by_key = dict(zip((one.key for one in sources.names.tapped), sources.states, strict=True))
    first, second = keys(net, "0.A", "2.A")
    by_key[first].deliveries, by_key[second].deliveries = 2, 8
    values = [torch.full((1,), 4.0)] * len(sources.factors)
    found = sources.statistics(values, [])
    (pair,) = curvature.pairs
    cross = StatisticKey(pair.slot, pair.factors[1].name)
    assert float(found[cross]) == pytest.approx(4.0 / (2 * 8) ** 0.5)


def test_without_a_tap_the_gradient_is_squared() -> None:
    """Flat, and only where all of the block's parameters have one."""
    net = kfac_fx.transform(Untapped(), structure="block_diagonal")
    sources = sources_of(net, net.curvature.blocks.values())
    (block,) = sources.names.untapped
    assert block.names == ("p",) and sources.wanted[-1] is net.get_parameter("p")
    gradient = torch.randn(3, 3)
    nothing = [None] * len(sources.factors)
    found = sources.statistics(nothing, [gradient])
    assert torch.equal(found[block.key], gradient.flatten() ** 2)
    assert sources.statistics(nothing, [None]) == {}


@pytest.mark.parametrize(
    ("gradient", "want"),
    [
        (torch.tensor([3.0, -2.0], dtype=torch.bfloat16), torch.tensor([9.0, 4.0])),
        (torch.tensor([3.0 + 4.0j]), torch.tensor([25.0])),
        (torch.tensor([0.0, 2.0]).to_sparse(), torch.tensor([0.0, 4.0])),
        (torch.tensor([2.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)),
    ],
    ids=["low precision", "complex", "sparse", "double"],
)
def test_squares_are_real_dense_and_in_float32_at_least(gradient: Tensor, want: Tensor) -> None:
    found = squared(gradient)
    assert found.dtype == want.dtype and torch.equal(found, want)


def paused(sources: StatisticSources) -> list[bool]:
    return [state.paused for state in sources.states]


def test_some_factors_alone_are_formed_inside_and_all_after_it(sources: StatisticSources) -> None:
    with pytest.raises(KeyError), sources.only(sources.inputs):
        assert paused(sources) == [False, False, True, True]
        raise KeyError
    with sources.only(sources.gradients):
        assert paused(sources) == [True, True, False, False]
    assert paused(sources) == [False] * 4


def test_what_passes_left_is_forgotten(sources: StatisticSources) -> None:
    sources.pause()
    assert paused(sources) == [True] * 4
    for factor, state in zip(sources.factors, sources.states, strict=True):
        state.deliveries = 2
        factor.grad = torch.zeros_like(factor)
    sources.forget()
    assert paused(sources) == [False] * 4
    assert [state.deliveries for state in sources.states] == [0] * 4
    assert all(factor.grad is None for factor in sources.factors)
