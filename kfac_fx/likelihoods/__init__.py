"""Predictive distributions: what the outputs of a network say about the targets."""

from kfac_fx.likelihoods.builtin import Bernoulli, Categorical, Likelihood, Normal
from kfac_fx.likelihoods.named import Custom, Sum

__all__ = ["Bernoulli", "Categorical", "Custom", "Likelihood", "Normal", "Sum"]
