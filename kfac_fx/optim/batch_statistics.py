"""Record the statistics of a batch of ``KFAC``, and fold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kfac_fx.curvature.estimate import terms_needed
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.errors import StatisticsError
from kfac_fx.optim.batch_trust import BatchTrust
from kfac_fx.optim.diagnostics import Diagnostics
from kfac_fx.optim.objective import Batch, Objective
from kfac_fx.statistics.recorder import Recorder

if TYPE_CHECKING:
    from kfac_fx.optim.updates import Form


@dataclass(frozen=True)
class BatchStatistics:
    """Records batches where that is due, of as many of their cases as averages need.

    Attributes:
        recorder, inverse, objective, trust: the optimizer's.
    """

    recorder: Recorder
    inverse: InverseFisher
    objective: Objective
    trust: BatchTrust

    def record(self, batch: Batch, iteration: int, form: Form, diagnostics: Diagnostics) -> bool:
        """Record where that is due; return False if the statistics are no good.

        Args:
            batch: the batch of the iteration.
            iteration: its number, from 1.
            form: says how often and how much is recorded.
            diagnostics: those of the iteration.

        Raises:
            StatisticsError: the first batch brought none at all.
        """
        recorded = self.inverse.estimate.recorded
        if recorded and not form.records(iteration, batch):
            return True
        # tau1 of a small batch is a few cases, whose averages have no inverse to speak of.
        terms = terms_needed(recorded, form.ema_decay)
        least = math.ceil(terms * self.objective.cases / self.objective.terms)
        with diagnostics.stage("statistics"):
            share = form.statistics_fraction
            finite = self.objective.of_first(batch, share, least, self._observe)
            found = self.recorder.take()
        self.recorder.switch(False)
        # A batch with few cases moves the averages as little as its step moves the parameters.
        decay = form.ema_decay ** self.trust.share(self.objective.cases)
        widest = self.trust.widest(form.compares_batches)
        taken = finite and self.inverse.fold(found, decay, widest, follows=form.follows)
        self.trust.fitted(taken)
        # Without any, no step would ever be made, and the losses of a loop that stands still look
        # like those of a hard problem.
        if finite and iteration == 1 and not self.inverse.estimate.recorded:
            raise StatisticsError(
                "no statistics came for any parameter, so that no step can be made. The forward "
                "must read its parameters from the modules that registered them, as the pass runs "
                "with copies in these places (lists and dictionaries will do, tuples will not); "
                "and the outputs must depend on them"
            )
        return taken

    def _observe(self, part: Batch) -> bool:
        """Record the statistics of some cases; return False if they are not finite."""
        if self.recorder.by_inputs:
            with self.objective.same_masks():
                return self.recorder.observe_inputs(part.inputs, part.targets)
        # Sharded parameters, which a pass of the recorder's own does not see whole.
        self.recorder.switch(True)
        with torch.enable_grad(), self.objective.aside():
            outputs = self.objective.outputs(part.inputs)
            return self.recorder.observe(outputs, part.targets)
