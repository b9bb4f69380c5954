"""Predictive distributions: what the outputs of a network say about the targets."""

import kfac_fx.likelihoods.roots  # noqa: F401  (adds to ROOTS what callables may return)
from kfac_fx.likelihoods.builtin import Bernoulli, Categorical, Likelihood, Normal
from kfac_fx.likelihoods.named import Custom, Sum

__all__ = ["Bernoulli", "Categorical", "Custom", "Likelihood", "Normal", "Sum"]
