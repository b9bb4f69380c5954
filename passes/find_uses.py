"""Finds every parameter use of a graph; each path of a parameter is claimed exactly once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.capture.graph_view import GraphView
from kfac_fx.capture.without_derivative import without_derivative
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.ir.use import ParameterUse
from kfac_fx.passes.annotations import graphs_of
from kfac_fx.passes.base import OTHER_BLOCKS, Analysis
from kfac_fx.passes.covered_parameters import Covered
from kfac_fx.passes.find_cases import place_cases
from kfac_fx.passes.gather_blocks import forms, gather_blocks, pieces, summable
from kfac_fx.passes.options import TransformOptions
from kfac_fx.passes.rules.base import Refusal, Rules, Site, default_rules
from kfac_fx.passes.rules.generic import generic_use

log = logging.getLogger("kfac_fx")


@dataclass
class _Matches:
    """The uses that the rules took and refused in one round over the graph.

    Attributes:
        uses: the uses by parameter; one use may stand under several (a weight and its bias).
        refusals: why a rule that looked at a node did not take it, by the name of the node.
    """

    uses: dict[str, list[ParameterUse]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def drop_inner(self, view: GraphView) -> None:
        """Leave out uses that are steps of computing a weight whose use is there as a whole.

        ``W = V * s / norm(V)`` multiplies V by a vector, which the rule for scales would claim; the
        use that counts is that of W, from which V's factors are computed.
        """
        for name, uses in self.uses.items():
            whole = {use.node for use in uses if use.tap is not None and use.tap.scale is not None}
            nodes = {node.name: node for node in view.graph.nodes} if whole else {}
            inner = [
                use
                for use in uses
                if whole
                and use.node not in whole
                and {end.name for end in view.ends(nodes[use.node])} <= whole
            ]
            for use in inner:
                self.uses[name].remove(use)

    def add(self, use: ParameterUse) -> None:
        """Take in a use, for all its parameters."""
        for name in use.parameters:
            self.uses.setdefault(name, []).append(use)


def find_uses(
    module: nn.Module,
    graph: fx.Graph,
    names: Collection[str],
    options: TransformOptions | None = None,
) -> list[ParameterUse]:
    """Return the uses of the named parameters, in the graph's order.

    A parameter with a path that no rule claims, or whose uses do not fit together, falls to the
    generic rule as a whole. Parameters that the outputs do not depend on have no use.

    Args:
        module: owns the members that the graph reads.
        graph: without taps; it is not changed.
        names: parameters to cover (canonical names).
        options: ``weight_sharing``, ``max_factor_dim`` and ``large_factors`` decide on the form of
            the uses, ``rules`` finds them; None stands for the defaults.
    """
    options = options or TransformOptions()
    left_out = without_derivative(graph)
    uses = _uses(GraphView(module, graph, left_out), names, options)
    covered = {name for use in uses for name in use.parameters}
    rest = [name for name in names if name not in covered]
    if left_out and rest:
        # A block would wait for ever for the statistics of a use without derivatives, where its
        # parameter has others. One that has none but these keeps them: another call, with other
        # inputs or after a change, may bring derivatives, and it is not unused then.
        uses += _uses(GraphView(module, graph), rest, options)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    return sorted(uses, key=lambda use: order[use.node])


def _uses(view: GraphView, names: Collection[str], options: TransformOptions) -> list[ParameterUse]:
    """Return the uses of the named parameters in a graph as it is viewed, in any order."""
    rules = options.rules or default_rules()
    # No rule knows the curvature of complex parameters: they fall to the generic rule.
    real = frozenset(name for name in names if not view.parameters[name].is_complex())
    site = _site(view, real, options)
    demoted: dict[str, str | None] = {}
    # A parameter that the rules disagree about is taken from them and the graph is matched again:
    # its bias, say, may then be claimed by a rule that came later. Every round takes at least one
    # parameter away, so this ends.
    while True:
        matches = _match(site, rules)
        misfits = _unclaimed(site, matches) or _different(matches)
        alone = {} if misfits else _with_and_without_bias(matches)
        if not misfits and not alone:
            break
        demoted |= misfits
        site = replace(site, open=site.open - demoted.keys(), alone=site.alone | alone.keys())
    # A use of several parameters stands under each of them, and counts once.
    found = {id(use): use for uses in matches.uses.values() for use in uses}
    uses = list(found.values())
    for name in (name for name in names if name not in matches.uses):
        use = generic_use(site, name, demoted.get(name), matches.refusals)
        uses += [] if use is None else [use]
    for name, reason in matches.refusals.items():
        log.debug("%s: not recorded as a layer, %s", name, reason)
    return uses


def uses_of_call(
    view: GraphView,
    node: fx.Node,
    parameters: frozenset[str],
    alone: frozenset[str],
    options: TransformOptions,
) -> list[ParameterUse] | None:
    """Return the uses that the first rule finds in one call, None where no rule takes it.

    This is for a model that runs and shows one call at a time; ``find_uses`` sees the whole graph.

    Args:
        view: reads the graph of the calls so far.
        node: the call.
        parameters: names of those that rules may claim.
        alone: weights that have a block without their bias, so that no use may take both.
        options: those that the blocks were found with.
    """
    call = view.call(node)
    site = _site(view, parameters, options, alone)
    rules = options.rules or default_rules()
    for rule in rules.asked(call.operation) if call is not None else ():
        assert call is not None
        answer = rule.match(call, site)
        if answer is None or isinstance(answer, Refusal):
            continue
        found = answer if isinstance(answer, Sequence) else [answer]
        return [use for use in found if not isinstance(use, Refusal)]
    return None


def _site(
    view: GraphView,
    parameters: frozenset[str],
    options: TransformOptions,
    alone: frozenset[str] = frozenset(),
) -> Site:
    return Site(
        view,
        parameters,
        reduce=options.weight_sharing == "reduce",
        limits=options.limits,
        alone=alone,
        large_factors=options.large_factors,
    )


def _match(site: Site, rules: Rules) -> _Matches:
    """Ask the rules about every call of the vocabulary; the first that takes it has it."""
    matches = _Matches()
    for node in site.view.graph.nodes:
        call = site.view.call(node)
        if call is None or site.view.is_undifferentiated(node):
            continue
        # One tensor inside vmap stands for all cases: a tap would record a single one.
        if site.view.is_mapped(node):
            matches.refusals[node.name] = "it runs inside vmap, where a tap sees no cases"
            continue
        for rule in rules.asked(call.operation):
            answer = rule.match(call, site)
            if isinstance(answer, Refusal):
                matches.refusals[node.name] = answer.reason
            elif answer is not None:
                for use in answer if isinstance(answer, Sequence) else [answer]:
                    if isinstance(use, Refusal):
                        matches.refusals[node.name] = use.reason
                    else:
                        matches.add(use)
                break
    matches.drop_inner(site.view)
    return matches


def _unclaimed(site: Site, matches: _Matches) -> dict[str, str | None]:
    """Return parameters with a path that no rule took; the generic rule will say which.

    One missing path is enough: a block that lacks a use has too small a curvature, and its step
    would be too long without a word.
    """
    result: dict[str, str | None] = {}
    for name, uses in matches.uses.items():
        claimed = {use.node for use in uses}
        # Where a weight that is computed from it meets the data. Another use of the same parameter
        # may stand there as well: the next step of a cell whose first one was refused.
        whole = {use.node for use in uses if use.tap is not None and use.tap.scale is not None}
        consumers = [consumer.node for consumer in site.view.consumers(name)]
        if any(
            node.name not in claimed and not {end.name for end in site.view.ends(node)} <= whole
            for node in consumers
        ):
            result[name] = None
    return result


def _different(matches: _Matches) -> dict[str, str | None]:
    """Return parameters whose uses cannot be summed into blocks, with the reason."""
    result: dict[str, str | None] = {}
    for name, uses in matches.uses.items():
        groups = pieces(name, uses)
        if groups is None:
            result[name] = f"its uses in {_places(uses)} overlap in part"
            continue
        for group in groups:
            same_partners = len({use.parameters for use in group}) == 1
            if same_partners and not summable(forms(group)):
                result[name] = f"its uses in {_places(group)} have different forms"
            elif not same_partners and group[0].parameters[0] != name:
                result[name] = f"it is added in {_places(group)} after different weights"
    return result


def _with_and_without_bias(matches: _Matches) -> dict[str, None]:
    """Return weights that are used with one bias and with none or another: all go without.

    A block has one set of parameters. The bias gets a block of its own, which costs the
    correlation between the two and nothing else.
    """
    return {
        name: None
        for name, uses in matches.uses.items()
        for group in pieces(name, uses) or ()
        if len({use.parameters for use in group}) > 1
    }


def _places(uses: Iterable[ParameterUse] | Sequence[ParameterUse]) -> str:
    return ", ".join(use.node for use in uses)


class FindUses(Analysis):
    """Find every use of every parameter, and gather the uses into blocks.

    Args:
        options: which parameters get blocks, and of which form; None stands for the defaults.
        route: how the module was captured; the curvature graph carries it.
        counted: record the number of positions of single uses too, for graphs whose uses may run
            any number of times in a forward pass.

    Raises:
        NoParametersError: there is nothing to precondition.
    """

    def __init__(
        self,
        options: TransformOptions | None = None,
        *,
        route: str = "graph_module",
        counted: bool = False,
    ) -> None:
        self.options = options or TransformOptions()
        self.route = route
        self.counted = counted

    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """Return a new curvature graph: the blocks, and the parameters that have none."""
        given = Covered(module, self.options.exclude)
        first, *others = graphs_of(module)
        blocks = self._blocks(module, first, given.names)
        # The graph of the evaluation may use parameters in another way. Its blocks are not part of
        # the curvature graph; InsertTaps needs them to tap those uses that have the same form.
        module.meta[OTHER_BLOCKS] = [self._blocks(module, graph, given.names) for graph in others]
        covered = {name for block in blocks.values() for name in block.parameters}
        unused = tuple(name for name in given.names if name not in covered)
        _log_blocks(blocks, unused)
        return CurvatureGraph(
            blocks,
            frozen=given.frozen,
            excluded=given.excluded,
            unused=unused,
            sizes=given.sizes,
            structure=self.options.recorded,
            route=self.route,
            preferred=self.options.preferred,
        )

    def _blocks(
        self, module: fx.GraphModule, graph: fx.Graph, names: Collection[str]
    ) -> dict[str, CurvatureBlock]:
        """Return the blocks that one graph's own uses make."""
        uses = find_uses(module, graph, names, self.options)
        counted = self.counted
        if isinstance(module, CapturedModule):
            uses = module.recordable(uses, graph)
            # A model that runs its own code may call a layer any number of times.
            counted |= module.runs_model
        placed = place_cases(module, graph, uses)
        if isinstance(module, CapturedModule) and module.runs_model:
            # Its taps find the cases as it runs; the report says here what cannot be told.
            pairs = zip(uses, placed, strict=True)
            placed = [replace(use, reason=found.reason) for use, found in pairs]
        uses = placed
        return gather_blocks(uses, graph, counted=counted)


def _log_blocks(blocks: Mapping[str, CurvatureBlock], unused: Collection[str]) -> None:
    for block in blocks.values():
        log.debug(
            "%s: %s block of %s, used in %s%s",
            block.name,
            f"{block.kind} ({block.approximation})",
            ", ".join(block.parameters),
            ", ".join(use.node for use in block.uses),
            f"; {block.reason}" if block.reason else "",
        )
    for name in unused:
        log.debug("%s: no block, the outputs do not depend on it", name)
