"""Training: the preconditioner of gradients, the whole optimizer, and their options."""

from kfac_fx.optim.growing_batches import GrowingBatches
from kfac_fx.optim.kfac import KFAC
from kfac_fx.optim.kfac_options import KFACOptions
from kfac_fx.optim.preconditioner import Preconditioner
from kfac_fx.optim.training_step import TrainingStep

__all__ = ["KFAC", "GrowingBatches", "KFACOptions", "Preconditioner", "TrainingStep"]
