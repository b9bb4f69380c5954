"""Forward, loss, gradients and statistics of a batch in one graph."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from kfac_fx.errors import LikelihoodError, UnknownOptionError
from kfac_fx.likelihoods.builtin import Tree
from kfac_fx.likelihoods.sampling import forked
from kfac_fx.optim.preconditioner import Preconditioner
from kfac_fx.statistics.own_pass import LIKELIHOOD, Loss, Result
from kfac_fx.statistics.pass_cache import CompiledPass

log = logging.getLogger("kfac_fx")


class TrainingStep:
    """Runs forward, ``observe`` and ``loss.backward()`` as one function of a batch.

    With ``Preconditioner(..., compile=True)`` it is one compiled graph where statistics are due,
    another where they are not, for each form of a batch (at most 8). Uncompiled, the passes of a
    small network run as traces of their operators, unless there is a ``loss``. A step of training:
    ``loss = step(inputs, targets)``, ``preconditioner.step()``, then the optimizer's own step.

    fisher="empirical" takes no backward of its own, unless the loss turns out to be another than a
    multiple of the negative log-likelihood, which the statistics are of, or float16 is in use.

    Args:
        preconditioner: gets the statistics; ``observe`` is not called any more.
        loss: a function from the network's outputs and the targets to a scalar; what else it reads
            is taken for constant. None for the mean negative log-likelihood of a term.

    Raises:
        UnknownOptionError: the preconditioner has several workers.
    """

    def __init__(self, preconditioner: Preconditioner, loss: Loss | None = None) -> None:
        if preconditioner.recorder.own.workers.size > 1:
            raise UnknownOptionError("a TrainingStep is for one process")
        self._preconditioner = preconditioner
        self._recorder = preconditioner.recorder
        self._loss = loss
        self._compile = self._recorder.compile
        own = replace(self._recorder.only_own_passes(), loss=LIKELIHOOD if loss is None else loss)
        # A loss of the user's may read what is no tensor, so only the likelihood's is traced where
        # nothing is compiled.
        replays = self._recorder.replays if loss is None else None
        self._plain = CompiledPass(replace(own, statistics=False), self._compile, replays)
        self._recording = CompiledPass(own, self._compile, replays)
        self._parameters = dict(own.net.named_parameters())
        self._buffers = dict(own.net.named_buffers())

    def __call__(self, inputs: Tree, targets: Tree = None) -> Tensor:
        """Return the loss; its gradients are added to ``.grad``, buffers change as in a forward.

        Args:
            inputs: what the network is called with: a tensor, a tuple of positional arguments or a
                mapping of keywords; under the forward's autocast.
            targets: for the loss and the likelihood.

        Raises:
            LikelihoodError: outputs or targets do not fit the likelihood, or targets are missing.
            ObservationError: the empirical Fisher needs targets.
        """
        if targets is None and self._loss is None:
            raise LikelihoodError("the negative log-likelihood needs targets")
        self._recorder.take_turn()
        if self._preconditioner.due:
            found = self._recorded(inputs, targets)
            if not self._recorder.add(found.collected):
                self._preconditioner.skip_statistics("outputs")
        else:
            found = self._plain(inputs, targets, 0)
        # The pass is a function: what a module does to itself in a forward is done here.
        with torch.no_grad():
            for name, value in found.buffers.items():
                self._buffers[name].copy_(value)
            for name, gradient in found.gradients.items():
                parameter = self._parameters[name]
                if parameter.grad is None:
                    parameter.grad = gradient.clone()  # it may share its memory with another
                else:
                    parameter.grad.add_(gradient)
        assert found.loss is not None
        return found.loss

    def _recorded(self, inputs: Tree, targets: Tree) -> Result:
        """Return a pass with statistics of the likelihood, whatever the loss turns out to be."""
        found = self._recording(inputs, targets, self._recorder.seed())
        if not found.collected.finite or found.collected.scale is not None:
            return found
        # The statistics are of a loss with other parts, or of rounding errors near a perfect fit:
        # they are taken again, from the likelihood. Masks are drawn again, but not from torch's
        # stream, which goes on as if there had been one forward.
        with forked(self._parameters.values()):
            own = self._recorder.own.run(inputs, targets, self._recorder.seed())
        if found.loss is not None and bool(found.loss.isfinite()):
            # For good: a loss that is another one in one step is so in all.
            log.info("statistics take a backward of their own: the loss has other parts")
            self._recording = CompiledPass(replace(self._recording.own, joint=False), self._compile)
        return replace(found, collected=own.collected)
