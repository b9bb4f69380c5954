"""Parameter uses and the statistics that a tap records of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from kfac_fx.ir.layout import Layout

Role = Literal["input", "gradient", "count"]
"""How a new statistic of a factor is scaled, see ``FactorSpec``."""

FactorSide = Literal["A", "G", "C", "S", "positions"]
"""What of a use a factor is the second moment (or the number) of, see ``FactorSpec``."""

Approximation = Literal["kronecker", "kronecker_sum", "full", "pairs", "diagonal"]
"""The structure of a block: A (x) G; the sum of two such products; a full covariance; one small
matrix for each entry, over the parameters that share it (scale and shift); a diagonal.
"""


# Frozen and compared by value: two uses whose factors are equal are summed in one block, and taps
# of a graph that was analysed again are left alone where nothing changed.
@dataclass(frozen=True)
class FactorSpec:
    """One factor of a block: the running average of one statistic.

    Attributes:
        side: which side of the block it belongs to: "A" of the inputs and "G" of the derivatives
            of a Kronecker product, "C" for the covariance of a whole gradient, "S" for second
            moments in known bases, "positions" for a count.
        shape: the shape of the factor as it is kept.
        role: how a new statistic is scaled. An "input" factor does not depend on the loss, a
            "gradient" factor is quadratic in its derivative (docs/explanation/mathematics.md,
            section 2), a "count" is a number of positions by which the gradient factors of the
            same form are divided.
        diagonal: whether the factor is a diagonal, kept as a vector.
        cut: length of a side that is kept as k sub-blocks [k, b, b] along its diagonal, 0 for one
            that is whole. Where k b exceeds ``cut``, the last sub-block ends in zeros.
        form: which of the Kronecker products of a sum the factor belongs to, counted from 1.
    """

    side: FactorSide
    shape: tuple[int, ...]
    role: Role
    diagonal: bool = False
    cut: int = 0
    form: int = 1

    @property
    def name(self) -> str:
        """Return the factor's name: its side, and its form unless that is the first."""
        return self.side if self.form == 1 else f"{self.side}_{self.form}"


class StatisticKey(NamedTuple):
    """Names one statistic from the tap that delivers it to the average that takes it.

    The factor buffer of a tapped statistic is ``<store>.<slot>.<factor>`` in the instrumented
    module, so the key is also the buffer's path. A block without a tap has one statistic, the
    squared gradient of its parameters, under the name of its only factor.

    Attributes:
        slot: the slot of the block, pair or moment, as an identifier.
        factor: name of one of its factors ("A", "G", "C", ...).
    """

    slot: str
    factor: str


def product_count(factors: Iterable[FactorSpec]) -> int:
    """Return of how many Kronecker products a block with these factors is the sum; 0 for none.

    Passes ask for this where they would have to know the names of approximations otherwise.
    """
    return len({spec.form for spec in factors if spec.side == "A"})


class NodeRef(NamedTuple):
    """Names a value of the graph, in place of the value, in what a tap is called with.

    Attributes:
        name: the name of a node; with a dot in front, the path of a buffer or flag of the module.
    """

    # Names survive what nodes do not: copies of a graph, pickling, torch.export and its files.
    name: str


Argument: TypeAlias = "bool | int | float | str | NodeRef | tuple[Argument, ...] | None"
"""What a tap is called with: plain values, and names that are resolved when it is inserted."""


class Scale(NamedTuple):
    """A weight that is computed from a parameter, taken as a factor for each output's row.

    Attributes:
        result: the computed weight, in the parameter's shape.
        source: the parameter.
        rows: dimensions of both that count the outputs.
        entrywise: whether each entry is computed from the same entry alone.
        whole: whether the source is the parameter itself rather than a view of it.
    """

    result: NodeRef
    source: NodeRef
    rows: tuple[int, ...]
    entrywise: bool
    whole: bool = True


class CaseView(NamedTuple):
    """How the tensors of a tap are seen with their cases first; see ``kfac_fx.ops.case_first``.

    Attributes:
        dim: the dimension that counts the cases in the model; with ``like`` where the positions go
            instead, 0 behind the cases, -1 at the end, -2 from before the cases behind them;
            -3 where the tap itself is told what counts the cases.
        like: where cases are folded with positions, what counts them by its first dimension.
    """

    dim: int
    like: NodeRef | None = None


@dataclass(frozen=True)
class Tap:
    """The call that records a use: ``operator(node, *tensors, *factors, *options)``.

    Its result takes the place of ``node`` in ``consumer``, or in all users when that is None.

    Attributes:
        operator: name of an operator of ``torch.ops.kfac_fx``.
        node: name of the node whose derivative is recorded.
        tensors: what else the statistics are formed of: nodes, or None for what is not there.
        options: plain values in the order of the operator's schema, as the operator's options
            class writes them (``kfac_fx.ops.options.TapOptions.to_args``) and reads them.
        consumer: name of the one node that reads the tapped value; None for all users.
        slots: 0, or the number of factors of an operator that runs in the node's place for all
            the uses at that node: ``operator(*tensors, factors, *options)``.
        at: where the factors of this use begin among those ``slots``.
        scale: for a weight that is computed from a parameter. The statistics of G are then those
            of the derivative times the factors of its rows.
        cases: how tensors are seen that have their cases elsewhere than first; None for others.
    """

    operator: str
    node: str
    tensors: tuple[Argument, ...] = ()
    options: tuple[Argument, ...] = ()
    consumer: str | None = None
    # Recurrent layers: what is between two uses of weight_hh cannot be seen outside of the
    # operator.
    slots: int = 0
    at: int = 0
    scale: Scale | None = None
    cases: CaseView | None = None


@dataclass(frozen=True)
class ParameterUse:
    """One place where parameters enter the computation (``s = W abar``, or its like).

    Attributes:
        kind: the rule that recognised the use.
        node: the consuming node, by name.
        parameters: canonical names, the weight first.
        layouts: for each parameter, the views from its own shape to the block's.
        factors: what the tap records, in the order of the tap's arguments.
        approximation: the structure of the block's Fisher.
        tap: how it is recorded; None if only the summed gradient is available.
        path: the operations between the parameter and the node, for reports.
        reason: why the approximation is weaker than the kind allows; None where it is not.
    """

    kind: str
    node: str
    parameters: tuple[str, ...]
    layouts: tuple[Layout, ...]
    factors: tuple[FactorSpec, ...]
    approximation: Approximation
    tap: Tap | None
    path: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def products(self) -> int:
        """Return the number of Kronecker products; see ``product_count``."""
        return product_count(self.factors)
