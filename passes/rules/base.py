"""The site that a rule gets, the answers that it gives, and what several rules share.

The steps for a new kind of layer are in docs/guides/add_a_layer_kind.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import fx, nn

from kfac_fx.capture.dialect import Call, add_operation
from kfac_fx.capture.graph_view import GraphView
from kfac_fx.capture.layer_calls import TRANSLATIONS, Member, ModuleCall
from kfac_fx.capture.parameter_paths import Reference
from kfac_fx.config import DEFAULT_LIMITS, MAX_FULL_DIM, SideLimits
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.use import (
    Approximation,
    Argument,
    FactorSide,
    FactorSpec,
    NodeRef,
    ParameterUse,
    Role,
    Scale,
    Tap,
)
from kfac_fx.ops.kronecker import ShiftOptions
from kfac_fx.ops.options import TapOptions
from kfac_fx.passes.rules.row_scaling import counting_dims, measure_scaling

GraphValue: TypeAlias = Any
"""An argument of a call in the graph: a node, a member of the module, or a plain value."""

Target: TypeAlias = Any
"""What a node calls: a function, an operator, or a method's name. Only its hash is used."""


@dataclass(frozen=True)
class Refusal:
    """Why a rule does not take a call that it looked at; the report repeats it.

    Attributes:
        reason: half a sentence, "<operation>: <what is in the way>".
    """

    reason: str


Answer = ParameterUse | Sequence[ParameterUse | Refusal] | Refusal | None


@dataclass(frozen=True)
class Site:
    """The graph around a call, and the options that shape its uses.

    Attributes:
        view: the graph.
        open: parameters that rules may still claim.
        reduce: whether positions that share a weight are reduced rather than expanded.
        limits: the sizes above which sides of Kronecker factors are cut or become diagonals.
        alone: weights that are used without their bias elsewhere, so that no use may take both.
        large_factors: "diagonal" or "blocks": what becomes of sides above the last of the limits.
    """

    view: GraphView
    open: frozenset[str]
    reduce: bool = False
    limits: SideLimits = DEFAULT_LIMITS
    alone: frozenset[str] = frozenset()
    large_factors: str = "diagonal"

    def parameter(self, value: GraphValue) -> Reference | None:
        """Return the open parameter that an argument is, perhaps through views; else None."""
        reference = self.view.reference(value)
        return reference if reference is not None and reference.name in self.open else None

    def weight(self, value: GraphValue) -> Reference | None:
        """Return the open parameter that an argument is, or the one that it is computed from."""
        return self.parameter(value) or self.view.derived(value, self.open)

    def apart(self, weight: Reference) -> bool:
        """Tell whether a bias beside the weight needs a block of its own.

        A derived weight's G is scaled by rows, which its bias's is not; and a weight that is used
        without the bias elsewhere has statistics that the homogeneous coordinate has no part in.
        """
        return weight.derived is not None or weight.name in self.alone


ONE_CASE = "its input is the same for all cases: the batch counts as one case"
"""The reason of a use whose derivative comes summed over the cases."""


ROWS_AS_CASES = "its input is the same for all cases: its rows count as cases"


def joined(*reasons: str | None) -> str | None:
    """Return the reasons that there are, in one."""
    return "; ".join(reason for reason in reasons if reason) or None


class Rule(Protocol):
    """Recognises one kind of parameter use; one file each.

    Attributes:
        kind: name of the kind, which blocks and reports have.
        operations: words of the vocabulary (``kfac_fx.capture.dialect``) that it is asked about.
    """

    kind: str
    operations: frozenset[str]

    def match(self, call: Call, site: Site) -> Answer:
        """Return the uses, the reason why they are refused, or None where it has no part."""


@dataclass(frozen=True)
class Rules:
    """A table of rules, for ``rules=`` of ``kfac_fx.transform``.

    Attributes:
        table: in the order in which they are asked; the first that takes a call has it.
    """

    table: tuple[Rule, ...]

    def asked(self, operation: str) -> Iterator[Rule]:
        """Yield the rules that look at an operation, in the order in which they are asked."""
        return (rule for rule in self.table if operation in rule.operations)

    def before(self, rule: Rule) -> Rules:
        """Return the same rules with one more, which is asked before the others."""
        return Rules((rule, *self.table))


BUILT_IN: list[Rule] = []
"""One instance of every class that ``layer_kind`` decorates; importing its file adds it."""

LayerCall: TypeAlias = Callable[[Any, Callable[[str], Any]], ModuleCall]
"""(layer, member's name -> member or None) -> the operation that the layer runs."""

_RuleClass = TypeVar("_RuleClass", bound=Callable[[], Rule])

REGISTERED: list[Rule] = []
"""Rules that ``register_rule`` added, the last one first."""


def default_rules() -> Rules:
    """Return the rules that an analysis asks unless it is given others.

    Those that ``register_rule`` added come first, the last one before the others.
    """
    # Made anew each time, so that a table that somebody holds does not change under them.
    return Rules((*REGISTERED, *BUILT_IN))


def layer_kind(
    functions: Mapping[Target, str] = MappingProxyType({}),
    modules: Mapping[type[nn.Module], LayerCall] = MappingProxyType({}),
) -> Callable[[_RuleClass], _RuleClass]:
    """Return a decorator that makes a class of this folder one of the library's rules.

    Most functions and layers of torch are known to ``kfac_fx.capture`` already. A kind brings the
    words for what is its own alone, so that it is one file here and one of ``kfac_fx.ops``.

    Args:
        functions: what the vocabulary does not know yet: a function, operator or method's name, and
            the operation that it stands for with the names of its arguments in order:
            ``{F.bilinear: "bilinear input other weight bias"}``.
        modules: layers of torch.nn that a trace keeps as one call, and what makes that call an
            operation: given the layer, and what names one of its members (None where it has none).
    """

    def decorate(made: _RuleClass) -> _RuleClass:
        for target, words in functions.items():
            add_operation(target, words)
        TRANSLATIONS.update(modules)
        BUILT_IN.append(made())
        return made

    return decorate


def _side_factor(
    site: Site, side: FactorSide, role: Role, dim: int, lead: tuple[int, ...], cuttable: bool
) -> FactorSpec:
    # Above the limit a matrix would take more memory and time than it is worth: a refresh is cubic
    # in the side. Sub-blocks need a tap that can cut its rows, which batches of blocks have not.
    limits, blocks = site.limits, site.large_factors == "blocks"
    if cuttable and not lead and dim > limits.whole and (blocks or dim <= limits.matrix):
        count = -(-dim // limits.sub_block)
        size = -(-dim // count)
        return FactorSpec(side, (count, size, size), role, cut=dim)
    if dim > limits.matrix:
        return FactorSpec(side, (*lead, dim), role, diagonal=True)
    return FactorSpec(side, (*lead, dim, dim), role)


def gradient_side(site: Site, outputs: int, *, cuttable: bool = False) -> FactorSpec:
    """Return G over ``outputs``; a diagonal above the last of the limits, or cut."""
    return _side_factor(site, "G", "gradient", outputs, (), cuttable)


def kronecker_factors(
    site: Site,
    inputs: int,
    outputs: int,
    *,
    bias: bool,
    lead: tuple[int, ...] = (),
    cuttable: bool = False,
) -> tuple[FactorSpec, ...]:
    """Return A over ``inputs`` (and the homogeneous coordinate) and G over ``outputs``.

    Args:
        site: has the limit of a side, and what becomes of longer ones.
        inputs: columns of the weight's matrix.
        outputs: its rows.
        bias: whether the homogeneous coordinate is an input too.
        lead: (groups,) where there is one block a group.
        cuttable: whether the tap can record the sub-blocks of a side that is too large.
    """
    return (
        _side_factor(site, "A", "input", inputs + bias, lead, cuttable),
        _side_factor(site, "G", "gradient", outputs, lead, cuttable),
    )


def too_wide(site: Site, factors: Collection[FactorSpec]) -> str | None:
    """Return the reason why a side that could be a matrix is not, None where all are."""
    limits = site.limits
    limit = f"above max_factor_dim={limits.matrix}"
    # The library's own choice says how to undo it: nobody gave the number that is exceeded.
    own = limits.whole < limits.matrix
    cut, undone = (f"above {limits.whole}", f"; {limit[6:]} keeps it whole") if own else (limit, "")
    wide = [f"{f.name} of side {f.shape[-1]}" for f in factors if f.diagonal]
    reasons = [f"{' and '.join(wide)} {limit}, kept as a diagonal"] if wide else []
    reasons += [
        f"{f.name} of side {f.cut} {cut}, cut into {f.shape[0]} sub-blocks of {f.shape[-1]}{undone}"
        for f in factors
        if f.cut
    ]
    return "; ".join(reasons) or None


def covariance_factor(dim: int, count: int = 1) -> tuple[FactorSpec, Approximation]:
    """Return C for ``count`` gradients of ``dim`` entries a case, and its structure.

    It is full where it is small enough. Else several gradients keep what is between those of one
    entry (scale and shift of a channel), and a single one keeps its diagonal.
    """
    # Few parameters, such as those of normalisation layers, afford the whole covariance.
    if count * dim <= MAX_FULL_DIM:
        return FactorSpec("C", (count * dim, count * dim), "gradient"), "full"
    if count == 1:
        return FactorSpec("C", (dim,), "gradient"), "diagonal"
    return FactorSpec("C", (dim, count, count), "gradient"), "pairs"


def too_large(dim: int, count: int = 1) -> str | None:
    """Return the reason for a weaker form where the full covariance is too large."""
    if count * dim <= MAX_FULL_DIM:
        return None
    return f"a full covariance of side {count * dim} exceeds {MAX_FULL_DIM}"


def kronecker_use(
    call: Call,
    site: Site,
    kind: str,
    *,
    weight: Reference,
    matrix: Layout,
    bias: Reference | None,
    channels: tuple[int, ...],
    operator: str,
    tensors: Sequence[Argument],
    options: Callable[[bool], TapOptions],
    cuttable: bool = False,
    one_case: bool = False,
) -> list[ParameterUse | Refusal]:
    """Return the use of a weight as a matrix, with its bias if it has one, as one block A (x) G.

    Args:
        call: what uses the weight.
        site: the graph around it.
        kind: the rule's.
        weight: the parameter, or the one that the weight is computed from.
        matrix: the views from its shape to [out, in], or [groups, out, in] for independent
            matrices.
        bias: what is added to the outputs. It gets a block of its own where it cannot share the
            weight's (``Site.apart``), or is not one number an output.
        channels: dimensions of the call's result that hold the outputs.
        operator: name of the tap.
        tensors: what the tap saves.
        options: makes the tap's options from whether the block has a bias.
        cuttable: whether the tap can record the sub-blocks of a side that is too large.
        one_case: whether the inputs are the same for all cases, which then count as one.
    """
    lead, (outputs, inputs) = matrix.shape[:-2], matrix.shape[-2:]
    # A bias in the weight's block is one more input that is always 1, the homogeneous coordinate:
    # exact at no cost, and the block couples the two.
    apart: list[ParameterUse] = []
    if bias is not None and (site.apart(weight) or prod(bias.layout.shape) != prod(lead) * outputs):
        apart, bias = [shift_use(call, site, bias, channels)], None
    held = [weight] if bias is None else [weight, bias]
    biased = bias is not None
    factors = kronecker_factors(site, inputs, outputs, bias=biased, lead=lead, cuttable=cuttable)
    use = ParameterUse(
        kind=kind,
        node=call.node.name,
        parameters=tuple(parameter.name for parameter in held),
        layouts=(matrix, *(p.layout.reshape((*lead, outputs)) for p in held[1:])),
        factors=factors,
        approximation="kronecker",
        tap=Tap(operator, call.node.name, tuple(tensors), options(biased).to_args()),
        path=(*weight.path, call.operation),
        reason=joined(too_wide(site, factors), ONE_CASE if one_case else None),
    )
    return [through_derivation(use, weight), *apart]


def shift_use(call: Call, site: Site, bias: Reference, channels: tuple[int, ...]) -> ParameterUse:
    """Return the use of a bias without its weight: the covariance of the per-case sums of g.

    Args:
        call: what adds the bias.
        site: the graph around it.
        bias: the parameter.
        channels: dimensions of the call's result that the bias is along.
    """
    dim = prod(bias.layout.shape)
    factor, approximation = covariance_factor(dim)
    return ParameterUse(
        kind="shift",
        node=call.node.name,
        parameters=(bias.name,),
        layouts=(bias.layout,),
        factors=(factor,),
        approximation=approximation,
        tap=Tap("shift", call.node.name, (), ShiftOptions(channels).to_args()),
        path=(*bias.path, call.operation),
        reason=joined(too_large(dim), None if site.view.is_per_case(call.node) else ROWS_AS_CASES),
    )


def through_derivation(use: ParameterUse, weight: Reference) -> ParameterUse | Refusal:
    """Return the use of a weight as a use of the parameter that it is computed from.

    The parameter V gets the factors of the computed weight W with G scaled, row by row, by what
    stands between the two (docs/explanation/mathematics.md, section 4). Where W_o = s_o V_o with s
    free of V that is exact. Elsewhere (weight normalisation, standardisation) the rest of the
    Jacobian is left out, and the block says so.
    """
    derivation = weight.derived
    if derivation is None or use.tap is None:
        return use
    way = " -> ".join(weight.path)
    # The use was found for the computed weight as if that were the parameter; what changes is G.
    rows = counting_dims(use.layouts[0], derivation.seen)
    if rows is None:
        return Refusal(f"{way}: its rows are mixed on the way")
    measured = measure_scaling(derivation, rows)
    if measured is None:
        return Refusal(f"{way}: what it goes through does more than scale its rows")
    reason = None
    if measured.share is not None:
        part = f"{measured.share:.1%} of its Jacobian"
        part += " where that is not zero" * measured.entrywise
        reason = f"{way}: taken as a factor for each row, {part}"
    scale = Scale(
        NodeRef(derivation.result.name),
        NodeRef(derivation.source.name),
        rows,
        measured.entrywise,
        whole=not derivation.seen.steps,
    )
    return replace(use, tap=replace(use.tap, scale=scale), reason=joined(use.reason, reason))


BROADCASTING = frozenset({"add", "sub", "mul", "div", "addcmul"})


def broadcast_with(view: GraphView, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the operand that depends on the case, and the operation, where ``node`` is broadcast.

    None unless that is the node's only use.
    """
    # A value that is read twice would be tapped for both readers, and recorded with the sum of
    # their derivatives, which per-case gradients are not.
    if len(node.users) != 1:
        return None
    consumer = next(iter(node.users))
    call = view.call(consumer)
    if call is None or call.operation not in BROADCASTING:
        return None
    if str(consumer.target).endswith("_") and call.get("input") is node:
        return None  # in place on the node itself
    operands = [call.get(name) for name in ("input", "other", "tensor1", "tensor2")]
    # Two operands that are the node itself, or none that knows the cases, give no gradient a case.
    others = [arg for arg in operands if view.depends_on_data(arg)]
    if operands.count(node) != 1 or not others:
        return None
    return others[0], consumer


def expanded_over_cases(view: GraphView, node: fx.Node) -> bool:
    """Tell whether the node's only use makes copies of it, as many as a computed first size."""
    if len(node.users) != 1:
        return False
    call = view.call(next(iter(node.users)))
    if call is None or call.operation not in ("expand", "repeat"):
        return False
    sizes = call.get("shape")
    if call.operation == "repeat":
        shape = getattr(node.meta.get("val"), "shape", None)
        # Rows that are tiled in one dimension, [T, d] to [cases T, d], are no cases. Symbolic
        # tracing does not know the dimensions.
        if shape is None or any(times != 1 for times in sizes[1:]):
            return False
        return isinstance(sizes[0], fx.Node) and (len(sizes) > len(shape) or shape[0] == 1)
    return call.get("other") is not None or bool(sizes and isinstance(sizes[0], fx.Node))


def node_ref(value: GraphValue) -> Argument:
    """Return an argument of a tap: nodes and module members by name, plain values as they are."""
    if isinstance(value, (list, tuple)) and not isinstance(value, Member):
        return tuple(node_ref(entry) for entry in value)
    if isinstance(value, fx.Node):
        return NodeRef(value.name)
    if isinstance(value, Member):
        return NodeRef("." + value.path)
    plain_value: Argument = value
    return plain_value


def plain(layout: Layout) -> bool:
    """Tell whether the parameter is seen in its own shape."""
    return not layout.steps
