"""One file a kind of parameter use; the order is the order in which they are asked."""

from collections.abc import Iterator

from kfac_fx.passes.rules.base import Refusal, Rule, Site
from kfac_fx.passes.rules.bilinear import BilinearRule
from kfac_fx.passes.rules.convolution import ConvolutionRule
from kfac_fx.passes.rules.embedding import EmbeddingRule
from kfac_fx.passes.rules.generic import generic_use
from kfac_fx.passes.rules.grouped import GroupedRule
from kfac_fx.passes.rules.linear import LinearRule
from kfac_fx.passes.rules.normalization import NormalizationRule
from kfac_fx.passes.rules.recurrent import RecurrentRule
from kfac_fx.passes.rules.transposed_convolution import TransposedConvolutionRule

RULES: list[Rule] = [
    LinearRule(),
    BilinearRule(),
    ConvolutionRule(),
    TransposedConvolutionRule(),
    EmbeddingRule(),
    GroupedRule(),
    NormalizationRule(),
    RecurrentRule(),
]


def rules_for(operation: str) -> Iterator[Rule]:
    """The rules that look at an operation, in the order in which they are asked."""
    return (rule for rule in RULES if operation in rule.operations)


__all__ = ["RULES", "Refusal", "Rule", "Site", "generic_use", "rules_for"]
