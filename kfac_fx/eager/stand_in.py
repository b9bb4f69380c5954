"""Run a model in the place of a graph that no longer stands for it, and record it as it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from kfac_fx.capture.undisturbed import undisturbed
from kfac_fx.eager.eager_taps import EagerTaps
from kfac_fx.eager.tape import Tape, compilers_off
from kfac_fx.eager.torch_calls import Value
from kfac_fx.errors import CaptureError
from kfac_fx.ir.curvature_graph import CurvatureGraph

if TYPE_CHECKING:
    from kfac_fx.capture.captured_module import CapturedModule


class ModelItself:
    """Run a model for its captured module, with taps at the calls that its blocks know.

    Args:
        model: the user's model.
        runs_hooks: whether this is to run the model's own hooks; where the captured module shares
            them, it has run them already.
    """

    def __init__(self, model: nn.Module, *, runs_hooks: bool) -> None:
        self._model = model
        self._runs_hooks = runs_hooks
        self._taps: EagerTaps | None = None
        self._curvature: CurvatureGraph | None = None

    def run(
        self, net: CapturedModule, args: tuple[Value, ...], kwargs: dict[str, Value], why: str
    ) -> Value:
        """Return the model's outputs.

        Args:
            net: the captured module, whose factor buffers are filled.
            args: positional inputs.
            kwargs: keyword inputs.
            why: what has changed, for the message.

        Raises:
            CaptureError: statistics are asked for that only a graph can record.
        """
        taps = self._taps_of(net) if torch.is_grad_enabled() else None
        if taps is None or not taps.recording():
            return self.run_unrecorded(args, kwargs)
        curvature = net.curvature
        if curvature.pairs or curvature.moments:
            what = "couplings" if curvature.pairs else "EKFAC's moments"
            raise CaptureError(
                f"{net._get_name()} was captured for another state or other inputs: {why}. Its "
                f"{what} are recorded by the graph alone: transform the model again, or transform "
                'it with structure="block_diagonal" and without ekfac'
            )
        with compilers_off(), Tape(self._model, taps):
            return self.run_unrecorded(args, kwargs)

    def run_unrecorded(self, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """Return the model's outputs.

        Args:
            args: positional inputs.
            kwargs: keyword inputs.
        """
        call = self._model if self._runs_hooks else self._model.forward
        return call(*args, **kwargs)

    def fail_as_model(
        self, args: tuple[Value, ...], kwargs: dict[str, Value], error: Exception
    ) -> None:
        """Run the model where its graph has failed, for the error that its own code raises.

        What the code does to the model is put back, as the graph has done it up to its error. The
        traceback then shows the user's lines and not those of a generated function.

        Args:
            args: positional inputs.
            kwargs: keyword inputs.
            error: what the graph has raised.

        Raises:
            CaptureError: the model does not fail: it has caught the error, or has seen what no
                graph shows.
        """
        grad = torch.is_grad_enabled()
        with undisturbed(self._model), torch.set_grad_enabled(grad):
            self.run_unrecorded(args, kwargs)
        raise CaptureError(
            f"the graph of {type(self._model).__name__} fails where the model does not "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): its code catches the "
            "error, or branches on what no trace shows. Transform it with "
            'capture="eager" and example_inputs=(...), which runs the code itself'
        ) from error

    def of_copy(self, model: nn.Module) -> ModelItself:
        """Return the same for a copy of the model."""
        return ModelItself(model, runs_hooks=self._runs_hooks)

    def _taps_of(self, net: CapturedModule) -> EagerTaps | None:
        """Return the taps of the blocks that the captured module has now, None without any."""
        curvature = net.meta.get("kfac_fx")
        uses_of_call = net.uses_of_call
        if curvature is None or uses_of_call is None:
            return None
        if self._taps is None or self._curvature is not curvature:
            self._taps = EagerTaps(net, uses_of_call)
            self._curvature = curvature
        return self._taps
