"""Taps for a model that runs as it is written: calls are matched with known blocks on the spot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from kfac_fx.capture.placement import Placement
from kfac_fx.capture.view import Consumer, GraphView
from kfac_fx.ir import (
    CurvatureBlock,
    CurvatureGraph,
    FactorSpec,
    Layout,
    NodeRef,
    ParameterUse,
    Tap,
)
from kfac_fx.ops import STORE
from kfac_fx.passes.rules import Refusal, Site, default_rules
from kfac_fx.passes.rules.embedding import as_table
from kfac_fx.passes.rules.generic import as_rows, case_tap

log = logging.getLogger("kfac_fx")


class EagerTaps:
    """Finds the taps of one call at a time, for blocks that were found before.

    A call that does not fit the block of its parameters is left out and logged once.

    Args:
        module: owns the factor buffers.
        reduce, max_factor_dim, large_factors: as for ``find_uses``.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        reduce: bool,
        max_factor_dim: int,
        large_factors: str = "diagonal",
    ) -> None:
        self._store = module.get_submodule(STORE)
        curvature: CurvatureGraph = module.meta["kfac_fx"]
        blocks = curvature.blocks.values()
        self._blocks: dict[str, list[CurvatureBlock]] = {}
        for block in blocks:
            for name in block.parameters:
                self._blocks.setdefault(name, []).append(block)
        self._without_tap = {n for n, bs in self._blocks.items() if not all(b.tapped for b in bs)}
        self._uncovered = frozenset(curvature.unused)
        self._options = (reduce, max_factor_dim)
        self._large_factors = large_factors
        self._open = frozenset(self._blocks) - self._without_tap
        self._alone = frozenset(b.parameters[0] for b in blocks if len(b.parameters) == 1)
        self._told: set[str] = set()
        self._parameters = dict(module.named_parameters())
        scaled = (b for b in blocks if any(u.tap and u.tap.scale for u in b.uses))
        self.computed = frozenset(name for block in scaled for name in block.parameters)

    def of_copy(self, module: nn.Module) -> EagerTaps:
        """The same for a copy of the module."""
        twin = EagerTaps.__new__(EagerTaps)
        twin.__dict__.update(self.__dict__)
        twin._store = module.get_submodule(STORE)
        twin._parameters = dict(module.named_parameters())
        return twin

    def recording(self) -> bool:
        """Whether any buffer asks for statistics."""
        return any(buffer.requires_grad for buffer in self._store.buffers())

    def place(self, view: GraphView, node: fx.Node) -> list[Placement]:
        """The taps of a call that is about to run."""
        if view.reference(node) is not None or view.is_split(node):
            return []
        found: list[Placement] = []
        for use, block in self._uses(view, node):
            inner = use.parameters[0] in self.computed and not view.depends_on_data(node)
            if inner and use.tap is not None and use.tap.scale is None:
                continue  # a step of computing a weight that is recorded where it is used
            known = next((known for known in block.uses if _same_form(known, use)), None)
            if known is not None and use.tap is not None and _at_its_call(use, use.tap, node):
                record = self._record(use.tap, known, block)
                factors = self._factors(known, block) if use.tap.slots else ()
                found.append(Placement(use.tap, record, use.parameters, factors))
        return found

    def instead(self, plans: Sequence[Placement], values: Mapping[str, Tensor]) -> Any:
        """The operator in the place of a call, with the factors of all its taps."""
        tap = plans[0].tap
        factors: list[Tensor | None] = [None] * tap.slots
        for plan in plans:
            at = plan.tap.at
            factors[at : at + len(plan.factors)] = plan.factors
        operator = getattr(torch.ops.kfac_fx, tap.operator).default
        return operator(*_resolved(tap.tensors, values), factors, *tap.options)

    def _factors(self, use: ParameterUse, block: CurvatureBlock) -> list[Tensor]:
        slot = self._store.get_submodule(block.slot)
        return [getattr(slot, factor.name) for factor in use.factors]

    def missed(self, names: set[str], node: fx.Node) -> None:
        """Logs uses that are not in the blocks, once a parameter."""
        for name in sorted(names - self._without_tap - self._told):
            self._told.add(name)
            if name in self._uncovered:
                log.warning("%s has no block: the example inputs did not lead to its use", name)
            elif name in self._blocks:
                log.warning("%s: its use in %s is not in its block, left out", name, node.target)

    def _uses(
        self, view: GraphView, node: fx.Node
    ) -> Iterator[tuple[ParameterUse, CurvatureBlock]]:
        call = view.call(node)
        site = Site(view, self._open, *self._options, self._alone, self._large_factors)
        for rule in default_rules().asked(call.operation) if call is not None else ():
            assert call is not None
            answer = rule.match(call, site)
            if answer is None or isinstance(answer, Refusal):
                continue
            for use in answer if isinstance(answer, Sequence) else [answer]:
                if isinstance(use, Refusal):
                    continue
                for block in self._blocks[use.parameters[0]]:
                    if block.parameters == use.parameters:
                        yield use, block
            return
        yield from self._elementwise(view, node)

    def _elementwise(
        self, view: GraphView, node: fx.Node
    ) -> Iterator[tuple[ParameterUse, CurvatureBlock]]:
        for value in node.all_input_nodes:
            reference = view.reference(value)
            for block in self._blocks.get(reference.name, ()) if reference is not None else ():
                if block.kind == "elementwise" and reference is not None:
                    tap = case_tap(view, Consumer(node, value, reference.path))
                    if tap is not None:
                        rows = block.approximation == "kronecker"
                        tap = as_rows(tap) if rows else tap
                        yield replace(block.uses[0], node=node.name, tap=tap), block

    def _record(
        self, tap: Tap, use: ParameterUse, block: CurvatureBlock
    ) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        operator = getattr(torch.ops.kfac_fx, tap.operator).default

        def record(y: Tensor, values: Mapping[str, Tensor]) -> Tensor:
            factors: list[Tensor | None] = [*self._factors(use, block)]
            if tap.scale is not None:
                result = values[tap.scale.result.name]
                options = (self._parameters[use.parameters[0]], tap.scale.rows, tap.scale.entrywise)
                factors[1] = torch.ops.kfac_fx.row_scaled.default(factors[1], result, *options)
            if use.approximation == "kronecker" and len(factors) == 2:
                factors.append(None)
            before, behind = (_resolved(given, values) for given in (tap.tensors, tap.options))
            tapped: Tensor = operator(y, *before, *factors, *behind)
            return tapped

        return record


def _resolved(value: Any, values: Mapping[str, Tensor]) -> Any:
    """An argument of a tap with the tensors that its names stand for."""
    if isinstance(value, NodeRef):
        return values[value.name]
    return [_resolved(entry, values) for entry in value] if isinstance(value, tuple) else value


def placeable(uses: Sequence[ParameterUse], graph: fx.Graph) -> list[ParameterUse]:
    """The uses, with a weaker form where a tap cannot be placed at the call that it belongs to.

    A running model is seen one call at a time: what it does with a result later is not known.
    """
    nodes = {node.name: node for node in graph.nodes}
    uses = [
        as_table(use)
        if use.kind == "embedding" and use.tap and not _at_its_call(use, use.tap, nodes[use.node])
        else use
        for use in uses
    ]
    weak: dict[str, ParameterUse] = {}
    while True:
        new = [
            use
            for use in uses
            if weak.keys() & set(use.parameters)
            or (use.tap is not None and not _at_its_call(use, use.tap, nodes[use.node]))
        ]
        found = {name: use for use in new for name in use.parameters if name not in weak}
        if not found:
            break
        weak |= found
    kept = [use for use in uses if not weak.keys() & set(use.parameters)]
    return kept + [_weakened(use, name) for name, use in weak.items()]


def _weakened(use: ParameterUse, name: str) -> ParameterUse:
    shape = use.layouts[use.parameters.index(name)].start
    return ParameterUse(
        kind="generic",
        node=use.node,
        parameters=(name,),
        layouts=(Layout(shape),),
        factors=(FactorSpec("C", (prod(shape),), "gradient"),),
        approximation="diagonal",
        tap=None,
        path=use.path,
        reason="squared gradient of the batch; its tap needs what the model computes later",
    )


def _at_its_call(use: ParameterUse, tap: Tap, node: fx.Node) -> bool:
    known = {argument.name for argument in node.all_input_nodes}
    if tap.scale is not None and (tap.scale.result.name not in known or not tap.scale.whole):
        return False
    refs = {r.name for r in (*tap.tensors, *tap.options) if isinstance(r, NodeRef)}
    if tap.consumer is None:
        return tap.node == use.node and all(r in known or r.startswith(".") for r in refs)
    return tap.consumer == use.node and refs | {tap.node} <= known


def _same_form(known: ParameterUse, use: ParameterUse) -> bool:
    """Whether factors of one use take the statistics of the other; names and counts aside."""

    def shapes(one: ParameterUse) -> list[Any]:
        return [(f.shape, f.role, f.diagonal) for f in one.factors if f.role != "count"]

    return (
        known.kind == use.kind
        and known.layouts == use.layouts
        and known.approximation == use.approximation
        and shapes(known) == shapes(use)
    )
