"""What an update is made from, and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfac_fx.optim.objective import Batch
    from kfac_fx.optim.products import Direction, Parameters
    from kfac_fx.optim.rows_model import RowsModel


@dataclass(frozen=True)
class Situation:
    """The gradient, and the state of the run, from which an update is made.

    Attributes:
        iteration: the number of the iteration, from 1.
        batch: the inputs and targets of the iteration.
        parameters: the parameters by name, where the update starts.
        gradient: the gradient of the objective with its l2 term.
        previous: the last update, empty at first; the new one may be written into it.
        rates: learning rate of each parameter's group; only where the user gave one.
        decays: eta, the weight decay of each parameter's group.
        momenta: momentum of each parameter's group; only where the user gave a learning rate.
        again: whether another update of the same batch was no good, and the damping has grown.
        models: that of the batch's rows, once a try has made it, for all tries of one batch. It
            goes with the batch, as it may be large.
    """

    iteration: int
    batch: Batch
    parameters: Parameters
    gradient: Direction
    previous: Direction
    rates: Mapping[str, float]
    momenta: Mapping[str, float]
    decays: Mapping[str, float]
    again: bool = False
    models: list[RowsModel] = field(default_factory=list)


@dataclass(frozen=True)
class Update:
    """The change that an iteration is going to make, and what was decided on the way.

    Attributes:
        step: added to the parameters.
        numbers: for the diagnostics.
        judged: whether the change of the objective is to be compared with ``predicted`` after the
            step, for lambda to follow the reduction ratio.
        predicted: the model's change of the objective, not positive; 0 where there is no model.
    """

    step: Direction
    numbers: dict[str, float]
    judged: bool = False
    predicted: float = 0.0
