"""The result of the analysis: curvature blocks and what each parameter got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kfac_fx.config import Couplings, FlowDirection
from kfac_fx.errors import FormatError
from kfac_fx.ir.coupling import Coupling, Edge, parents
from kfac_fx.ir.layout import Layout, ViewStep
from kfac_fx.ir.plain import Plain, PlainCodec
from kfac_fx.ir.use import (
    Approximation,
    CaseView,
    FactorSpec,
    NodeRef,
    ParameterUse,
    Scale,
    Tap,
    product_count,
)

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class CurvatureBlock:
    """A diagonal block of the Fisher: the parameters it covers and the form it has.

    See docs/explanation/mathematics.md, section 4, for the form of each kind of use.

    Attributes:
        name: the owning module's path, or the parameter's own name.
        slot: the same as an identifier, used for buffers and in programs.
        kind: the kind of use, which is the name of a rule ("linear", "convolution", ...).
        parameters: canonical names of the parameters covered, the weight first.
        layouts: for each parameter, the views from its own shape to the block's.
        factors: what is recorded of the block: name, shape and role of each factor.
        approximation: the structure of the block, see ``Approximation``.
        uses: every place where the parameters are used; their statistics are added up.
        source: file and line of the first use; None where the capture did not keep them.
        reason: why the block is weaker than its kind allows; None where it is not.
    """

    name: str
    slot: str
    kind: str
    parameters: tuple[str, ...]
    layouts: tuple[Layout, ...]
    factors: tuple[FactorSpec, ...]
    approximation: Approximation
    uses: tuple[ParameterUse, ...]
    source: str | None = None
    reason: str | None = None

    @property
    def tapped(self) -> bool:
        """Tell whether taps record the block; otherwise its statistic is the summed gradient."""
        return all(use.tap is not None for use in self.uses)

    @property
    def products(self) -> int:
        """Return the number of Kronecker products that the block is the sum of; 0 for none."""
        return product_count(self.factors)

    @property
    def parameter_count(self) -> int:
        """Return the number of scalar parameters covered."""
        return sum(prod(layout.shape) for layout in self.layouts)

    @property
    def dimensions(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the factors, counts left out."""
        return tuple(factor.shape for factor in self.factors if factor.role != "count")


@dataclass(frozen=True)
class Pair:
    """Two blocks whose cross factors are recorded (docs/explanation/mathematics.md, section 7).

    Attributes:
        earlier: name of the block that comes first in the forward pass.
        later: name of the other block.
        slot: the pair as an identifier, used for buffers.
        factors: A [d_in of earlier, d_in of later] and G [d_out of earlier, d_out of later].
        ordered: whether nothing between the two changes the order of positions, so that rows
            which one side counts as cases can be matched with the other side's positions.
    """

    earlier: str
    later: str
    slot: str
    factors: tuple[FactorSpec, FactorSpec]
    ordered: bool

    tapped = True

    @property
    def name(self) -> str:
        """Return both blocks' names, for logs and as a key beside the blocks' own names."""
        return f"{self.earlier} -> {self.later}"


@dataclass(frozen=True)
class Moment:
    """A Kronecker block's second moments of the per-case gradient, in the bases of A and G.

    They replace the eigenvalues of A (x) G in EKFAC (docs/explanation/mathematics.md, section 5).

    Attributes:
        block: name of the block.
        slot: the moment as an identifier, used for buffers.
        factors: S [d_out, d_in], one second moment for each pair of eigenvectors.
    """

    block: str
    slot: str
    factors: tuple[FactorSpec]

    tapped = True

    @property
    def name(self) -> str:
        """Return a name for logs, and as a key beside the blocks' own names."""
        return f"moments of {self.block}"


Holder = CurvatureBlock | Pair | Moment
"""What has statistics of its own, with a slot, a name and factors."""


@dataclass(frozen=True)
class Coverage:
    """Parameters by the kind of their block; "frozen", "excluded" and "unused" are kinds too.

    Attributes:
        tensors: number of parameters (tensors) of each kind.
        scalars: number of their entries.
    """

    tensors: Mapping[str, int]
    scalars: Mapping[str, int]

    @property
    def total(self) -> int:
        """Return the number of scalar parameters of the model."""
        return sum(self.scalars.values())


@dataclass(frozen=True)
class CurvatureGraph:
    """All curvature blocks of a model, in the order of the forward pass.

    Attributes:
        blocks: the blocks by name, in the order of the forward pass.
        frozen: parameters without a block, as they do not require a gradient.
        excluded: parameters without a block, as the user left them out.
        unused: parameters without a block, as the outputs do not depend on them.
        sizes: number of entries of every parameter of the model.
        structure: "block_diagonal" or "block_tridiagonal": what the taps can record.
        route: how the model was captured.
        edges: how the blocks follow each other in the graph; of many sources, the 32 nearest.
        pairs: the blocks whose cross factors are recorded, candidates for couplings.
        couplings: the forest of block-tridiagonal K-FAC; ``parent`` is the same as a mapping.
        uncoupled: for each block that is coupled with none, the reason.
        selection: whether the "topology" chose the couplings for good, or the "data" may choose
            others among the pairs.
        moments: blocks whose eigenvalues can be estimated (EKFAC).
        preferred: the structure that ``Preconditioner`` takes unless it is told another one.
    """

    blocks: Mapping[str, CurvatureBlock]
    frozen: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    structure: str = "block_diagonal"
    route: str = "symbolic_trace"
    edges: tuple[Edge, ...] = ()
    pairs: tuple[Pair, ...] = ()
    couplings: tuple[Coupling, ...] = ()
    uncoupled: Mapping[str, str] = field(default_factory=dict)
    selection: Couplings = "topology"
    moments: tuple[Moment, ...] = ()
    preferred: str = "block_diagonal"

    # Mappings of a frozen record are read-only too: several passes and a Preconditioner hold one
    # graph.
    def __post_init__(self) -> None:
        for name in ("blocks", "sizes", "uncoupled"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[type[CurvatureGraph], tuple[object, ...]]:
        # Read-only mappings can be neither copied nor pickled, so plain ones travel.
        values = (getattr(self, entry.name) for entry in fields(self))
        return CurvatureGraph, tuple(
            dict(value) if isinstance(value, MappingProxyType) else value for value in values
        )

    @property
    def covered(self) -> Mapping[str, str]:
        """Return the name of each covered parameter's block."""
        return {name: block.name for block in self.blocks.values() for name in block.parameters}

    @property
    def parent(self) -> Mapping[str, str]:
        """Return the forest of couplings as child -> parent."""
        return parents(self.couplings)

    @property
    def factor_elements(self) -> int:
        """Return the entries of all factors that ``Preconditioner`` allocates unless it is told
        another structure.
        """
        holders: list[CurvatureBlock | Pair | Moment] = [*self.blocks.values(), *self.moments]
        if self.preferred == "block_tridiagonal":
            holders += self.pairs
        return sum(prod(f.shape) for holder in holders for f in holder.factors)

    def memory(self, itemsize: int = 4, stored: int | None = None) -> int:
        """Return the bytes of all factors and of their inverses, once they are refreshed.

        A refresh takes about as much as the inverses on top, as the earlier ones serve until then.

        Args:
            itemsize: bytes of one entry of an inverse; 8 for float64 parameters.
            stored: bytes of one entry of a factor between folds; 2 for factor_storage="bfloat16",
                on the GPU 0 for "host", by default ``itemsize``.
        """
        return (itemsize + (itemsize if stored is None else stored)) * self.factor_elements

    @property
    def fallbacks(self) -> tuple[CurvatureBlock, ...]:
        """Return the blocks that are weaker than their kind allows; each has a ``reason``."""
        return tuple(block for block in self.blocks.values() if block.reason is not None)

    @property
    def coverage(self) -> Coverage:
        """Return parameters and sizes by kind of block; "frozen" and the like are kinds too."""
        tensors: dict[str, int] = {}
        scalars: dict[str, int] = {}
        for block in self.blocks.values():
            tensors[block.kind] = tensors.get(block.kind, 0) + len(block.parameters)
            scalars[block.kind] = scalars.get(block.kind, 0) + block.parameter_count
        for kind in ("frozen", "excluded", "unused"):
            names: tuple[str, ...] = getattr(self, kind)
            if names:
                tensors[kind] = len(names)
                scalars[kind] = sum(self.sizes[name] for name in names)
        return Coverage(tensors, scalars)

    # Pictures are drawn by viz/, far above: it is imported when a picture is asked for, so that
    # drawing stays a method of the graph and nothing here depends on how it is drawn.

    def to_networkx(self) -> nx.DiGraph:
        """Return blocks as nodes; one edge a dependency, and a coupling without one."""
        from kfac_fx.viz.facts import to_networkx

        return to_networkx(self)

    def to_pydot(
        self, preconditioner: Any = None, *, fold: bool = True, direction: FlowDirection = "TB"
    ) -> Any:
        """Return the picture as a ``pydot.Dot``; arguments and errors as for ``save``."""
        from kfac_fx.viz.save import to_pydot

        return to_pydot(self, preconditioner, fold=fold, direction=direction)

    def save(
        self,
        path: str | Path,
        preconditioner: Any = None,
        *,
        fold: bool = True,
        direction: FlowDirection = "TB",
    ) -> None:
        """Write svg, png, pdf, dot, graphml, json or html, as the suffix of ``path`` says.

        Without Graphviz's ``dot``, matplotlib draws, and a warning says what to install.

        Args:
            path: where to; its suffix is one of those above.
            preconditioner: whose statistics are shown, and whose couplings are drawn; None for the
                transform's own couplings, without statistics.
            fold: whether three or more equal modules in a row become one, "× 12".
            direction: the direction of the forward pass: "TB", downwards, or "LR", to the right
                (dot only).

        Raises:
            UnknownOptionError: another suffix or direction.
            MissingExtraError: the extra ``viz`` is not installed.
        """
        from kfac_fx.viz.save import save

        save(self, path, preconditioner, fold=fold, direction=direction)

    def __str__(self) -> str:
        return _table(self)

    def to_plain(self) -> Plain:
        """Return the graph as nested dicts and lists that JSON holds.

        Raises:
            FormatError: a rule of the user's own put an object into a tap's options that is no
                plain value.
        """
        return _CODEC.write(self)

    @classmethod
    def from_plain(cls, plain: object) -> CurvatureGraph:
        """Return the graph that ``to_plain`` wrote, of this version or an earlier one.

        Raises:
            FormatError: the value is no curvature graph.
        """
        found = _CODEC.read(plain)
        if not isinstance(found, cls):
            raise FormatError("this is no JSON of a curvature graph")
        return found


# The records by the names that files have. A renamed class keeps reading its old name.
_CODEC = PlainCodec(
    [
        CaseView,
        CurvatureGraph,
        CurvatureBlock,
        Coupling,
        Edge,
        FactorSpec,
        Layout,
        Moment,
        NodeRef,
        Pair,
        ParameterUse,
        Scale,
        Tap,
        ViewStep,
    ],
    renamed={"Step": ViewStep},
)


def _shape(shape: tuple[int, ...]) -> str:
    """Return a factor's shape as "20x20"; "1" for a number."""
    return "x".join(map(str, shape)) or "1"


def _row(block: CurvatureBlock) -> tuple[str, ...]:
    """Return the cells of a block's line."""
    factors = "  ".join(
        f"{factor.name} {_shape(factor.shape)}"
        for factor in block.factors
        if factor.role != "count"
    )
    uses = f"{len(block.uses)} uses" if len(block.uses) > 1 else ""
    approximation = ", ".join(filter(None, (block.approximation, uses)))
    return block.name, block.kind, approximation, factors, f"{block.parameter_count:,}"


# People read this where a graph is printed, so it must say what is weak: a block that is a diagonal
# for a reason looks like any other in the numbers.
def _table(curvature: CurvatureGraph) -> str:
    """Return the graph for people: a line for each block, then what is weak or left alone."""
    head = ("block", "kind", "approximation", "factors", "parameters")
    rows = [head, *(_row(block) for block in curvature.blocks.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index == len(head) - 1 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    coverage = curvature.coverage
    parts = [
        f"{kind} {count:,} ({100 * count / max(coverage.total, 1):.1f} %)"
        for kind, count in coverage.scalars.items()
    ]
    lines += ["", f"coverage of {coverage.total:,} parameters: " + ", ".join(parts)]
    lines.append(f"factors and inverses in float32: {curvature.memory() / 2**20:,.2f} MiB")
    lines += _coupling_lines(curvature)
    lines += [f"weaker than it could be: {b.name}: {b.reason}" for b in curvature.fallbacks]
    for label in ("frozen", "excluded", "unused"):
        names = getattr(curvature, label)
        if names:
            lines.append(f"{label}: " + ", ".join(names))
    return "\n".join(lines)


def _coupling_lines(curvature: CurvatureGraph) -> list[str]:
    """Return the forest, and for each block outside of it the reason."""
    if curvature.structure != "block_tridiagonal":
        return []
    lines = [f"couplings ({curvature.selection}): {len(curvature.couplings)}"]
    lines += [f"  {c.child} given {c.parent}" for c in curvature.couplings]
    reasons: dict[str, list[str]] = {}
    for name, reason in curvature.uncoupled.items():
        reasons.setdefault(reason, []).append(name)
    return lines + [f"not coupled: {', '.join(ns)}: {reason}" for reason, ns in reasons.items()]
