"""Several processes on torch.distributed: shared batches, shared refreshes."""

from kfac_fx.distributed.checkpoint import Checkpoints
from kfac_fx.distributed.workers import DataParallel

__all__ = ["Checkpoints", "DataParallel"]
