"""nn.MultiheadAttention: q, k and v of a packed projection are blocks of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracles
from support.oracles import Categorical, Measure, close
from torch import Tensor, nn

import kfac_fx

pytestmark = pytest.mark.usefixtures("float64")
N, T, S, D = 3, 4, 5, 4


class Attends(nn.Module):
    """Attention to the same, to another, or to two other sequences."""

    def __init__(self, kind: str, batch_first: bool, bias: bool, **options: Any) -> None:
        super().__init__()
        self.kind, self.batch_first = kind, batch_first
        self.attention = nn.MultiheadAttention(D, 2, bias=bias, batch_first=batch_first, **options)
        if bias:
            nn.init.normal_(self.attention.in_proj_bias)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        key = x if self.kind == "self" else z
        value = torch.sin(key) if self.kind == "three" else key
        if not self.batch_first:
            x, key, value = (t.transpose(0, 1) for t in (x, key, value))
        if self.kind == "self":
            key = value = x
        elif self.kind == "cross":
            value = key
        y, _ = self.attention(x, key, value, need_weights=False)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(y.mean(1))


class Twin(nn.Module):
    """The same with three layers, of given attention."""

    def __init__(self, model: Attends) -> None:
        super().__init__()
        self.model, self.kind, a = [model], model.kind, model.attention
        weights = (
            a.in_proj_weight.chunk(3)
            if a.in_proj_weight is not None
            else (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
        )
        for index, name in enumerate("qkv"):
            weight = weights[index].detach().clone()
            layer = nn.Linear(weight.shape[1], D, bias=a.in_proj_bias is not None)
            layer.weight.data = weight
            if a.in_proj_bias is not None:
                layer.bias.data = a.in_proj_bias.detach().chunk(3)[index].clone()
            setattr(self, name, layer)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        key = x if self.kind == "self" else z
        value = torch.sin(key) if self.kind == "three" else key
        q, k, v = self.q(x), self.k(key), self.v(value)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.model[0].head(self.model[0].attention.out_proj(y).mean(1))


def blocks_of(net: nn.Module, name: str) -> list[Any]:
    return [b for b in net.curvature.blocks.values() if f"attention.{name}" in b.parameters]


@pytest.mark.parametrize(
    "capture, sharing, bias", [("export", "reduce", True), ("eager", "expand", False)]
)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("kind", ["self", "cross", "three"])
def test_packed(
    measure: Measure, kind: str, batch_first: bool, capture: str, sharing: str, bias: bool
) -> None:
    """Each third of in_proj_weight against a twin with three layers."""
    model, likelihood = Attends(kind, batch_first, bias), Categorical()
    inputs = (torch.randn(N, T, D), torch.randn(N, S, D))
    twin = Twin(model)
    close((model(*inputs),), (twin(*inputs),))
    net = kfac_fx.transform(model, inputs, weight_sharing=sharing, capture=capture, strict=True)
    blocks = blocks_of(net, "in_proj_weight")
    assert [b.name for b in blocks] == [f"attention.in_proj_weight[{i}]" for i in range(3)]
    factors = measure(net, inputs, None, likelihood).factors
    for block, name in zip(blocks, "qkv", strict=True):
        assert len(block.parameters) == 1 + bias
        want = oracles.kronecker(twin, [name], inputs, None, likelihood, "exact", sharing)
        close(factors[block.name], want)


def test_gradients_of_the_pieces(measure: Measure) -> None:
    """The packed gradient is preconditioned piece by piece, the bias with its weight."""
    model, likelihood = Attends("self", True, True), Categorical()
    inputs = (torch.randn(N, T, D), torch.randn(N, S, D))
    net = kfac_fx.transform(model, inputs, structure="block_diagonal")
    outputs = net(*inputs)
    y = likelihood.draw(outputs)
    names = ("attention.in_proj_weight", "attention.in_proj_bias")
    gradients = torch.autograd.grad(
        likelihood.nll(outputs, y), [model.get_parameter(n) for n in names]
    )
    measured = measure(net, inputs, y, likelihood)
    pieces = zip(gradients[0].chunk(3), gradients[1].chunk(3), strict=True)
    for index, (weight, bias) in enumerate(pieces):
        A, G = measured.factors[f"attention.in_proj_weight[{index}]"]
        want = oracles.solve_kronecker(A, G, torch.cat([weight, bias[:, None]], 1), 1e-2)
        found = [model.get_parameter(n).grad.chunk(3)[index] for n in names]
        close((torch.cat([found[0], found[1][:, None]], 1),), (want,))


@pytest.mark.parametrize("capture", ["export", "eager"])
def test_inputs_of_other_widths(measure: Measure, capture: str) -> None:
    """Three weights, and one bias in three pieces."""
    model, likelihood = Attends("cross", True, True, kdim=3, vdim=3), Categorical()
    inputs = (torch.randn(N, T, D), torch.randn(N, S, 3))
    twin = Twin(model)
    net = kfac_fx.transform(model, inputs, capture=capture, strict=True)
    factors = measure(net, inputs, None, likelihood).factors
    for name in "qkv":
        (block,) = blocks_of(net, f"{name}_proj_weight")
        close(factors[block.name], oracles.kronecker(twin, [name], inputs, None, likelihood))


class Both(nn.Module):
    """One module attends to its own sequence and then to another."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x, _ = self.attention(x, x, x, need_weights=False)
        x, _ = self.attention(x, z, z, need_weights=False)
        return self.head(x.mean(1))


def test_uses_that_pack_differently_are_the_same_three_blocks() -> None:
    net = kfac_fx.transform(Both(), (torch.randn(N, T, D), torch.randn(N, S, D)), strict=True)
    blocks = blocks_of(net, "in_proj_weight")
    assert [len(block.uses) for block in blocks] == [2, 2, 2]


def test_large_weights_are_cut_without_listing_their_entries() -> None:
    model = nn.TransformerEncoderLayer(1024, 8, 64, 0.0, batch_first=True)
    net = kfac_fx.transform(model, torch.randn(2, 3, 1024), check=False)
    sides = [block.dimensions for block in net.curvature.blocks.values()][:3]
    assert sides == [((1025, 1025), (1024, 1024))] * 3


def test_sequences_first_scale_both_factors_of_other_layers(measure: Measure) -> None:
    """A plain layer takes the first axis for the cases: A is N / T of its own, G is T / N of it.

    The product, and with it what is done to a gradient, is the same.
    """
    model, likelihood = nn.Linear(D, 3), Categorical()
    x = torch.randn(N, T, D)
    net = kfac_fx.transform(model)
    first = measure(net, x, None, likelihood).factors["weight"]
    other = measure(net, x.transpose(0, 1), None, likelihood).factors["weight"]
    close(other, (first[0] * N / T, first[1] * T / N))
