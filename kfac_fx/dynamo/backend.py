"""The backend of torch.compile: hands graphs on to another backend, and keeps them for taps."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx

from kfac_fx.dynamo.captured_graphs import BackendSettings, CompiledGraph, Value
from kfac_fx.dynamo.open_attention import note_facts

log = logging.getLogger("kfac_fx")


class Backend:
    """Compile graphs for ``torch.compile``; ``kfac_fx.backend`` makes one.

    Args:
        settings: the inner backend and the options; one backend may compile many models, so it
            keeps nothing of any of them.
    """

    def __init__(self, settings: BackendSettings) -> None:
        self.settings = settings

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Value]) -> CompiledGraph:
        """Return what runs in the place of a graph that Dynamo has captured.

        Args:
            module: the captured graph.
            inputs: example inputs, fake tensors among them.
        """
        log.debug("a graph of %d nodes goes to %s", len(module.graph.nodes), self.settings.inner)
        # What is known of shapes goes with the capture, so it is written down: taps are inserted
        # later, when a Preconditioner asks for them.
        note_facts(module.graph, "example_value")
        return CompiledGraph(module, inputs, self.settings)
