"""Finds every parameter use of a graph; each path of a parameter is claimed exactly once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from kfac_fx.capture.view import GraphView
from kfac_fx.config import MAX_FACTOR_DIM
from kfac_fx.ir import ParameterUse
from kfac_fx.passes.gather_blocks import forms, pieces, summable
from kfac_fx.passes.rules import Refusal, Site, default_rules, generic_use

log = logging.getLogger("kfac_fx")


@dataclass
class _Matches:
    """What the rules took, by parameter, and by node name why they refused."""

    uses: dict[str, list[ParameterUse]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def drop_inner(self, view: GraphView) -> None:
        """Leaves out uses that are steps of computing a weight whose use is there as a whole."""
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
        for name in use.parameters:
            self.uses.setdefault(name, []).append(use)


def find_uses(
    module: nn.Module,
    graph: fx.Graph,
    names: Collection[str],
    *,
    reduce: bool = False,
    max_factor_dim: int = MAX_FACTOR_DIM,
    large_factors: str = "diagonal",
) -> list[ParameterUse]:
    """The uses of the named parameters, in the graph's order.

    A parameter with a path that no rule claims, or whose uses do not fit together, falls to the
    generic rule as a whole. Parameters that the outputs do not depend on have no use.

    Args:
        names: parameters to cover (canonical names).
        reduce: positions that share a weight are reduced rather than expanded.
        max_factor_dim: larger sides of Kronecker factors become diagonals, or are cut.
        large_factors: "diagonal" or "blocks".
    """
    view = GraphView(module, graph)
    real = frozenset(name for name in names if not view.parameters[name].is_complex())
    site = Site(view, real, reduce, max_factor_dim, large_factors=large_factors)
    demoted: dict[str, str | None] = {}
    while True:
        matches = _match(site)
        misfits = _unclaimed(site, matches) or _different(matches)
        alone = {} if misfits else _with_and_without_bias(matches)
        if not misfits and not alone:
            break
        demoted |= misfits
        site = replace(site, open=site.open - demoted.keys(), alone=site.alone | alone.keys())
    found = {id(use): use for uses in matches.uses.values() for use in uses}
    uses = list(found.values())
    for name in (name for name in names if name not in matches.uses):
        use = generic_use(site, name, demoted.get(name), matches.refusals)
        uses += [] if use is None else [use]
    for name, reason in matches.refusals.items():
        log.debug("%s: not recorded as a layer, %s", name, reason)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    return sorted(uses, key=lambda use: order[use.node])


def _match(site: Site) -> _Matches:
    """Asks the rules about every call of the vocabulary; the first that takes it has it."""
    matches = _Matches()
    for node in site.view.graph.nodes:
        call = site.view.call(node)
        if call is None:
            continue
        if site.view.is_mapped(node):
            matches.refusals[node.name] = "it runs inside vmap, where a tap sees no cases"
            continue
        for rule in default_rules().asked(call.operation):
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
    """Parameters with a path that no rule took; the generic rule will say which."""
    result: dict[str, str | None] = {}
    for name, uses in matches.uses.items():
        claimed = {use.node for use in uses}
        consumers = [consumer.node for consumer in site.view.consumers(name)]
        if any(
            node.name not in claimed and not {end.name for end in site.view.ends(node)} <= claimed
            for node in consumers
        ):
            result[name] = None
    return result


def _different(matches: _Matches) -> dict[str, str | None]:
    """Parameters whose uses cannot be summed, with the reason."""
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
    """Weights that are used with one bias and with none or another: all uses go without."""
    return {
        name: None
        for name, uses in matches.uses.items()
        for group in pieces(name, uses) or ()
        if len({use.parameters for use in group}) > 1
    }


def _places(uses: Iterable[ParameterUse] | Sequence[ParameterUse]) -> str:
    return ", ".join(use.node for use in uses)
