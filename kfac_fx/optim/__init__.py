"""Statistics of the likelihood, and what is done with them."""

from kfac_fx.optim import likelihoods
from kfac_fx.optim.batches import GrowingBatches
from kfac_fx.optim.kfac import KFAC
from kfac_fx.optim.preconditioner import Preconditioner
from kfac_fx.optim.training_step import TrainingStep

__all__ = ["KFAC", "GrowingBatches", "Preconditioner", "TrainingStep", "likelihoods"]
