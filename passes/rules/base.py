"""What a rule gets, what it answers, and what several rules share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from torch import fx

from kfac_fx.capture.dialect import Call
from kfac_fx.capture.graph_view import GraphView
from kfac_fx.capture.layer_calls import Member
from kfac_fx.capture.parameter_paths import Reference
from kfac_fx.config import MAX_FACTOR_DIM, MAX_FULL_DIM
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import Approximation, FactorSide, FactorSpec, NodeRef, ParameterUse, Role, Tap


@dataclass(frozen=True)
class Refusal:
    """Why a rule does not take a call that it looked at."""

    reason: str


Answer = ParameterUse | Sequence[ParameterUse | Refusal] | Refusal | None


@dataclass(frozen=True)
class Site:
    """The graph around a call.

    Attributes:
        view: the graph.
        open: parameters that rules may still claim.
        reduce: whether positions that share a weight are reduced rather than expanded.
        max_factor_dim: sides of Kronecker factors above it become diagonals, or are cut.
        large_factors: "diagonal" or "blocks": what becomes of such sides of dense uses.
        alone: weights that are used without their bias elsewhere, so that no use may take both.
    """

    view: GraphView
    open: frozenset[str]
    reduce: bool = False
    max_factor_dim: int = MAX_FACTOR_DIM
    alone: frozenset[str] = frozenset()
    large_factors: str = "diagonal"

    def parameter(self, value: Any) -> Reference | None:
        """The open parameter behind an argument, or None."""
        reference = self.view.reference(value)
        return reference if reference is not None and reference.name in self.open else None


ONE_CASE = "its input is the same for all cases: the batch counts as one case"
"""The reason of a use whose derivative comes summed over the cases."""


ROWS_AS_CASES = "its input is the same for all cases: its rows count as cases"


def joined(*reasons: str | None) -> str | None:
    """The reasons that there are, in one."""
    return "; ".join(reason for reason in reasons if reason) or None


class Rule(Protocol):
    """Recognises one kind of parameter use; one file each."""

    kind: str
    operations: frozenset[str]

    def match(self, call: Call, site: Site) -> Answer:
        """The uses, the reason why they are refused, or None where no parameter is involved."""


def _side(
    site: Site, side: FactorSide, role: Role, dim: int, lead: tuple[int, ...], cuttable: bool
) -> FactorSpec:
    if dim > site.max_factor_dim:
        if cuttable and not lead and site.large_factors == "blocks":
            count = -(-dim // site.max_factor_dim)
            size = -(-dim // count)
            return FactorSpec(side, (count, size, size), role, cut=dim)
        return FactorSpec(side, (*lead, dim), role, diagonal=True)
    return FactorSpec(side, (*lead, dim, dim), role)


def gradient_side(site: Site, outputs: int, lead: tuple[int, ...] = ()) -> FactorSpec:
    """G over ``outputs``; a diagonal above ``max_factor_dim``."""
    return _side(site, "G", "gradient", outputs, lead, cuttable=False)


def kronecker_factors(
    site: Site,
    inputs: int,
    outputs: int,
    *,
    bias: bool,
    lead: tuple[int, ...] = (),
    cuttable: bool = False,
) -> tuple[FactorSpec, ...]:
    """A over ``inputs`` (and the homogeneous coordinate) and G over ``outputs``.

    Args:
        lead: (groups,) where there is one block a group.
        cuttable: whether the tap can record the sub-blocks of a side that is too large.
    """
    return (
        _side(site, "A", "input", inputs + bias, lead, cuttable),
        _side(site, "G", "gradient", outputs, lead, cuttable),
    )


def too_wide(site: Site, factors: Collection[FactorSpec]) -> str | None:
    """The reason why a side that could be a matrix is not."""
    limit = f"above max_factor_dim={site.max_factor_dim}"
    wide = [f"{f.name} of side {f.shape[-1]}" for f in factors if f.diagonal]
    reasons = [f"{' and '.join(wide)} {limit}, kept as a diagonal"] if wide else []
    reasons += [
        f"{f.name} of side {f.cut} {limit}, cut into {f.shape[0]} sub-blocks of {f.shape[-1]}"
        for f in factors
        if f.cut
    ]
    return "; ".join(reasons) or None


def covariance_factor(dim: int, count: int = 1) -> tuple[FactorSpec, Approximation]:
    """C for ``count`` gradients of ``dim`` entries a case, full where it is small enough."""
    if count * dim <= MAX_FULL_DIM:
        return FactorSpec("C", (count * dim, count * dim), "gradient"), "full"
    if count == 1:
        return FactorSpec("C", (dim,), "gradient"), "diagonal"
    return FactorSpec("C", (dim, count, count), "gradient"), "pairs"


def too_large(dim: int, count: int = 1) -> str | None:
    """The reason for a weaker form where the full covariance is too large."""
    if count * dim <= MAX_FULL_DIM:
        return None
    return f"a full covariance of side {count * dim} exceeds {MAX_FULL_DIM}"


def shift_use(call: Call, site: Site, bias: Reference, channels: tuple[int, ...]) -> ParameterUse:
    """A bias without its weight: the covariance of the per-case sums of g."""
    dim = prod(bias.layout.shape)
    factor, approximation = covariance_factor(dim)
    options = ("none", (), channels, False, 0.0, False, True)
    return ParameterUse(
        kind="shift",
        node=call.node.name,
        parameters=(bias.name,),
        layouts=(bias.layout,),
        factors=(factor,),
        approximation=approximation,
        tap=Tap("scale_shift", call.node.name, (None, None, None), options),
        path=(*bias.path, call.operation),
        reason=joined(too_large(dim), None if site.view.is_per_case(call.node) else ROWS_AS_CASES),
    )


BROADCASTING = frozenset({"add", "sub", "mul", "div", "addcmul"})


def broadcast_with(view: GraphView, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operand that depends on the case, and the operation, where ``node`` is broadcast over it.

    None unless that is the node's only use.
    """
    if len(node.users) != 1:
        return None
    consumer = next(iter(node.users))
    call = view.call(consumer)
    if call is None or call.operation not in BROADCASTING:
        return None
    if str(consumer.target).endswith("_") and call.get("input") is node:
        return None  # in place on the node itself
    operands = [call.get(name) for name in ("input", "other", "tensor1", "tensor2")]
    others = [arg for arg in operands if view.depends_on_data(arg)]
    if operands.count(node) != 1 or not others:
        return None
    return others[0], consumer


def expanded_over_cases(view: GraphView, node: fx.Node) -> bool:
    """Whether the node's only use is an expansion whose first size is computed: the cases."""
    if len(node.users) != 1:
        return False
    call = view.call(next(iter(node.users)))
    if call is None or call.operation != "expand":
        return False
    sizes = call.get("shape")
    return call.get("other") is not None or bool(sizes and isinstance(sizes[0], fx.Node))


def node_ref(value: Any) -> Any:
    """An argument of a tap: nodes and module members by name, plain values as they are."""
    if isinstance(value, (list, tuple)) and not isinstance(value, Member):
        return tuple(node_ref(entry) for entry in value)
    if isinstance(value, fx.Node):
        return NodeRef(value.name)
    if isinstance(value, Member):
        return NodeRef("." + value.path)
    return value


def plain(layout: Layout) -> bool:
    """Whether the parameter is seen in its own shape."""
    return not layout.steps
