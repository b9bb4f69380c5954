"""The result of the analysis: curvature blocks and what each parameter got."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import networkx as nx

from kfac_fx.ir.coupling import Coupling, Edge, Pair, parents
from kfac_fx.ir.faces import face
from kfac_fx.ir.layout import Layout
from kfac_fx.ir.moment import Moment
from kfac_fx.ir.use import Approximation, FactorSpec, ParameterUse


@dataclass(frozen=True)
class CurvatureBlock:
    """A diagonal block of the Fisher: the parameters it covers and the form it has.

    Attributes:
        name: the owning module's path, or the parameter's own name.
        slot: the same as an identifier, used for buffers and in programs.
        kind: the kind of use ("linear", "convolution", ...).
        parameters: canonical names, the weight first.
        layouts: per parameter, from its own shape to the block's.
        factors: names, shapes and roles of the block's factors.
        approximation: "kronecker", "kronecker_sum", "full", "pairs" or "diagonal".
        uses: every place where the parameters are used.
        source: file and line of the first use, if known.
        reason: why the block is weaker than its kind allows, if it is.
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
        """Whether taps record the block; otherwise its statistic is the summed gradient."""
        return all(use.tap is not None for use in self.uses)

    @property
    def parameter_count(self) -> int:
        """Number of scalar parameters covered."""
        return sum(prod(layout.shape) for layout in self.layouts)

    @property
    def dimensions(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the factors, counts left out."""
        return tuple(factor.shape for factor in self.factors if factor.role != "count")


@dataclass(frozen=True)
class Coverage:
    """Parameters (tensors and scalars) by the kind of their block."""

    tensors: Mapping[str, int]
    scalars: Mapping[str, int]

    @property
    def total(self) -> int:
        """Number of scalar parameters of the model."""
        return sum(self.scalars.values())


@dataclass(frozen=True)
class CurvatureGraph:
    """All curvature blocks of a model, in the order of the forward pass.

    Attributes:
        frozen, excluded, unused: parameters that have no block: those that do not require a
            gradient, those the user left out, and those that the outputs do not depend on.
        edges: how the blocks follow each other in the graph; of many sources, the 32 nearest.
        pairs: the blocks whose cross factors are recorded, candidates for couplings.
        couplings: the forest of block-tridiagonal K-FAC; ``parent`` is the same as a mapping.
        uncoupled: block -> the reason why it is coupled with none.
        selection: whether the "topology" chose the couplings for good, or the "data" may choose
            others among the pairs.
        moments: blocks whose eigenvalues can be estimated (EKFAC).
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
    selection: str = "topology"
    moments: tuple[Moment, ...] = ()

    def __post_init__(self) -> None:
        for name in ("blocks", "sizes", "uncoupled"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[type[CurvatureGraph], tuple[object, ...]]:
        # Read-only mappings can be neither copied nor pickled.
        return CurvatureGraph, (
            dict(self.blocks),
            self.frozen,
            self.excluded,
            self.unused,
            dict(self.sizes),
            self.structure,
            self.route,
            self.edges,
            self.pairs,
            self.couplings,
            dict(self.uncoupled),
            self.selection,
            self.moments,
        )

    @property
    def covered(self) -> Mapping[str, str]:
        """Parameter name -> name of its block."""
        return {name: block.name for block in self.blocks.values() for name in block.parameters}

    @property
    def parent(self) -> Mapping[str, str]:
        """Child -> parent: the forest of couplings."""
        return parents(self.couplings)

    @property
    def factor_elements(self) -> int:
        """Entries of all factors; what ``Preconditioner`` will allocate, known before it does."""
        holders: list[CurvatureBlock | Pair | Moment] = [*self.blocks.values(), *self.pairs]
        holders += self.moments
        return sum(prod(f.shape) for holder in holders for f in holder.factors)

    def memory(self, itemsize: int = 4, stored: int | None = None) -> int:
        """Bytes of all factors and of their inverses, once they are refreshed.

        A refresh takes about as much as the inverses on top, as the earlier ones serve until then.

        Args:
            itemsize: of one entry; 8 for float64 parameters.
            stored: the same of the factors between folds; 2 for factor_storage="bfloat16", on the
                GPU 0 for "host", else ``itemsize``.
        """
        return (itemsize + (itemsize if stored is None else stored)) * self.factor_elements

    @property
    def fallbacks(self) -> tuple[CurvatureBlock, ...]:
        """Blocks that are weaker than their kind allows."""
        return tuple(block for block in self.blocks.values() if block.reason is not None)

    @property
    def coverage(self) -> Coverage:
        """Parameters and parameter counts by block kind; "frozen" and the like are kinds too."""
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

    def to_networkx(self) -> nx.DiGraph:
        """Blocks as nodes; dependencies, and couplings that are none, as edges; plain values."""
        return face().to_networkx(self)

    def to_pydot(
        self, preconditioner: Any = None, *, fold: bool = True, direction: str = "TB"
    ) -> Any:
        """The picture as a ``pydot.Dot``; arguments and errors as for ``save``."""
        return face().to_pydot(self, preconditioner, fold=fold, direction=direction)

    def save(
        self,
        path: str | Path,
        preconditioner: Any = None,
        *,
        fold: bool = True,
        direction: str = "TB",
    ) -> None:
        """Writes svg, png, pdf, dot, graphml, json or html, as the suffix of ``path`` says.

        Without Graphviz's ``dot``, matplotlib draws, and a warning says what to install.

        Args:
            preconditioner: whose statistics are shown, and whose couplings are drawn.
            fold: whether three or more equal modules in a row become one, "× 12".
            direction: of the forward pass: "TB", downwards, or "LR", to the right (dot only).

        Raises:
            UnknownOptionError: another suffix or direction.
            MissingExtraError: the extra ``viz`` is not installed.
        """
        face().save(self, path, preconditioner, fold=fold, direction=direction)

    def __str__(self) -> str:
        from kfac_fx.ir.report import table

        return table(self)
