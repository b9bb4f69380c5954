"""The base of the passes of this library: torch's PassBase, with a true ``modified``."""

from __future__ import annotations

from abc import abstractmethod

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.errors import PassError
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.passes.annotations import graphs_of, is_tap

META = "kfac_fx"
"""Key in a module's meta: its curvature graph."""

OTHER_BLOCKS = "kfac_fx_other_graphs"
"""Key in a module's meta: the blocks of its other graphs' own uses, until taps are inserted."""


class GraphPass(PassBase):
    """A pass over all graphs of a module, in place.

    ``modified`` of its result says whether a graph became another: torch's own PassManager repeats
    passes until none says so, and ours takes a wrong answer for an error.
    """

    @abstractmethod
    def run(self, module: fx.GraphModule) -> bool:
        """Do the work, and tell whether a graph was changed."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass, and generate the module's code again where a graph was changed."""
        modified = self.run(graph_module)
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)


class Analysis(GraphPass):
    """Write what a pass finds to the curvature graph in ``meta["kfac_fx"]``; graphs stay.

    It reads graphs without taps: a tap between a layer and its reader would hide the one from the
    other.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise PassError where there are taps."""
        if has_taps(graph_module):
            raise PassError(f"{type(self).__name__} reads graphs without taps: run StripTaps first")

    @abstractmethod
    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """Return the curvature graph with what was found."""

    def run(self, module: fx.GraphModule) -> bool:
        """Write the curvature graph, and return False, as no graph is changed."""
        module.meta[META] = self.analyse(module)
        return False


def has_taps(module: fx.GraphModule) -> bool:
    """Tell whether a graph of the module itself has taps."""
    return any(is_tap(node) for graph in graphs_of(module) for node in graph.nodes)


def curvature_of(module: fx.GraphModule, reader: str) -> CurvatureGraph:
    """Return the curvature graph that an earlier pass wrote.

    Args:
        module: the module that the passes run on.
        reader: name of the pass that needs it, for the message.

    Raises:
        PassError: none did.
    """
    found = module.meta.get(META)
    if not isinstance(found, CurvatureGraph):
        raise PassError(f"{reader} needs the blocks: run FindUses first")
    return found


def set_graphs(module: fx.GraphModule, graphs: tuple[fx.Graph, ...]) -> None:
    """Give a module other graphs, in the order of ``graphs_of``."""
    if isinstance(module, CapturedModule):
        module.__dict__["evaluation"] = graphs[1] if len(graphs) > 1 else None
    module.graph = graphs[0]
