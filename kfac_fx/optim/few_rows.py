"""Steps with the exact Fisher of a batch whose rows are few."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kfac_fx.optim.case_rows import NoRowsError
from kfac_fx.optim.held_out import HeldOutRule
from kfac_fx.optim.rows_model import RowsModel
from kfac_fx.optim.situation import Situation, Update

if TYPE_CHECKING:
    from kfac_fx.optim.objective import Objective

log = logging.getLogger("kfac_fx")


class FewRows:
    """Makes steps of whole batches whose rows are few, as long as all batches are of that kind.

    Args:
        objective: runs the network.
        rule: has lambda, and whether all batches have been of that kind.
        most: so many rows are few.
    """

    def __init__(self, objective: Objective, rule: HeldOutRule, most: int) -> None:
        self._objective = objective
        self._rule = rule
        self._most = most
        rule.exact = most > 0 and objective.has_rows

    @property
    def serve(self) -> bool:
        """Say whether steps are made here."""
        return self._rule.exact

    def make(self, at: Situation) -> Update | None:
        """Return the update; None where the batch is of another kind, and from there on."""
        if not at.models:
            try:
                at.models.append(self._model_at(at))
            except NoRowsError as error:
                log.debug("iteration %d: steps are of blocks: %s", at.iteration, error)
                self._rule.exact = False
                return None
            self._rule.scaled(at.models[0].mean_eigenvalue)
        # What led to a step that was no good is not gone on with.
        previous = {} if at.again else at.previous
        model = at.models[0]
        step, change = model.minimum(self._rule.damping, previous)
        made = {name: value.to(at.parameters[name].dtype) for name, value in step.items()}
        numbers = {"model": change, "rows": float(model.rows)}
        return Update(made, numbers, judged=True, predicted=change)

    def _model_at(self, at: Situation) -> RowsModel:
        # A state that was saved with them may go on where there are none: in several processes.
        if not self._objective.has_rows:
            raise NoRowsError("the network is compiled, or shared")
        decays, parameters = at.decays, at.parameters
        # Of the loss alone, without its l2 term.
        gradient = {n: g.sub(parameters[n], alpha=decays[n]) for n, g in at.gradient.items()}
        rows = self._objective.rows(at.batch, parameters, gradient, self._most)
        self._rule.plain = rows.plain
        model = RowsModel(rows, gradient, parameters, decays)
        if not model.mean_eigenvalue > 0:  # it is lambda's measure
            raise NoRowsError("no output depends on a parameter")
        return model
