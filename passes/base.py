"""What the passes of this library have in common: torch's PassBase, with a true ``modified``."""

from __future__ import annotations

from abc import abstractmethod

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.errors import PassError
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.passes.annotations import graphs_of, is_tap

META = "kfac_fx"
"""Key of the curvature graph in a module's meta."""

HERE = "kfac_fx_other_graphs"
"""Key of the blocks that the uses of its other graphs make, until taps are inserted."""


class GraphPass(PassBase):
    """A pass over all graphs of a module, in place.

    ``modified`` of its result says whether a graph became another.
    """

    @abstractmethod
    def run(self, module: fx.GraphModule) -> bool:
        """Whether a graph was changed."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Runs the pass, and generates the module's code again where a graph was changed."""
        modified = self.run(graph_module)
        if modified:
            graph_module.recompile()
        return PassResult(graph_module, modified)


class Analysis(GraphPass):
    """Writes what it finds to the curvature graph in ``meta["kfac_fx"]``; graphs stay as they are.

    It reads graphs without taps.
    """

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raises PassError where there are taps."""
        if has_taps(graph_module):
            raise PassError(f"{type(self).__name__} reads graphs without taps: run StripTaps first")

    @abstractmethod
    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """The curvature graph with what was found."""

    def run(self, module: fx.GraphModule) -> bool:
        """Never changes a graph."""
        module.meta[META] = self.analyse(module)
        return False


def has_taps(module: fx.GraphModule) -> bool:
    """Whether a graph of the module itself has taps."""
    return any(is_tap(node) for graph in graphs_of(module) for node in graph.nodes)


def curvature_of(module: fx.GraphModule, reader: str) -> CurvatureGraph:
    """The curvature graph that an earlier pass wrote.

    Raises:
        PassError: none did.
    """
    found = module.meta.get(META)
    if not isinstance(found, CurvatureGraph):
        raise PassError(f"{reader} needs the blocks: run FindUses first")
    return found


def set_graphs(module: fx.GraphModule, graphs: tuple[fx.Graph, ...]) -> None:
    """Gives a module other graphs, in the order of ``graphs_of``."""
    if isinstance(module, CapturedModule):
        module.__dict__["evaluation"] = graphs[1] if len(graphs) > 1 else None
    module.graph = graphs[0]
