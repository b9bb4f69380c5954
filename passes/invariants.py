"""Check what must hold for a module after every pass."""

from __future__ import annotations

from torch import Tensor, fx

from kfac_fx.errors import PassError
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.annotations import annotation, graphs_of, is_tap
from kfac_fx.passes.base import META


def check_module(module: fx.GraphModule) -> None:
    """Lint the graphs of a module and check its taps.

    Args:
        module: a module with or without taps; nothing is changed.

    Raises:
        PassError: a tap reads a buffer that is not there, or names a block that is unknown.
        RuntimeError, ValueError: a graph is not well formed.
    """
    curvature = module.meta.get(META)
    for graph in graphs_of(module):
        graph.lint()
        for tap in filter(is_tap, graph.nodes):
            _check_tap(module, tap, curvature)


def _check_tap(module: fx.GraphModule, tap: fx.Node, curvature: CurvatureGraph | None) -> None:
    """Check that a tap's buffers are there and that the blocks it names are known."""
    for source in tap.all_input_nodes:
        path = str(source.target)
        if source.op == "get_attr" and path.startswith(STORE + "."):
            owner, _, name = path.rpartition(".")
            if not isinstance(getattr(module.get_submodule(owner), name, None), Tensor):
                raise PassError(f"tap {tap.name} reads {path}, which is no buffer")
    # A module without a curvature graph may still have taps: somebody retraced it, and the graph
    # is read back from the taps.
    unknown = set(annotation(tap).get("blocks", ())) - set(curvature.blocks if curvature else ())
    if curvature is not None and unknown:
        raise PassError(f"tap {tap.name} records {sorted(unknown)}, which are no blocks")
