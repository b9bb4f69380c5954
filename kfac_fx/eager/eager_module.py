"""The captured module of a model that no tracer follows: the model itself runs and is recorded.

A data-dependent branch, ``.item()``, a round trip through numpy: the Python code is run every time,
so the module is right on every path. While statistics are asked for, each torch function that reads
a parameter is matched with the blocks and tapped on the spot; at other times nothing is watched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from kfac_fx.capture.captured_module import CapturedModule, adopt
from kfac_fx.capture.items import OURS, hand_on
from kfac_fx.capture.member_names import check_names
from kfac_fx.eager.eager_taps import EagerTaps
from kfac_fx.eager.recordable_uses import every_piece, placeable
from kfac_fx.eager.tape import Tape, compilers_off
from kfac_fx.eager.torch_calls import Value
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.dynamo_frames import break_graph
from kfac_fx.torch_internals.generated_forward import set_signature

if TYPE_CHECKING:
    from kfac_fx.capture.captured_module import UsesOfCall
    from kfac_fx.ir.use import ParameterUse

RUNNER = f"{OURS}_model"
"""Name of the submodule that runs the model."""


_NO_GRAPH = (
    "kfac_fx records this model while its own code runs, as no graph of it could be captured: "
    "compile the net without fullgraph=True"
)
"""What torch.compile(net, fullgraph=True) says besides where statistics are recorded."""


class Runner(nn.Module):
    """Call the model; it is held out of sight, since its members are the captured module's.

    Args:
        model: the user's model. It is kept in a tuple, so that it is no submodule of this one and
            its parameters do not appear twice in the state_dict.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = (model,)
        self.taps: EagerTaps | None = None
        self.training = model.training

    def forward(self, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        # fx's interpreter, by which torch.export runs graph modules, has no keywords: an empty list
        # is what it gives.
        kwargs = kwargs or {}
        if self.taps is not None and torch.is_grad_enabled() and self.taps.recording():
            if torch.compiler.is_compiling():
                # Dynamo cannot trace a TorchFunctionMode that builds a graph as it goes.
                break_graph(_NO_GRAPH)
                return torch.compiler.disable(self.recorded)(args, kwargs)
            return self.recorded(args, kwargs)
        return self.held[0](*args, **kwargs)

    def recorded(self, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """Run one forward pass of the model with taps and return its outputs."""
        with compilers_off(), Tape(self.held[0], self.taps):
            return self.held[0](*args, **kwargs)


class EagerModule(CapturedModule):
    """A captured module whose graph is one call of the model.

    Attributes:
        example: what the model did with the example inputs, as a graph. It is the ground of the
            analysis and is not run.
    """

    example: fx.Graph
    runs_model = True

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """Return the graph that tells the uses: that of the example inputs."""
        return (self.example,)

    @property
    def runner(self) -> Runner:
        """Return the submodule that calls the model."""
        runner = self._modules[RUNNER]
        assert isinstance(runner, Runner)
        return runner

    @property
    def source(self) -> nn.Module:
        """Return the model itself."""
        return self.runner.held[0]

    def recordable(self, uses: Sequence[ParameterUse], graph: fx.Graph) -> list[ParameterUse]:
        """Return the uses in the forms that taps at single calls can record, for every piece."""
        return every_piece(placeable(uses, graph), graph)

    def train(self, mode: bool = True) -> EagerModule:
        """Set the mode, by the model's own ``train``.

        Args:
            mode: True for training, False for evaluation.
        """
        for name, child in self._modules.items():
            if name.startswith(OURS) and child is not None and child is not self.runner:
                child.train(mode)
        self.source.train(mode)
        self.runner.training = self.training = self.source.training
        return self

    def recompile(self) -> PythonCode:
        """Generate ``forward`` again, and let it show the arguments of the model's own.

        Passes recompile a module that they have changed. Trainers of other libraries read the
        signature, and drop the columns of their data that it does not name.
        """
        code = super().recompile()
        if RUNNER in self._modules:  # else it is not built yet
            set_signature(self, inspect.signature(type(self.source).forward))
        return code

    def taps_inserted(self, uses_of_call: UsesOfCall) -> None:
        """Let the model be recorded from now on, while statistics are asked for."""
        self.runner.taps = EagerTaps(self, uses_of_call)

    def __deepcopy__(self, memo: dict[int, Value]) -> EagerModule:
        copied = eager_module(copy.deepcopy(self.source, memo), self.example)
        memo[id(self)] = copied
        copied.meta.update(self.meta)
        copied.training = self.training
        for name, child in self._modules.items():
            if name not in copied._modules:
                copied.add_module(name, copy.deepcopy(child, memo))
        if self.runner.taps is not None:
            copied.runner.taps = self.runner.taps.of_copy(copied)
        return copied

    def __reduce__(self) -> tuple[Value, ...]:
        raise CaptureError(
            f"{type(self).__name__} runs the model's own code and cannot be pickled: save "
            "state_dict() and transform the model again"
        )


def eager_module(model: nn.Module, example: fx.Graph) -> EagerModule:
    """Return an EagerModule with the members of ``model``.

    Args:
        model: is run by the result; parameters, buffers and submodules are shared with it.
        example: what it did with example inputs.
    """
    # The graph that runs is one call: fx's machinery (code, copies, hooks) stays in use, and other
    # passes see a module that they can leave alone.
    check_names(model, EagerModule)
    graph = fx.Graph()
    inputs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    graph.output(graph.create_node("call_module", RUNNER, inputs))
    module = EagerModule(nn.Module(), fx.Graph(), type(model).__name__)
    module.__dict__["example"] = example
    module.__dict__["evaluation"] = None
    adopt(module, {"_modules": model._modules})
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        # The very dictionaries of the model: a buffer that its code sets anew is so for both.
        module.__dict__[name] = model.__dict__[name]
    module.add_module(RUNNER, Runner(model))
    module.__dict__["_held"] = (model,)
    hand_on(module, model)
    module.graph = graph
    module.training = model.training
    module.recompile()
    return module
