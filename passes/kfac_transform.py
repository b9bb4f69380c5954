"""Instrument a captured module: every pass of the library as one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import fx

from kfac_fx.capture.captured_module import CapturedModule, captured_module
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.annotations import graphs_of
from kfac_fx.passes.base import META, Analysis, GraphPass, has_taps, set_graphs
from kfac_fx.passes.check_coverage import CheckCoverage
from kfac_fx.passes.find_couplings import FindCouplings
from kfac_fx.passes.find_moments import FindMoments
from kfac_fx.passes.find_uses import FindUses, uses_of_call
from kfac_fx.passes.inline_calls import InlineCalls
from kfac_fx.passes.insert_taps import InsertTaps
from kfac_fx.passes.manager import PassManager, PassReport
from kfac_fx.passes.options import TransformKeywords, TransformOptions
from kfac_fx.passes.rules.base import default_rules
from kfac_fx.passes.strip_taps import strip_taps

if TYPE_CHECKING:
    from typing_extensions import Unpack


class KFACTransform(GraphPass):
    """Find uses and couplings and insert taps; ``kfac_fx.transform`` is a capture and this.

    A GraphModule is changed in place: ``meta["kfac_fx"]`` is its curvature graph, and
    ``Preconditioner`` takes it. Where taps are there already, they are found anew, for the graph
    may have changed; if they are as they should be, nothing is touched. Buffers that still fit
    stay, so that a Preconditioner goes on.

    Args:
        options: the options as one value; the keywords below replace single ones of it.
        route: how the module was captured; ``curvature.route`` says it.
        on_pass: called with a ``PassReport`` after each of the passes.
        keywords: the same as for ``kfac_fx.transform``: structure, couplings, exclude, strict,
            weight_sharing, max_factor_dim, large_factors, ekfac, rules.

    Raises:
        UnknownOptionError: an option is wrong.
    """

    def __init__(
        self,
        options: TransformOptions | None = None,
        *,
        route: str = "graph_module",
        on_pass: Callable[[PassReport], object] | None = None,
        **keywords: Unpack[TransformKeywords],
    ) -> None:
        self.options = replace(options or TransformOptions(), **keywords)
        found = analyses(self.options, route=route)
        self._passes = PassManager([*found, InsertTaps()], on_pass=on_pass)

    def run(self, module: fx.GraphModule) -> bool:
        """Tell whether there are other taps than before."""
        if isinstance(module, CapturedModule) and module.runs_model:
            return self._run_on_running(module)
        if isinstance(module, CapturedModule):
            # Where the model itself must run in the place of its graph, its calls are matched with
            # the blocks by the rules that find them now.
            module.taps_inserted(partial(uses_of_call, options=self._with_rules()))
        inlined = InlineCalls().run(module)
        if not has_taps(module):
            return bool(self._passes(module).modified) or inlined
        # Taps are there: find them anew on copies of the graphs without them. Only where the result
        # differs is the module touched, so that a transform that runs twice says "not modified" and
        # nodes that others hold on to stay alive.
        trial = _without_taps(module)
        self._passes(trial)
        found = trial.meta[META]
        same = found == module.meta.get(META) and all(
            map(_equal_but_for_names, graphs_of(trial), graphs_of(module))
        )
        if same:
            return inlined
        module.add_module(STORE, trial.get_submodule(STORE))
        module.meta[META] = found
        set_graphs(module, graphs_of(trial))
        return True

    def _run_on_running(self, module: CapturedModule) -> bool:
        """Tap a model that runs its own code: its graph is an example and serves the analysis."""
        # Its calls are matched with its blocks long after this: by the rules that find the blocks
        # now, also where one of them is no longer registered by then.
        uses = partial(uses_of_call, options=self._with_rules())
        for graph in module.graphs:
            strip_taps(graph, module)
        modified = self._passes(module).modified
        module.taps_inserted(uses)
        return bool(modified)

    def _with_rules(self) -> TransformOptions:
        """Return the options with the rules that are registered now."""
        return replace(self.options, rules=self.options.rules or default_rules())


def analyses(options: TransformOptions, *, route: str, counted: bool = False) -> list[Analysis]:
    """Return the passes that make a curvature graph, in order; none of them changes a graph.

    Args:
        options: decide which passes there are, and what each finds.
        route: how the module was captured.
        counted: record positions of single uses too; see ``FindUses``.
    """
    found: list[Analysis] = [FindUses(options, route=route, counted=counted)]
    if options.recorded == "block_tridiagonal":
        found.append(FindCouplings(couplings=options.couplings))
    if options.ekfac:
        found.append(FindMoments())
    found.append(CheckCoverage(strict=options.strict))
    return found


def _without_taps(module: fx.GraphModule) -> fx.GraphModule:
    """Return a module of the same members with copies of the graphs that have no taps.

    The copy is copied once more: erased taps leave their names taken in a graph, and taps that are
    inserted again would get other names than those of the module.
    """
    graphs = []
    for graph in graphs_of(module):
        stripped = copy.deepcopy(graph)
        strip_taps(stripped, module)
        graphs.append(copy.deepcopy(stripped))
    return captured_module(module, graphs[0], graphs[1] if len(graphs) > 1 else None)


def _equal_but_for_names(one: fx.Graph, other: fx.Graph) -> bool:
    """Tell whether two graphs are equal but for the names of nodes."""
    if len(one.nodes) != len(other.nodes):
        return False
    partner: dict[fx.Node, fx.Node] = {}
    for a, b in zip(one.nodes, other.nodes, strict=True):
        partner[a] = b
        arguments = fx.node.map_arg((a.args, a.kwargs), partner.__getitem__)
        if (a.op, a.target) != (b.op, b.target) or arguments != (b.args, b.kwargs):
            return False
    return True
