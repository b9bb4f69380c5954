"""Decide at every call whether a captured graph still stands for its model.

What the graph was specialised to is compared in one pass. A change that makes another graph hands
the call to the model itself, which is right by definition; it is recorded as it runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import fx, nn

from kfac_fx.capture.changes import Change
from kfac_fx.capture.input_forms import InputForm
from kfac_fx.capture.model_state import ModelState
from kfac_fx.capture.train_and_eval import all_in_mode
from kfac_fx.errors import CaptureError, KFACError
from kfac_fx.torch_internals.jvp_levels import innermost_jvp
from kfac_fx.torch_internals.linear_below_jvp import LinearBelowJvp
from kfac_fx.torch_internals.pytree import tree_leaves

log = logging.getLogger("kfac_fx")

Value = Any
"""An input or output of the user's model."""

_TRIALS = 16
"""Changes that are looked at closely. A model that changes in every step is run as it is: to trace
it each time would take longer than the step."""


UNTRACED = "it is in evaluation, of which there is no graph"
"""What has changed for a model that has a graph of the training alone."""


class GuardedNet(Protocol):
    """A captured module, as its guard sees it; ``kfac_fx.capture.captured_module`` has it."""

    training: bool

    def members_hold(self) -> bool:
        """Tell whether its children are those of the capture."""

    def follow_source(self) -> None:
        """Take over what was changed on the model."""

    def _get_name(self) -> str:
        """Return the name of the model's class."""


class StandIn(Protocol):
    """Runs the model in the place of its graph."""

    def run(self, net: Any, args: tuple[Value, ...], kwargs: dict[str, Value], why: str) -> Value:
        """Return the model's outputs; the taps of ``net`` record where they can."""

    def run_unrecorded(self, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """Return the model's outputs."""

    def fail_as_model(
        self, args: tuple[Value, ...], kwargs: dict[str, Value], error: Exception
    ) -> None:
        """Raise the model's own error where its graph has failed, or say that it has none."""

    def of_copy(self, model: nn.Module) -> StandIn:
        """Return the same for a copy of the model."""


class SameGraph(Protocol):
    """Tells whether a changed model would be captured as the same graph."""

    def holds(self, changes: Sequence[Change], training: bool) -> bool:
        """Return True only where it is certain."""

    def of_copy(self, model: nn.Module) -> SameGraph:
        """Return the same for a copy of the model."""


class Guard:
    """Run a captured graph while the model is as it was captured, and the model where it is not.

    Args:
        state: what the model's Python could read at the capture.
        inputs: what was fixed about the arguments.
        same_graph: looks closely at a change.
        stand_in: runs the model.
        untraced: why there is no graph of the evaluation, in which the model runs; "" where there
            is one.

    Attributes:
        stand_in, untraced: the same as given.
    """

    def __init__(
        self,
        state: ModelState,
        inputs: InputForm,
        same_graph: SameGraph,
        stand_in: StandIn,
        untraced: str = "",
    ) -> None:
        self._state = state
        self._inputs = inputs
        self._same_graph = same_graph
        self.stand_in = stand_in
        self.untraced = untraced
        self._rejected: dict[bool, object] = {}
        self._why = ""
        self._broken = ""
        self._trials = 0
        self._told: set[str] = set()

    def call(
        self,
        net: GuardedNet,
        graph: Callable[..., Value],
        args: tuple[Value, ...],
        kwargs: dict[str, Value],
    ) -> Value:
        """Return what the model returns for these inputs.

        Args:
            net: the captured module.
            graph: its generated ``forward``.
            args: positional inputs.
            kwargs: keyword inputs.
        """
        if not self.holds(net):
            if _symbolic(args, kwargs):
                self._refuse_untraced(net.training)
                return graph(net, *args, **kwargs)
            net.follow_source()
            if self.untraced and not net.training:
                return self.stand_in.run(net, args, kwargs, UNTRACED)
            if self._broken:
                return self._run_model(net, args, kwargs, self._broken)
            if not self._state.holds(net.training) and not self._still_the_same(net.training):
                return self._run_model(net, args, kwargs, self._why)
        given = self._inputs.fitting((args, kwargs), net.training)
        if given is None:
            if _symbolic(args, kwargs):
                return graph(net, *args, **kwargs)
            return self._run_model(net, args, kwargs, self._inputs.misfit((args, kwargs)))
        try:
            # Derivatives by the inputs, where torch's own rules take their time.
            if innermost_jvp() is not None:
                with LinearBelowJvp():
                    return graph(net, *given[0], **given[1])
            return graph(net, *given[0], **given[1])
        except (KFACError, torch.OutOfMemoryError):
            raise
        # What operators and modules raise where they refuse an input. Others are left alone: a
        # checkpoint stops its second run by an exception, and so may a hook of the user's.
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            self.stand_in.fail_as_model(args, kwargs, error)
            raise

    def holds(self, net: GuardedNet) -> bool:
        """Tell whether nothing has changed that the graph depends on, but for the inputs."""
        if self._broken or (self.untraced and not net.training):
            return False
        return net.members_hold() and self._state.holds(net.training)

    def fits(self, args: tuple[Value, ...], kwargs: dict[str, Value], training: bool) -> bool:
        """Tell whether the graph is for inputs of this form."""
        return self._inputs.fitting((args, kwargs), training) is not None

    def __deepcopy__(self, memo: dict[int, object]) -> Guard:
        # A copy has another model to look at, which this one does not know: see ``of_copy``.
        return self

    def of_copy(self, model: nn.Module, training: bool) -> Guard:
        """Return the guard of a copy of the model, which was specialised to the same.

        Args:
            model: the copy.
            training: the mode of the captured module.
        """
        copied = Guard(
            self._state.of_copy(model),
            self._inputs,
            self._same_graph.of_copy(model),
            self.stand_in.of_copy(model),
            self.untraced,
        )
        # Where the model has changed already, the copy is no ground to compare with any more. The
        # copy looks at its own flags; of the evaluation there may be nothing to compare with.
        with all_in_mode(self._state.model, True) if self.untraced else nullcontext():
            mode = training or bool(self.untraced)
            if not self._state.holds(mode) and not self._still_the_same(mode):
                copied._broken = self._why
        return copied

    def _still_the_same(self, training: bool) -> bool:
        """Look closely at a change: tell whether it leads to the graph that there is."""
        state = self._state
        if training in self._rejected and state.same(self._rejected[training]):
            return False
        if self._trials < _TRIALS and state.same_elsewhere(training):
            return True
        changes = state.changes(training)
        self._why = "; ".join(dict.fromkeys(change.words for change in changes[:3])) or self._why
        if self._trials < _TRIALS or all(change.key == "training" for change in changes):
            self._trials += 1
            if not changes or self._same_graph.holds(changes, training):
                state.accept(training)
                return True
        self._rejected[training] = state.known()
        return False

    def _refuse_untraced(self, training: bool) -> None:
        """Refuse a tracer the graph of the other mode.

        Args:
            training: the mode of the captured module.

        Raises:
            CaptureError: there is none of this mode.
        """
        if self.untraced and not training:
            raise CaptureError(
                f"{UNTRACED} ({self.untraced}): trace the module in training, or the model itself"
            )

    def _run_model(
        self, net: GuardedNet, args: tuple[Value, ...], kwargs: dict[str, Value], why: str
    ) -> Value:
        """Run the model itself, and say so once for each reason."""
        if why not in self._told and len(self._told) < _TRIALS:
            self._told.add(why)
            log.warning(
                "%s was captured for another state or other inputs: %s. The model itself runs and "
                "is recorded as it does; transform it again for a graph",
                net._get_name(),
                why,
            )
        return self.stand_in.run(net, args, kwargs, why)


def _symbolic(args: tuple[Value, ...], kwargs: dict[str, Value]) -> bool:
    """Tell whether a tracer makes the call: it wants the graph, whatever became of the model."""
    return any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs)))


def guarded(forward: Callable[..., Value]) -> Callable[..., Value]:
    """Return a generated ``forward`` that runs as long as the guard finds nothing changed."""

    @functools.wraps(forward)
    def guarded(self: nn.Module, *args: Value, **kwargs: Value) -> Value:
        guard = self.__dict__["_guard"]
        # A compiler has guards of its own, for what the graph reads; it cannot trace these.
        if torch.compiler.is_compiling():
            if guard.untraced and not self.training:
                return guard.stand_in.run_unrecorded(args, kwargs)
            return forward(self, *args, **kwargs)
        return guard.call(self, forward, args, kwargs)

    return guarded
