"""Taps for a model that runs as it is written: calls are matched with known blocks on the spot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from kfac_fx.capture.graph_view import Consumer, GraphView
from kfac_fx.eager.recordable_uses import at_its_call
from kfac_fx.eager.torch_calls import Value
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph
from kfac_fx.ir.use import FactorSpec, NodeRef, ParameterUse, Role, Tap
from kfac_fx.ops.case_first import WITHIN, cases_back, cases_first, dims_of, each_row
from kfac_fx.ops.case_share import not_cases, shared
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.passes.find_cases import GrowingCases
from kfac_fx.passes.rules.generic import as_rows, case_tap

if TYPE_CHECKING:
    from kfac_fx.capture.captured_module import UsesOfCall

log = logging.getLogger("kfac_fx")

Argument = Any
"""An argument of an operator: a tensor, a name that stands for one, a number, a tuple of those."""


class Placement(NamedTuple):
    """A tap of a call that is about to run.

    Attributes:
        tap: says which tensor is tapped.
        record: a function from that tensor, and all tensors of the call by node, to the tensor in
            its place.
        parameters: whose use is recorded.
        factors: what an operator that runs instead of the call is to fill.
    """

    tap: Tap
    record: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    parameters: tuple[str, ...]
    factors: Sequence[Tensor] = ()


class EagerTaps:
    """Find the taps of one call at a time, for blocks that were found before.

    A call that does not fit the block of its parameters is left out and logged once.

    Args:
        module: owns the factor buffers and, in its meta, the curvature graph.
        uses_of_call: finds the uses in a call by the rules and options that made the blocks.

    Attributes:
        computed: parameters that are recorded where a weight computed from them is used.
    """

    def __init__(self, module: fx.GraphModule, uses_of_call: UsesOfCall) -> None:
        self._store = module.get_submodule(STORE)
        self._uses_of_call = uses_of_call
        curvature: CurvatureGraph = module.meta["kfac_fx"]
        blocks = curvature.blocks.values()
        self._blocks: dict[str, list[CurvatureBlock]] = {}
        for block in blocks:
            for name in block.parameters:
                self._blocks.setdefault(name, []).append(block)
        self._without_tap = {n for n, bs in self._blocks.items() if not all(b.tapped for b in bs)}
        self._uncovered = frozenset(curvature.unused)
        # Rules may claim what has a block with a tap; other uses of these are reported as missed.
        self._open = frozenset(self._blocks) - self._without_tap
        self._alone = frozenset(b.parameters[0] for b in blocks if len(b.parameters) == 1)
        self._told: set[str] = set()
        scaled = (b for b in blocks if any(u.tap and u.tap.scale for u in b.uses))
        self.computed = frozenset(name for block in scaled for name in block.parameters)

    def of_copy(self, module: fx.GraphModule) -> EagerTaps:
        """Return the taps of a deep copy of the module, which has buffers of its own."""
        return EagerTaps(module, self._uses_of_call)

    def recording(self) -> bool:
        """Tell whether any buffer asks for statistics."""
        return any(buffer.requires_grad for buffer in self._store.buffers())

    def place(self, view: GraphView, node: fx.Node, cases: GrowingCases) -> list[Placement]:
        """Return the taps of a call that is about to run.

        Args:
            view: reads the graph of the calls so far.
            node: the call.
            cases: knows where the cases are in that graph.
        """
        if view.reference(node) is not None or view.is_split(node):
            return []
        found: list[Placement] = []
        for use, block in self._uses(view, node):
            inner = use.parameters[0] in self.computed and not view.depends_on_data(node)
            if inner and use.tap is not None and use.tap.scale is None:
                continue  # a step of computing a weight that is recorded where it is used
            # The buffers have the form of the block that the example showed. A use of another form
            # (a layer applied to other dimensions) has no place in them and is left out.
            known = next((known for known in block.uses if _same_form(known, use)), None)
            if known is not None and use.tap is not None and at_its_call(use, use.tap, node):
                tap = cases.placed(use, node).tap or use.tap
                count = None if tap.cases is None else cases.count(tap.cases)
                # A pass of the library's own runs the model with copies for its parameters, and
                # those are what the weights of this run are computed from.
                source = view.parameters[known.parameters[0]]
                record = self._record(tap, known, block, source, count, cases)
                factors = self._factors(known, block) if tap.slots else ()
                found.append(Placement(tap, record, use.parameters, factors))
        return found

    def instead(self, plans: Sequence[Placement], values: Mapping[str, Tensor]) -> Value:
        """Run the operator that takes the place of a call, with the factors of all its taps.

        Args:
            plans: the taps of one call, all of one operator.
            values: the tensors of the call by name of node.
        """
        tap = plans[0].tap
        factors: list[Tensor | None] = [None] * tap.slots
        for plan in plans:
            at = plan.tap.at
            factors[at : at + len(plan.factors)] = plan.factors
        operator = getattr(torch.ops.kfac_fx, tap.operator).default
        return operator(*_resolved(tap.tensors, values), factors, *tap.options)

    def missed(self, names: set[str], node: fx.Node) -> None:
        """Log uses of parameters that a call has and no tap records, once a parameter."""
        for name in sorted(names - self._without_tap - self._told):
            self._told.add(name)
            if name in self._uncovered:
                log.warning("%s has no block: the example inputs did not lead to its use", name)
            elif name in self._blocks:
                log.warning("%s: its use in %s is not in its block, left out", name, node.target)

    def _factors(self, use: ParameterUse, block: CurvatureBlock) -> list[Tensor]:
        slot = self._store.get_submodule(block.slot)
        return [getattr(slot, factor.name) for factor in use.factors]

    def _uses(
        self, view: GraphView, node: fx.Node
    ) -> Iterator[tuple[ParameterUse, CurvatureBlock]]:
        """Yield the uses in a call with the blocks of the same parameters."""
        uses = self._uses_of_call(view, node, self._open, self._alone)
        if uses is None:
            yield from self._elementwise(view, node)
            return
        for use in uses:
            for block in self._blocks[use.parameters[0]]:
                if block.parameters == use.parameters:
                    yield use, block

    def _elementwise(
        self, view: GraphView, node: fx.Node
    ) -> Iterator[tuple[ParameterUse, CurvatureBlock]]:
        """Yield uses of parameters that meet the data entry by entry, which no rule claims."""
        for value in node.all_input_nodes:
            reference = view.reference(value)
            for block in self._blocks.get(reference.name, ()) if reference is not None else ():
                if block.kind == "elementwise" and reference is not None:
                    tap = case_tap(view, Consumer(node, value, reference.path))
                    if tap is not None:
                        rows = block.products == 1
                        tap = as_rows(tap) if rows else tap
                        yield replace(block.uses[0], node=node.name, tap=tap), block

    def _record(
        self,
        tap: Tap,
        use: ParameterUse,
        block: CurvatureBlock,
        source: Tensor,
        count: int | None,
        cases: GrowingCases,
    ) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        """Return the function that puts a tensor's tap in its place.

        Args:
            tap: the tap.
            use: the one that the example showed.
            block: owns the buffers.
            source: the parameter, as the model holds it in this run.
            count: the number of cases where they are folded with positions.
            cases: knows the first use of each block.
        """
        operator = getattr(torch.ops.kfac_fx, tap.operator).default

        def record(y: Tensor, values: Mapping[str, Tensor]) -> Tensor:
            factors: list[Tensor | None] = [*self._factors(use, block)]
            if tap.scale is not None:
                factors[1] = torch.ops.kfac_fx.row_scaled.default(
                    factors[1],
                    values[tap.scale.result.name],
                    source,
                    tap.scale.rows,
                    tap.scale.entrywise,
                )
            if use.products == 1 and len(factors) == 2:
                factors.append(None)  # no positions to count
            tensors = _resolved(tap.tensors, values)
            options = _resolved(tap.options, values)
            if tap.cases is None:
                share(tensors, factors)
                tapped: Tensor = operator(y, *tensors, *factors, *options)
                return tapped
            dim = tap.cases.dim
            # Only its first two sizes are read.
            like = None if count is None else y.new_empty(count, count, 0)
            if dim == WITHIN:
                tapped = operator(y, *tensors, like, *factors, *options)
                return tapped
            rows = tensors[:1]
            seen = y if tap.consumer is None else dims_of(y, rows[0])
            tensors = [*(cases_first(t, dim, like) for t in rows), *tensors[1:]]
            share(tensors, factors)
            tapped = operator(cases_first(seen, dim, like), *tensors, *factors, *options)
            folded = like is not None and tap.consumer is not None
            return each_row(tapped, rows[0]) if folded else cases_back(tapped, dim, y)

        def share(tensors: Sequence[Value], factors: list[Tensor | None]) -> None:
            others = not_cases(tap.operator, tap.options) if use.products == 1 else None
            if others is None or any(t is not None for t in tensors[1:]):
                return
            key = block.name, use.factors[0].form
            first = cases.first_use(key, tensors[0], others)
            for place in (0, -1) if use.factors[-1].role == "count" else ():
                factor = factors[place]
                assert factor is not None
                factors[place] = shared(factor, tensors[0], others, *first)

        return record


def _resolved(value: Argument, values: Mapping[str, Tensor]) -> Argument:
    """Return an argument of a tap with the tensors that its names stand for."""
    if isinstance(value, NodeRef):
        return values[value.name]
    return [_resolved(entry, values) for entry in value] if isinstance(value, tuple) else value


def _same_form(known: ParameterUse, use: ParameterUse) -> bool:
    """Tell whether factors of one use take the statistics of the other; names aside."""
    return (
        known.kind == use.kind
        and known.layouts == use.layouts
        and known.approximation == use.approximation
        and _shapes(known.factors) == _shapes(use.factors)
    )


def _shapes(factors: Sequence[FactorSpec]) -> list[tuple[tuple[int, ...], Role, bool]]:
    """Return what tells factors apart; counts are left out, as only blocks of graphs have them."""
    return [(f.shape, f.role, f.diagonal) for f in factors if f.role != "count"]
