"""The backend of torch.compile: graphs are handed on to another backend, and can record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from kfac_fx.capture.dynamo import CompiledGraph
from kfac_fx.passes import KFACTransform
from kfac_fx.passes.open_attention import note_facts

log = logging.getLogger("kfac_fx")


class Backend:
    """A backend for torch.compile; see ``backend``."""

    def __init__(
        self,
        inner: str | Callable[..., Any],
        on_graph: Callable[[fx.GraphModule], Any] | None,
        transform: KFACTransform,
    ) -> None:
        self.inner, self.on_graph, self.transform = inner, on_graph, transform

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> CompiledGraph:
        """What runs in the place of a graph that Dynamo has captured."""
        from torch._dynamo import lookup_backend

        log.debug("a graph of %d nodes goes to %s", len(module.graph.nodes), self.inner)
        note_facts(module.graph, "example_value")
        graph = CompiledGraph(module, _not_compiled, self)
        inner = lookup_backend(self.inner) if isinstance(self.inner, str) else self.inner
        graph.compiled = inner(module, list(inputs))
        return graph


def _not_compiled(*inputs: Tensor) -> Any:
    raise AssertionError("a graph runs before it is compiled")


def backend(
    inner: str | Callable[..., Any] = "inductor",
    on_graph: Callable[[fx.GraphModule], Any] | None = None,
    **options: Any,
) -> Backend:
    """A backend for ``torch.compile(model, backend=kfac_fx.backend(...))``.

    Every graph that Dynamo captures goes to the inner backend as it is. Once the model has run,
    ``Preconditioner(compiled)`` finds the blocks of the whole model in all its graphs and puts taps
    into a second form of each, which runs while statistics are due and goes to the inner backend
    too. Names of parameters are the model's. Layers that Dynamo leaves to Python are not recorded,
    which a warning says; couplings do not reach over graph breaks.

    Args:
        inner: name or function of the backend that compiles.
        on_graph: called with each instrumented GraphModule; its ``meta["kfac_fx"]`` is the
            curvature graph of the whole model.
        options: as for ``kfac_fx.transform``: structure, couplings, exclude, strict,
            weight_sharing, max_factor_dim, large_factors, ekfac.

    Raises:
        UnknownOptionError: an option is wrong.
    """
    return Backend(inner, on_graph, KFACTransform(**options))


def default(module: fx.GraphModule, inputs: Sequence[Any]) -> CompiledGraph:
    """``torch.compile(model, backend="kfac_fx")``: the entry point, with inductor behind it."""
    return _DEFAULT(module, inputs)


_DEFAULT = backend()
