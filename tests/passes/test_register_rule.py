"""A rule of the user's own, for a function that the vocabulary does not know."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_fx
from kfac_fx.capture import Call, dialect
from kfac_fx.passes import rules
from kfac_fx.passes.rules import Site, dense_use
from kfac_fx.passes.rules.base import Answer


@torch.fx.wrap
def my_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


class MyLinearRule:
    kind = "my_linear"
    operations = frozenset({"my_linear"})

    def match(self, call: Call, site: Site) -> Answer:
        weight = site.parameter(call.get("weight"))
        if weight is None:
            return None
        x = call.get("input")
        return dense_use(call, site, x, weight, weight.layout, dims=((-1,), (-1,)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return my_linear(x, self.weight)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = list(rules.RULES)
    yield
    rules.RULES[:] = before
    dialect.FUNCTIONS.pop(my_linear, None)


def test_an_unknown_function_is_generic_and_says_so() -> None:
    (block,) = kfac_fx.transform(Model()).curvature.blocks.values()
    assert block.kind == "generic"
    assert block.reason is not None and "my_linear: no rule" in block.reason


def test_example_inputs_lead_into_it() -> None:
    net = kfac_fx.transform(Model(), (torch.randn(2, 4),))
    assert net.curvature.route == "export"
    assert net.curvature.blocks["weight"].approximation == "kronecker"


def test_a_registered_rule_takes_it() -> None:
    kfac_fx.register_rule(MyLinearRule(), {my_linear: "my_linear input weight"})
    model, x = Model(), torch.randn(5, 4)
    net = kfac_fx.transform(model)
    (block,) = net.curvature.blocks.values()
    assert block.approximation == "kronecker" and block.reason is None
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact")
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    torch.testing.assert_close(preconditioner.factors["weight"][0], x.T @ x / 5)
