"""Dependencies between layers, the forest that the topology chooses, and who is left out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.inside import forget, taken
from support.oracles import Categorical, Measure
from torch import Tensor, nn

import kfac_fx
from kfac_fx.passes import strip_taps


def edges_of(net: object) -> dict[tuple[str, str], kfac_fx.Edge]:
    return {(edge.source, edge.target): edge for edge in net.curvature.edges}


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.one(x))), 2)
        return self.head(torch.flatten(torch.relu(self.two(x)), 1))


def test_paths_are_described() -> None:
    edges = edges_of(kfac_fx.transform(Pooled()))
    assert list(edges) == [("one", "two"), ("two", "head")]
    assert edges["one", "two"].path == ("batch_norm", "relu", "max_pool2d")
    assert edges["one", "two"].kinds == ("pooling",)
    assert edges["two", "head"].path == ("relu", "flatten")
    assert edges["two", "head"].kinds == ("flatten",)
    assert str(edges["two", "head"]) == "two -> relu -> flatten -> head (flatten)"


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(torch.relu(h + self.two(torch.relu(self.one(h)))))


def test_direct_successors_go_before_skips() -> None:
    net = kfac_fx.transform(Skip())
    edges = edges_of(net)
    assert edges["stem", "head"].kinds == ("fork", "join", "skip")
    assert edges["stem", "head"].weight < edges["two", "head"].weight
    assert net.curvature.parent == {"stem": "one", "one": "two", "two": "head"}
    assert "stem given one" in str(net.curvature)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.widen = nn.Conv1d(4, 6, 1)
        self.depth = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.narrow = nn.Conv1d(6, 3, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.widen(self.table(ids).mT))
        return self.narrow(torch.relu(self.depth(x))).mean(-1)


def test_layers_that_cannot_couple_are_passed_and_named(measure: Measure) -> None:
    net = kfac_fx.transform(Depthwise())
    curvature = net.curvature
    assert curvature.parent == {"widen": "narrow"}
    assert {("table", "widen"), ("widen", "depth"), ("depth", "narrow")} < set(edges_of(net))
    assert "one for each group" in curvature.uncoupled["depth"]
    assert "diagonal" in curvature.uncoupled["table"]
    measure(net, torch.randint(5, (4, 7)), None, Categorical())
    assert all(p.grad.isfinite().all() for p in net.parameters())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(torch.tanh(self.one(x)))))


def test_shared_layers_are_left_out() -> None:
    curvature = kfac_fx.transform(Twice()).curvature
    assert curvature.couplings == ()
    assert "counted" in curvature.uncoupled["one"]
    assert "no other layer" in curvature.uncoupled["two"]


def test_a_reduced_transposed_convolution_comes_first_in_no_pair(measure: Measure) -> None:
    """Its patches need positions that a link does not have where they are reduced."""
    up = [nn.ConvTranspose1d(3, 3, 3, stride=2, output_padding=1) for _ in range(2)]
    head = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 2))
    model = nn.Sequential(nn.Conv1d(3, 3, 3), nn.Tanh(), *up, *head)
    net = kfac_fx.transform(model, weight_sharing="reduce")
    assert net.curvature.parent == {"0": "2"}
    assert kfac_fx.transform(model).curvature.parent == {"0": "2", "2": "3", "3": "6"}
    measure(net, torch.randn(4, 3, 6), None, Categorical())
    assert all(p.grad.isfinite().all() for p in net.parameters())


class Packed(nn.Module):
    """Attention by torch's module: packed projections, positions before cases."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(y)).mean(1)


class Unpacked(nn.Module):
    """The same, one layer for each projection."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.out, self.head = copy.deepcopy(packed.attention.out_proj), copy.deepcopy(packed.head)
        weights = packed.attention.in_proj_weight.detach().chunk(3)
        biases = packed.attention.in_proj_bias.detach().chunk(3)
        for layer, weight, bias in zip((self.q, self.k, self.v), weights, biases, strict=True):
            layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.head(torch.tanh(self.out(y))).mean(1)


@pytest.mark.usefixtures("float64")
def test_packed_attention_couples_as_its_layers_would(measure: Measure) -> None:
    """Factors may be scaled between A and G, as cases and positions are: the products agree."""
    packed = Packed()
    unpacked = Unpacked(packed)
    x = torch.randn(5, 6, 4)
    names = {"attention.in_proj_weight[2]": "v", "attention.out_proj": "out", "head": "head"}
    one = measure(kfac_fx.transform(packed, (x,)), x, None, Categorical()).preconditioner
    two = measure(kfac_fx.transform(unpacked, (x,)), x, None, Categorical()).preconditioner
    assert {"v": "out", "out": "head"}.items() <= two.curvature.parent.items()
    checked = 0
    for (child, parent), cross in one.cross_factors.items():
        if child in names and parent in names:
            want = two.cross_factors[names[child], names[parent]]
            torch.testing.assert_close(torch.kron(*cross), torch.kron(*want))
            checked += 1
    assert checked == 2


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.two(h if h.sum() > 0 else -h)


def test_the_eager_route_says_that_it_couples_nothing() -> None:
    curvature = kfac_fx.transform(Branching(), (torch.randn(4, 3),)).curvature
    assert curvature.route == "eager"
    assert curvature.couplings == () and set(curvature.uncoupled) == {"one", "two"}


def test_stripping_takes_links_out_too() -> None:
    net = kfac_fx.transform(Skip())
    plain = kfac_fx.transform(Skip(), structure="block_diagonal")
    for module in (net, plain):
        assert strip_taps(module.graph)
    assert str(net.graph) == str(plain.graph)


def test_compiles_to_one_graph_with_links(measure: Measure) -> None:
    net, x = kfac_fx.transform(Pooled(), structure="block_tridiagonal"), torch.randn(4, 1, 4, 4)
    pre = kfac_fx.Preconditioner(net, "categorical", fisher="empirical", damping=1e-2)
    compiled = torch.compile(net, fullgraph=True)
    y = torch.randint(3, (4,))
    found = []
    for module in (net, compiled):
        forget(pre)
        pre.observe(outputs := module(x), y)
        F.cross_entropy(outputs, y).backward()
        found.append(taken(pre))
    assert len(found[0]) == 11
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
