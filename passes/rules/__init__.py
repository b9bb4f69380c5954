"""One file a kind of parameter use; the order is the order in which they are asked."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from kfac_fx.capture.dialect import add_operation
from kfac_fx.passes.rules.base import Refusal, Rule, Site
from kfac_fx.passes.rules.bilinear import BilinearRule
from kfac_fx.passes.rules.convolution import ConvolutionRule
from kfac_fx.passes.rules.embedding import EmbeddingRule
from kfac_fx.passes.rules.embedding_bag import EmbeddingBagRule
from kfac_fx.passes.rules.generic import generic_use
from kfac_fx.passes.rules.grouped import GroupedRule
from kfac_fx.passes.rules.linear import LinearRule, dense_use
from kfac_fx.passes.rules.normalization import NormalizationRule
from kfac_fx.passes.rules.recurrent import RecurrentRule
from kfac_fx.passes.rules.transposed_convolution import TransposedConvolutionRule

RULES: list[Rule] = [
    LinearRule(),
    BilinearRule(),
    ConvolutionRule(),
    TransposedConvolutionRule(),
    EmbeddingRule(),
    EmbeddingBagRule(),
    GroupedRule(),
    NormalizationRule(),
    RecurrentRule(),
]


def register_rule(rule: Rule, operations: Mapping[Any, str] = MappingProxyType({})) -> None:
    """Adds a rule of one's own; it is asked before the others.

    Args:
        rule: an object with ``kind``, ``operations`` and ``match`` (see ``Rule``); ``match`` for a
            dense layer is usually one call of ``dense_use``.
        operations: targets that the vocabulary does not know (a function wrapped by
            ``torch.fx.wrap``, an operator, a method's name) and the operation that each stands for
            with the names of its arguments: ``{my_linear: "my_linear input weight"}``.
    """
    for target, words in operations.items():
        add_operation(target, words)
    RULES.insert(0, rule)


def rules_for(operation: str) -> Iterator[Rule]:
    """The rules that look at an operation, in the order in which they are asked."""
    return (rule for rule in RULES if operation in rule.operations)


__all__ = [
    "RULES",
    "Refusal",
    "Rule",
    "Site",
    "dense_use",
    "generic_use",
    "register_rule",
    "rules_for",
]
