"""Finds every parameter use of a graph and gathers them into curvature blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from torch import fx, nn

from kfac_fx.capture.view import GraphView
from kfac_fx.ir import CurvatureBlock, FactorSpec, ParameterUse
from kfac_fx.passes.rules import RULES, Refusal, Site, generic_use


def find_uses(
    module: nn.Module, graph: fx.Graph, names: Collection[str], *, reduce: bool = False
) -> list[ParameterUse]:
    """The uses of the named parameters, in the graph's order; each is claimed exactly once.

    A parameter with a path that no rule claims, or whose uses do not fit together, falls to the
    generic rule as a whole. Parameters that the outputs do not depend on have no use.

    Args:
        names: parameters to cover (canonical names).
        reduce: positions that share a weight are reduced rather than expanded.
    """
    view = GraphView(module, graph)
    demoted: dict[str, str | None] = {}
    while True:
        site = Site(view, frozenset(names) - demoted.keys(), reduce)
        uses, refusals = _match(site)
        misfits = _misfits(site, uses, refusals)
        if not misfits:
            break
        demoted |= misfits
    for name in names:
        if name in demoted or not any(name in use.parameters for use in uses):
            use = generic_use(view, name, demoted.get(name))
            if use is not None:
                uses.append(use)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    return sorted(uses, key=lambda use: order[use.node])


def _match(site: Site) -> tuple[list[ParameterUse], dict[str, str]]:
    """What the rules take, and by node name why they refuse the rest."""
    uses: list[ParameterUse] = []
    refusals: dict[str, str] = {}
    for node in site.view.graph.nodes:
        call = site.view.call(node)
        for rule in RULES if call is not None else ():
            assert call is not None
            if call.operation in rule.operations:
                answer = rule.match(call, site)
                if isinstance(answer, ParameterUse):
                    uses.append(answer)
                elif isinstance(answer, Refusal):
                    refusals[node.name] = answer.reason
    return uses, refusals


def _misfits(
    site: Site, uses: list[ParameterUse], refusals: Mapping[str, str]
) -> dict[str, str | None]:
    """Parameters that rules took in part only, with the reason."""
    result: dict[str, str | None] = {}
    by_name: dict[str, list[ParameterUse]] = {}
    for use in uses:
        for name in use.parameters:
            by_name.setdefault(name, []).append(use)
    for name in site.open:
        claimed = {use.node for use in by_name.get(name, ())}
        ends = [consumer.node for consumer in site.view.consumers(name)]
        for node in ends:
            if node.name not in claimed:
                result[name] = refusals.get(node.name)
                break
    if result:
        return result
    for name, found in by_name.items():
        if len({(u.kind, u.parameters, u.layouts, u.factors) for u in found}) > 1:
            places = ", ".join(use.node for use in found)
            result[name] = f"its uses in {places} have different forms"
    return result


def gather_blocks(uses: Iterable[ParameterUse], graph: fx.Graph) -> dict[str, CurvatureBlock]:
    """One block for each set of parameters; uses of the same parameters are summed."""
    by_parameters: dict[tuple[str, ...], list[ParameterUse]] = {}
    for use in uses:
        by_parameters.setdefault(use.parameters, []).append(use)
    names = _block_names(by_parameters)
    nodes = {node.name: node for node in graph.nodes}
    blocks: dict[str, CurvatureBlock] = {}
    slots: set[str] = set()
    for parameters, found in by_parameters.items():
        first, name = found[0], names[parameters]
        slot = _unique(re.sub(r"\W", "_", name), slots)
        factors = first.factors
        if len(found) > 1 and first.approximation == "kronecker":
            factors = (*factors, FactorSpec("positions", (), "count"))
        blocks[name] = CurvatureBlock(
            name=name,
            slot=slot,
            kind=first.kind,
            parameters=parameters,
            layouts=first.layouts,
            factors=factors,
            approximation=first.approximation,
            uses=tuple(replace(use, factors=factors) for use in found),
            source=_source(nodes[first.node]),
            reason=first.reason or _summed_reason(found),
        )
    return blocks


def _summed_reason(uses: list[ParameterUse]) -> str | None:
    """Kronecker factors of several uses add up by design; covariances lose what lies between."""
    if len(uses) == 1 or uses[0].approximation == "kronecker":
        return None
    return f"its {len(uses)} uses are taken as uncorrelated"


def _block_names(groups: Collection[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The module's path where the block is all that the module's weight and bias are."""
    names: dict[tuple[str, ...], str] = {}
    for parameters in groups:
        owners = {name.rpartition(".")[0] for name in parameters}
        leaves = {name.rpartition(".")[2] for name in parameters}
        whole = len(owners) == 1 and "weight" in leaves and leaves <= {"weight", "bias"}
        owner = next(iter(owners))
        names[parameters] = owner if whole and owner else parameters[0]
    counts = list(names.values())
    return {
        parameters: name if counts.count(name) == 1 else parameters[0]
        for parameters, name in names.items()
    }


def _unique(slot: str, taken: set[str]) -> str:
    while slot in taken:
        slot += "_"
    taken.add(slot)
    return slot


def _source(node: fx.Node) -> str | None:
    """File and line of the user's code that made the node."""
    trace = node.meta.get("stack_trace") or node.stack_trace
    places = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    own = [place for place in places if "/torch/" not in place[0]] or places
    return ":".join(own[-1]) if own else None
