"""One file a kind of parameter use; the order is the order in which they are asked."""

from kfac_fx.passes.rules.base import Refusal, Rule, Site
from kfac_fx.passes.rules.convolution import ConvolutionRule
from kfac_fx.passes.rules.generic import generic_use
from kfac_fx.passes.rules.linear import LinearRule
from kfac_fx.passes.rules.normalization import NormalizationRule

RULES: tuple[Rule, ...] = (LinearRule(), ConvolutionRule(), NormalizationRule())

__all__ = ["RULES", "Refusal", "Rule", "Site", "generic_use"]
