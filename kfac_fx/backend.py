"""The public side of the backend of torch.compile: ``kfac_fx.backend`` and its entry point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import fx

from kfac_fx.dynamo.backend import Backend
from kfac_fx.dynamo.captured_graphs import BackendSettings, CompiledGraph, Value
from kfac_fx.passes.options import TransformKeywords, TransformOptions
from kfac_fx.torch_internals.dynamo_frames import Compiler

if TYPE_CHECKING:
    from typing_extensions import Unpack


def backend(
    inner: str | Compiler = "inductor",
    on_graph: Callable[[fx.GraphModule], object] | None = None,
    **options: Unpack[TransformKeywords],
) -> Backend:
    """Return a backend for ``torch.compile(model, backend=kfac_fx.backend(...))``.

    Every graph that Dynamo captures goes to the inner backend as it is. Once the model has run,
    ``Preconditioner(compiled)`` finds the blocks of the whole model in all its graphs and puts taps
    into a second form of each, which runs while statistics are due and goes to the inner backend
    too. Names of parameters are the model's. Layers that Dynamo leaves to Python are not recorded,
    which a warning says; couplings do not reach over graph breaks.

    Args:
        inner: name or function of the backend that compiles.
        on_graph: called with each instrumented GraphModule; its ``meta["kfac_fx"]`` is the
            curvature graph of the whole model.
        options: the same as for ``kfac_fx.transform``: structure, couplings, exclude, strict,
            weight_sharing, max_factor_dim, large_factors, ekfac, rules.

    Raises:
        UnknownOptionError: an option is wrong.
    """
    return Backend(BackendSettings(inner, on_graph, TransformOptions(**options)))


def default(module: fx.GraphModule, inputs: Sequence[Value]) -> CompiledGraph:
    """Compile a graph for ``torch.compile(model, backend="kfac_fx")``, by inductor.

    This is the entry point of the package, so its arguments are those of every backend.
    """
    return _DEFAULT(module, inputs)


# Made once: the entry point is called for each graph, and no graph should find other settings.
_DEFAULT = backend()
