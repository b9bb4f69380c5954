"""From the outputs of a recorded forward pass to statistics in the scale of one likelihood term."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kfac_fx.errors import ObservationError
from kfac_fx.likelihoods.batch import output_tensors, predictive, wide
from kfac_fx.likelihoods.builtin import Likelihood, Sum
from kfac_fx.linalg.precision import all_finite
from kfac_fx.ops import (
    Note,
    Rows,
    Statistic,
    forget_passes,
    multiplied,
    noted_statistics,
    only,
    passes,
)
from kfac_fx.parallel import Values, Workers
from kfac_fx.statistics.backward_passes import Backwards
from kfac_fx.statistics.buffers import Gradients, Sources, Statistics, by_calls
from kfac_fx.statistics.loss_scale import LossScale
from kfac_fx.statistics.user_graph import AFTER_BACKWARD

log = logging.getLogger("kfac_fx")


Found = list[Tensor | None]


def _derivatives(scalar: Tensor, places: Any, last: bool = False) -> Sequence[Tensor | None]:
    """At tensors and edges of the graph, by one more backward, the last one or not."""
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            scalar, places, retain_graph=not last, allow_unused=True
        )
        return found
    except RuntimeError as error:
        text = str(error)
        if "second time" in text:
            raise ObservationError(AFTER_BACKWARD) from error
        if "donated" in text or "retain_graph" in text:
            raise ObservationError(
                "a compiled forward keeps no graph for a second backward: give the inputs, "
                "observe(outputs, inputs=...), use fisher='empirical', or set "
                "torch._functorch.config.donated_buffer = False before compiling"
            ) from error
        if "use_reentrant" in text:
            raise ObservationError(
                "a reentrant activation checkpoint allows no backward but the training's: use "
                "checkpoint(..., use_reentrant=False) or fisher='empirical'"
            ) from error
        raise


def _backward(scalar: Tensor, wanted: Sequence[Tensor]) -> Gradients:
    return _by_id(wanted, _derivatives(scalar, wanted))


def _by_id(tensors: Sequence[Tensor], found: Sequence[Tensor | None]) -> Gradients:
    return {id(t): g for t, g in zip(tensors, found, strict=True) if g is not None}


def _add(total: Statistics, more: Mapping[int, Statistic], weight: float = 1.0) -> None:
    for key, value in more.items():
        value = value if weight == 1.0 else value * weight
        total[key] = multiplied(total[key]) + multiplied(value) if key in total else value


def _scale(values: Statistics, keys: Sequence[int], factor: float) -> None:
    """Tensors in place."""
    if factor == 1.0:
        return
    tensors = []
    for key in keys:
        value = values[key]
        if isinstance(value, Rows):
            values[key] = value * factor
        else:
            tensors.append(value)
    if tensors:
        torch._foreach_mul_(tensors, factor)


class Counted(Protocol):
    """``count`` is the number of likelihood terms, ``total`` that of all processes."""

    @property
    def count(self) -> float: ...
    @property
    def total(self) -> float: ...


class StepStatistics:
    """Statistics of one step, from one or several micro-batches and processes.

    Each weighs by its number of likelihood terms, as if they had been one batch.
    """

    def __init__(self, sources: Sources, workers: Workers) -> None:
        self._workers, self._places = workers, sources.places
        self._inputs = {id(factor) for factor in sources.inputs}
        self._sums: list[tuple[Callable[[], Values], float]] = []
        self._count = 0.0

    def add(self, found: Statistics, observation: Counted, scale: float = 1.0) -> None:
        """Adds what a backward returned, and takes it over; the sum over the processes starts.

        Args:
            scale: of the loss, relative to the summed negative log-likelihood.
        """
        others = [key for key in found if key not in self._inputs]
        _scale(found, others, 1 / (scale**2 * observation.total))
        inputs = [key for key in found if key in self._inputs]
        _scale(found, inputs, observation.count / observation.total)
        values = [found.get(id(place.like)) for place in self._places]
        self._sums.append((self._workers.start_sum(self._places, values), observation.total))
        self._count += observation.total

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not self._sums

    def mean(self) -> Statistics:
        """The statistics in the scale of one likelihood term; waits for the sums."""
        mean: Statistics = {}
        for finished, count in self._sums:
            keys = (id(place.like) for place in self._places)
            found = {k: v for k, v in zip(keys, finished(), strict=True) if v is not None}
            _add(mean, found, count / self._count)
        return mean


class Observation:
    """One pass: sampled and exact statistics at once, empirical ones from the user's backward.

    Args:
        notes: taps of the pass that are noted; not for exact statistics, of several backwards.

    Attributes:
        made: the likelihood's distributions, of all processes once they agree.
        behind: how many taps of each factor are behind the outputs; None to leave that unasked.
        count: number of likelihood terms, or the sum of their weights, to divide G by.
        total: the same of all processes.
        gradients: what the training backward brought to the parameters without a tap. Their
            ``.grad`` also holds other micro-batches, and may be clipped or unscaled by then.
    """

    def __init__(
        self,
        likelihood: Likelihood | Sum,
        outputs: Any,
        targets: Any,
        sources: Sources,
        notes: Sequence[Note] = (),
    ) -> None:
        self.sources, self._notes = sources, notes
        self.made = predictive(likelihood, wide(outputs), targets)
        self.count = self.total = self.made.count
        self._likelihood, self._outputs, self._targets = likelihood, outputs, targets
        self._handles: list[RemovableHandle] = []
        self._expected: LossScale | None = None
        self._backwards: Backwards | None = None
        self.behind: Counter[int] | None = None
        self.gradients: Gradients = {}

    def agree(self, workers: Workers) -> bool:
        """Whether the outputs of all processes are finite.

        Raises:
            LikelihoodError: no process has a likelihood term.
        """
        tensors = [tensor.detach() for tensor in output_tensors(self._outputs)]
        finite, self.made = self.made.of_all(workers, "observe", all_finite(tensors))
        self.total = self.made.count
        return finite

    def record(self, fisher: str, seed: int) -> Statistics:
        """The statistics, by backward passes of this observation's own."""
        if self.count <= 0:  # the other processes have terms
            return {}
        forget_passes(self.sources.inputs)
        if fisher == "exact":
            found = self.exact(seed)
        else:
            found, _ = self._of(self._draw(seed) if fisher == "sampled" else self.made.nll())
        return by_calls(self.sources, found)

    def record_with(self, loss: Tensor, wanted: Sequence[Tensor]) -> tuple[Statistics, Found]:
        """Empirical statistics, in the scale of the loss, and its gradients by one backward."""
        forget_passes(self.sources.inputs)
        found, gradients = self._of(loss, wanted)
        return by_calls(self.sources, found), gradients

    def _of(self, scalar: Tensor, wanted: Sequence[Tensor] = ()) -> tuple[Statistics, Found]:
        """The statistics, and the derivatives that are wanted beside them."""
        factors, parameters = self.sources.factors, self.sources.parameters
        edges = [note.edge for note in self._notes]
        places = [*factors, *parameters, *edges, *wanted]
        found = iter(_derivatives(scalar, places, last=bool(wanted)))
        total: Statistics = dict(_by_id(factors, list(islice(found, len(factors)))))
        gradients = _by_id(parameters, list(islice(found, len(parameters))))
        total |= {key: squared(g) for key, g in gradients.items()}
        _add(total, noted_statistics(self._notes, list(islice(found, len(edges)))))
        return total, list(found)

    def exact(self, seed: int) -> Statistics:
        """All columns of the output Fisher's square root; what has no tap is sampled."""
        total: Statistics = {}
        scalars = list(self.made.exact()) if self.sources.factors else []
        asked = [(scalar, self.sources.gradients) for scalar in scalars]
        if scalars:  # inputs do not depend on the derivative, but every use must be reached
            asked.append((torch.stack(scalars).sum(), self.sources.inputs))
        for scalar, wanted in asked:
            with only(self.sources.factors, wanted):
                _add(total, _backward(scalar, wanted) if wanted else {})
        if self.sources.parameters:
            gradients = _backward(self._draw(seed), self.sources.parameters)
            _add(total, {key: squared(g) for key, g in gradients.items()})
        return total

    def _draw(self, seed: int) -> Tensor:
        return self.made.sampled(seed)

    def watch(self) -> None:
        """Notes the training backward when it comes."""
        leaves = [*self.sources.gradients, *self.sources.parameters] if self.expects else []
        self._backwards = Backwards(output_tensors(self._outputs), leaves)
        for parameter in self.sources.parameters if self.expects else ():
            self._handles += _watch_parameter(parameter, self.gradients)

    @property
    def passed(self) -> bool:
        """Whether the training backward has come."""
        return self._backwards is not None and self._backwards.passed

    def expect(self) -> None:
        """Prepares for statistics from the training backward."""
        self._expected = LossScale(self._likelihood, self._outputs, self._targets, self.count)

    @property
    def expects(self) -> bool:
        """Whether the statistics come from the training backward."""
        return self._expected is not None

    def close(self) -> None:
        """Stops watching."""
        if self._backwards is not None:
            self._backwards.close()
        for handle in self._handles:
            handle.remove()

    @property
    def strays(self) -> bool:
        """Whether taps delivered more often than there are taps behind the outputs."""
        if self.behind is None or self._backwards is None or self._backwards.nested:
            return False
        return any(passes(f) > self.behind[id(f)] > 0 for f in self.sources.factors)

    def loss_scale(self) -> float:
        """The factor between the loss and the summed negative log-likelihood of the targets.

        Raises:
            ObservationError: no backward has come to the outputs, or several with statistics have.
        """
        assert self._expected is not None and self._backwards is not None
        seen = self._backwards.recorded()
        if None in seen.values():
            raise ObservationError(
                "loss.backward() brought no derivative to the outputs: where the loss is compiled "
                "into one graph with the network, use kfac_fx.TrainingStep, or compile the network "
                "alone"
            )
        return self._expected(seen)


def squared(gradient: Tensor) -> Tensor:
    """|gradient|^2, dense and in float32 at least."""
    gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return gradient.abs().square() if gradient.is_complex() else gradient.square()


def _watch_parameter(parameter: Tensor, total: Gradients) -> list[RemovableHandle]:
    """Adds up what backward() brings to a parameter; autograd.grad() brings nothing."""
    arrived: list[Tensor] = []

    def arrive(gradient: Tensor) -> None:
        arrived[:] = [gradient.detach()]

    def accumulate(_: Tensor) -> None:
        key, more = id(parameter), arrived.pop()
        total[key] = total[key] + more if key in total else more.clone()

    return [
        parameter.register_hook(arrive),
        parameter.register_post_accumulate_grad_hook(accumulate),
    ]
