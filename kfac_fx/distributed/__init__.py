"""Several processes on torch.distributed: shared batches and refreshes, checkpoints, forecasts."""

from kfac_fx.distributed.checkpoint import Checkpoints
from kfac_fx.distributed.costs import measured_costs
from kfac_fx.distributed.simulator import Compute, Network, Plan, Prediction, simulate
from kfac_fx.distributed.workers import DataParallel

__all__ = [
    "Checkpoints",
    "Compute",
    "DataParallel",
    "Network",
    "Plan",
    "Prediction",
    "measured_costs",
    "simulate",
]
