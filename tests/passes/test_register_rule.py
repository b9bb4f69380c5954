"""A rule of the user's own, for a function that the vocabulary does not know."""

from __future__ import annotations

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


def test_an_unknown_function_is_generic_and_says_so() -> None:
    (block,) = kfac_fx.transform(Model()).curvature.blocks.values()
    assert block.kind == "generic"
    assert block.reason is not None and "my_linear: no rule" in block.reason


def test_example_inputs_lead_into_it() -> None:
    net = kfac_fx.transform(Model(), (torch.randn(2, 4),))
    assert net.curvature.route == "export"
    assert net.curvature.blocks["weight"].approximation == "kronecker"


WEAK = ["diagonal"]
WORDS = {my_linear: "my_linear input weight"}


def kinds(net: nn.Module) -> list[str]:
    return [block.approximation for block in net.curvature.blocks.values()]


def test_a_registered_rule_takes_it() -> None:
    model, x = Model(), torch.randn(5, 4)
    with kfac_fx.register_rule(MyLinearRule(), WORDS):
        net = kfac_fx.transform(model)
    (block,) = net.curvature.blocks.values()
    assert block.approximation == "kronecker" and block.reason is None
    preconditioner = kfac_fx.Preconditioner(net, "normal", fisher="exact")
    outputs = net(x)
    preconditioner.observe(outputs)
    outputs.sum().backward()
    preconditioner.step()
    torch.testing.assert_close(preconditioner.factors["weight"][0], x.T @ x / 5)


def test_a_registration_is_undone() -> None:
    before = rules.default_rules()
    registered = kfac_fx.register_rule(MyLinearRule(), WORDS)
    assert kinds(kfac_fx.transform(Model())) == ["kronecker"]
    registered.remove()
    registered.remove()
    assert rules.default_rules() == before and my_linear not in dialect.FUNCTIONS
    assert kinds(kfac_fx.transform(Model())) == WEAK


def test_words_that_were_there_come_back() -> None:
    before = dialect.FUNCTIONS[F.linear]
    with kfac_fx.register_rule(MyLinearRule(), {F.linear: "my_linear input weight"}):
        assert dialect.FUNCTIONS[F.linear] != before
    assert dialect.FUNCTIONS[F.linear] == before


def test_rules_are_an_argument() -> None:
    """The words of a function are the vocabulary's; which rule takes it is each transform's."""
    with rules.register_rule(MyLinearRule(), WORDS):
        own = rules.default_rules()
        assert kinds(kfac_fx.transform(Model(), rules=rules.Rules(tuple(rules.BUILT_IN)))) == WEAK
    before = dialect.add_operation(my_linear, WORDS[my_linear])
    assert kinds(kfac_fx.transform(Model())) == WEAK
    assert kinds(kfac_fx.transform(Model(), rules=own)) == ["kronecker"]
    running = kfac_fx.transform(Model(), torch.randn(2, 4), capture="eager", rules=own)
    assert kinds(running) == ["kronecker"]
    dialect.remove_operation(my_linear, before)


def test_the_last_registration_is_asked_first() -> None:
    one, two = MyLinearRule(), MyLinearRule()
    with rules.register_rule(one), rules.register_rule(two):
        first, second, *_ = rules.default_rules().asked("my_linear")
        assert first is two and second is one
    assert not list(rules.default_rules().asked("my_linear"))
    assert list(rules.default_rules().before(one).asked("my_linear")) == [one]
