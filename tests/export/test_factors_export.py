"""Factors of nets captured with example inputs: the same oracles, other routes."""

from __future__ import annotations

import copy

import pytest
import torch
from support import oracles
from support.networks import BY_NAME
from support.oracles import LIKELIHOODS, Bernoulli, Categorical, Likelihood, Measure, Normal, close
from torch import Tensor, nn

import kfac_fx
from kfac_fx.capture.symbolic_trace import opaque_calls

pytestmark = pytest.mark.usefixtures("float64")
both_fishers = pytest.mark.parametrize("fisher", ["exact", "empirical"])


def captured(name: str) -> tuple[nn.Module, nn.Module]:
    network = BY_NAME[name]
    model = network.build()
    return copy.deepcopy(model), kfac_fx.transform(model, **network.captured_with())


@both_fishers
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda one: one.name)
def test_unrolled_loop(measure: Measure, likelihood: Likelihood, fisher: str) -> None:
    """A layer that a loop over the tokens uses three times, with three tokens each."""
    model, net = captured("shape_loop")
    (x,) = BY_NAME["shape_loop"].inputs(5)
    y = likelihood.draw(model(x))
    factors = measure(net, x, y, likelihood, fisher).factors
    assert set(factors) == {"fc", "out"}
    for name in ("fc", "out"):
        close(factors[name], oracles.kronecker(model, [name], x, y, likelihood, fisher))


@both_fishers
def test_encoder(measure: Measure, fisher: str) -> None:
    """Every part of a transformer's encoder layer that a module of its own computes."""
    model, net = captured("encoder")
    (x,) = BY_NAME["encoder"].inputs(2)
    likelihood = Categorical()
    y = likelihood.draw(model(x))
    factors = measure(net, x, y, likelihood, fisher).factors
    for name in ("layer.linear1", "layer.linear2", "head"):
        close(factors[name], oracles.kronecker(model, [name], x, y, likelihood, fisher))
    for name in ("layer.norm1", "layer.norm2"):
        names = [f"{name}.weight", f"{name}.bias"]
        want = oracles.covariance(model, names, x, y, likelihood, fisher)
        close(factors[name], (want,))
    close(factors["pos"], (oracles.covariance(model, ["pos"], x, y, likelihood, fisher),))


def test_encoder_covers_packed_attention() -> None:
    _, net = captured("encoder")
    by_parameter = {n: b for b in net.curvature.blocks.values() for n in b.parameters}
    attention = "layer.self_attn."
    packed = by_parameter[f"{attention}in_proj_weight"]
    assert packed is by_parameter[f"{attention}in_proj_bias"]
    assert packed.approximation == "kronecker" and packed.name.endswith("in_proj_weight[2]")
    assert by_parameter[f"{attention}out_proj.weight"].approximation == "kronecker"
    assert set(by_parameter) == {name for name, _ in net.named_parameters()}


@both_fishers
def test_batch_norm(measure: Measure, fisher: str) -> None:
    model, net = captured("shape_norm")
    (x,) = BY_NAME["shape_norm"].inputs(6)
    likelihood = Normal()
    y = likelihood.draw(model(x))
    factors = measure(net, x, y, likelihood, fisher).factors
    want = oracles.batch_norm_covariance(model, "norm", x, y, likelihood, fisher)
    close(factors["norm"], (want,))


@pytest.mark.parametrize("name", ["mlp", "conv1d", "conv2d", "conv3d", "group_norm", "hf_conv1d"])
def test_both_routes_agree(measure: Measure, name: str) -> None:
    """The same model traced symbolically, and after a check that only export can follow."""
    network = BY_NAME[name]
    model = network.build()
    (x,) = network.inputs(5)
    net = kfac_fx.transform(model)
    wrapped = Checked(model)
    exported = kfac_fx.transform(wrapped, network.inputs(4))
    want = measure(net, x, None, Bernoulli()).factors
    found = measure(exported, x, None, Bernoulli()).factors
    assert set(found) == {f"model.{block}" for block in want}
    for block, factors in want.items():
        close(found[f"model.{block}"], factors)


class Checked(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] < 2:
            raise ValueError("too small")
        return self.model(x)


class Positions(nn.Embedding):
    """Positions that never train, as several translation models have them."""

    @torch.no_grad()
    def forward(self, count: int) -> Tensor:
        return super().forward(torch.arange(count))


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = Positions(10, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.positions(x.shape[1]))


def test_a_parameter_in_a_region_without_gradients_has_no_use() -> None:
    """An export runs the region as a graph of its own; no derivative comes to what it reads."""
    model, x = Positioned(), torch.randn(2, 5, 4)
    net = kfac_fx.transform(model, x, capture="export")
    assert [block.name for block in net.curvature.blocks.values()] == ["head"]
    assert net.curvature.unused == ("positions.weight",)
    assert opaque_calls(model, net.graph) == []
