"""The whole chain as one pass: from a captured module to its instrumented form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import fx

from kfac_fx.capture import EagerModule
from kfac_fx.capture.module import captured_module
from kfac_fx.config import MAX_FACTOR_DIM
from kfac_fx.ops import STORE
from kfac_fx.passes.analyses import CheckCoverage, FindCouplings, FindMoments, FindUses
from kfac_fx.passes.annotations import graphs_of
from kfac_fx.passes.base import META, GraphPass, has_taps, set_graphs
from kfac_fx.passes.eager_taps import EagerTaps
from kfac_fx.passes.inline_calls import InlineCalls
from kfac_fx.passes.insert_taps import InsertTaps
from kfac_fx.passes.manager import PassManager, PassReport
from kfac_fx.passes.strip_taps import strip_taps


class KFACTransform(GraphPass):
    """Uses, couplings and taps in one pass; ``kfac_fx.transform`` is a capture and this.

    A GraphModule is changed in place: ``meta["kfac_fx"]`` is its curvature graph, and
    ``Preconditioner`` takes it. Where taps are there already, they are found anew, for the graph
    may have changed; if they are as they should be, nothing is touched. Buffers that still fit
    stay, so that a Preconditioner goes on.

    Args:
        on_pass: called with a ``PassReport`` after each pass of the chain.
        route: how the module was captured.
        options: as for ``kfac_fx.transform``: structure, couplings, exclude, strict,
            weight_sharing, max_factor_dim, large_factors, ekfac.

    Raises:
        UnknownOptionError: an option is wrong.
    """

    def __init__(
        self,
        *,
        structure: str = "block_tridiagonal",
        couplings: str = "topology",
        exclude: Collection[str] = (),
        strict: bool = False,
        weight_sharing: str = "expand",
        max_factor_dim: int = MAX_FACTOR_DIM,
        large_factors: str = "diagonal",
        ekfac: bool = False,
        route: str = "graph_module",
        on_pass: Callable[[PassReport], Any] | None = None,
    ) -> None:
        self.uses = FindUses(
            exclude=exclude,
            weight_sharing=weight_sharing,
            max_factor_dim=max_factor_dim,
            large_factors=large_factors,
            structure=structure,
            route=route,
        )
        coupled = FindCouplings(couplings=couplings)
        self.passes: list[GraphPass] = [
            self.uses,
            *([coupled] if structure == "block_tridiagonal" else []),
            *([FindMoments()] if ekfac else []),
            CheckCoverage(strict=strict),
            InsertTaps(),
        ]
        self._chain = PassManager(self.passes, on_pass=on_pass)

    def run(self, module: fx.GraphModule) -> bool:
        """Whether there are other taps than before."""
        if isinstance(module, EagerModule):
            return self._run_eager(module)
        opened = InlineCalls().run(module)
        if not has_taps(module):
            return bool(self._chain(module).modified) or opened
        trial = _without_taps(module)
        self._chain(trial)
        found = trial.meta[META]
        same = found == module.meta.get(META) and all(
            map(_same, graphs_of(trial), graphs_of(module))
        )
        if same:
            return opened
        module.add_module(STORE, trial.get_submodule(STORE))
        module.meta[META] = found
        set_graphs(module, graphs_of(trial))
        return True

    def _run_eager(self, module: EagerModule) -> bool:
        for graph in module.graphs:
            strip_taps(graph, module)
        modified = self._chain(module).modified
        uses = self.uses
        options = (uses.reduce, uses.max_factor_dim, uses.large_factors)
        module.runner.taps = EagerTaps(module, *options)
        return bool(modified)


def _without_taps(module: fx.GraphModule) -> fx.GraphModule:
    """A module of the same members with copies of the graphs, in which names of taps are free."""
    graphs = []
    for graph in graphs_of(module):
        stripped = copy.deepcopy(graph)
        strip_taps(stripped, module)
        graphs.append(copy.deepcopy(stripped))
    return captured_module(module, graphs[0], graphs[1] if len(graphs) > 1 else None)


def _same(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs are equal but for the names of nodes."""
    if len(one.nodes) != len(other.nodes):
        return False
    there: dict[fx.Node, fx.Node] = {}
    for a, b in zip(one.nodes, other.nodes, strict=True):
        there[a] = b
        arguments = fx.node.map_arg((a.args, a.kwargs), there.__getitem__)
        if (a.op, a.target) != (b.op, b.target) or arguments != (b.args, b.kwargs):
            return False
    return True
