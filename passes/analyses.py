"""The analyses as passes: uses, couplings, moments, and whether every parameter got its due."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import fx, nn

from kfac_fx.capture import EagerModule
from kfac_fx.config import (
    COUPLINGS,
    LARGE_FACTORS,
    MAX_FACTOR_DIM,
    STRUCTURES,
    WEIGHT_SHARING,
    choice,
)
from kfac_fx.errors import CoverageError, NoParametersError, UnknownOptionError
from kfac_fx.ir import CurvatureBlock, CurvatureGraph
from kfac_fx.passes.annotations import graphs_of
from kfac_fx.passes.base import HERE, Analysis, curvature_of
from kfac_fx.passes.eager_taps import placeable
from kfac_fx.passes.every_piece import every_piece
from kfac_fx.passes.find_couplings import find_couplings
from kfac_fx.passes.find_uses import find_uses
from kfac_fx.passes.gather_blocks import gather_blocks
from kfac_fx.passes.insert_moments import find_moments

log = logging.getLogger("kfac_fx")


class Covered:
    """The parameters of a model by what becomes of them.

    Attributes:
        names: those that get blocks.
        frozen, excluded: the others.

    Raises:
        NoParametersError: there is nothing to precondition.
    """

    def __init__(self, model: nn.Module, exclude: Collection[str]) -> None:
        self.sizes = {name: p.numel() for name, p in model.named_parameters()}
        self.frozen = tuple(n for n, p in model.named_parameters() if not p.requires_grad)
        open_names = [n for n in self.sizes if n not in self.frozen]
        self.excluded = tuple(n for n in open_names if _matches(n, exclude))
        self.names = [n for n in open_names if n not in self.excluded]
        if not self.names:
            raise NoParametersError(
                f"{type(model).__name__} has no parameter that requires a gradient and is not "
                "excluded"
            )


def _matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a parameter, or a module that holds it, matches one of the globs."""
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    parts = name.split(".")
    paths = [".".join(parts[: index + 1]) for index in range(len(parts))]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


class FindUses(Analysis):
    """Every use of every parameter, gathered into blocks.

    Args:
        structure: which the curvature graph is to have; see ``kfac_fx.transform`` for the others.
        route: how the module was captured.

    Raises:
        UnknownOptionError: an option is wrong.
        NoParametersError: there is nothing to precondition.
    """

    def __init__(
        self,
        *,
        exclude: Collection[str] = (),
        weight_sharing: str = "expand",
        max_factor_dim: int = MAX_FACTOR_DIM,
        large_factors: str = "diagonal",
        structure: str = "block_tridiagonal",
        route: str = "graph_module",
    ) -> None:
        self.exclude = exclude
        self.reduce = choice("weight_sharing", weight_sharing, WEIGHT_SHARING) == "reduce"
        self.max_factor_dim = max_factor_dim
        self.large_factors = choice("large_factors", large_factors, LARGE_FACTORS)
        self.structure = choice("structure", structure, STRUCTURES)
        self.route = route
        self.counted = False  # whether a use may run any number of times in a forward pass

    def blocks(
        self, module: fx.GraphModule, graph: fx.Graph, names: Collection[str]
    ) -> dict[str, CurvatureBlock]:
        """The blocks that one graph's own uses make."""
        uses = find_uses(
            module,
            graph,
            names,
            reduce=self.reduce,
            max_factor_dim=self.max_factor_dim,
            large_factors=self.large_factors,
        )
        running = isinstance(module, EagerModule)
        if running:
            uses = every_piece(placeable(uses, graph), graph)
        return gather_blocks(uses, graph, counted=running or self.counted)

    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """Blocks, and the parameters that have none."""
        given = Covered(module, self.exclude)
        first, *others = graphs_of(module)
        blocks = self.blocks(module, first, given.names)
        module.meta[HERE] = [self.blocks(module, graph, given.names) for graph in others]
        covered = {name for block in blocks.values() for name in block.parameters}
        unused = tuple(name for name in given.names if name not in covered)
        _tell(blocks, unused)
        rest = given.frozen, given.excluded, unused, given.sizes
        return CurvatureGraph(blocks, *rest, self.structure, self.route)


def _tell(blocks: Mapping[str, CurvatureBlock], unused: Collection[str]) -> None:
    for block in blocks.values():
        nodes = ", ".join(use.node for use in block.uses)
        why = f"; {block.reason}" if block.reason else ""
        log.debug(
            "%s: %s block of %s, used in %s%s",
            *(block.name, f"{block.kind} ({block.approximation})"),
            *(", ".join(block.parameters), nodes, why),
        )
    for name in unused:
        log.debug("%s: no block, the outputs do not depend on it", name)


class CheckCoverage(Analysis):
    """Logs the blocks that are weaker than their kind allows.

    Args:
        strict: raise instead.

    Raises:
        CoverageError: ``strict`` and a fallback; names the parameters.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """The curvature graph as it is."""
        curvature = curvature_of(module, "CheckCoverage")
        lines = [f"{', '.join(b.parameters)}: {b.reason}" for b in curvature.fallbacks]
        if lines and self.strict:
            raise CoverageError(
                "strict=True, but these parameters would get a weaker block than their kind allows "
                "(exclude them or pass strict=False):\n  " + "\n  ".join(lines)
            )
        for line in lines:
            log.warning("weaker block: %s", line)
        return curvature


class FindCouplings(Analysis):
    """Which blocks follow each other, and which of them are coupled.

    Args:
        couplings: "topology" or "data", as for ``kfac_fx.transform``.

    Raises:
        UnknownOptionError: it is another.
    """

    def __init__(self, *, couplings: str = "topology") -> None:
        self.by_data = choice("couplings", couplings, COUPLINGS) == "data"

    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """The curvature graph with edges, pairs and the forest."""
        curvature = curvature_of(module, "FindCouplings")
        found = find_couplings(module, graphs_of(module)[0], curvature, by_data=self.by_data)
        for coupling in found.couplings:
            log.debug("%s is coupled with %s", coupling.child, coupling.parent)
        for name, reason in found.uncoupled.items():
            log.debug("%s is coupled with none: %s", name, reason)
        return found


class FindMoments(Analysis):
    """The blocks whose eigenvalues can be estimated (EKFAC)."""

    def analyse(self, module: fx.GraphModule) -> CurvatureGraph:
        """The curvature graph with moments."""
        if isinstance(module, EagerModule):
            raise UnknownOptionError("ekfac=True needs a graph: capture='eager' has none")
        curvature = curvature_of(module, "FindMoments")
        return replace(curvature, moments=find_moments(module, curvature.blocks))
