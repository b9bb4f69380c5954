"""The options of a transform as one value, made once from the keywords of the public functions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypedDict

from kfac_fx.config import (
    COUPLINGS,
    LARGE_FACTORS,
    MAX_FACTOR_DIM,
    STRUCTURES,
    WEIGHT_SHARING,
    Couplings,
    LargeFactors,
    Structure,
    WeightSharing,
    choice,
)
from kfac_fx.passes.rules.base import Rules


class TransformKeywords(TypedDict, total=False):
    """The fields of ``TransformOptions`` as keywords, for functions that hand them on."""

    structure: Structure
    couplings: Couplings
    exclude: Collection[str]
    strict: bool
    weight_sharing: WeightSharing
    max_factor_dim: int
    large_factors: LargeFactors
    ekfac: bool
    rules: Rules | None


@dataclass(frozen=True)
class TransformOptions:
    """Say which curvature blocks a model gets; ``kfac_fx.transform`` explains every option.

    Attributes:
        structure: "block_tridiagonal" couples each layer with one that follows it,
            "block_diagonal" takes layers as independent.
        couplings: "topology" takes the couplings from the graph alone, "data" records more pairs,
            so that statistics can choose among them.
        exclude: names or globs of parameters or modules that get no block.
        strict: raise ``CoverageError`` where a block would be weaker than its kind allows.
        weight_sharing: "expand" counts positions that share a weight as cases, "reduce" works with
            their mean input and summed derivative.
        max_factor_dim: the largest side of a Kronecker factor that is kept as a whole matrix.
        large_factors: "diagonal" keeps larger sides as vectors, "blocks" cuts those of dense uses
            into equal sub-blocks.
        ekfac: record the second moments that ``tikhonov="ekfac"`` needs.
        rules: recognise the uses; None stands for the library's and those of ``register_rule``.

    Raises:
        UnknownOptionError: an option is none of the values that it may have.
    """

    structure: Structure = "block_tridiagonal"
    couplings: Couplings = "topology"
    exclude: Collection[str] = ()
    strict: bool = False
    weight_sharing: WeightSharing = "expand"
    max_factor_dim: int = MAX_FACTOR_DIM
    large_factors: LargeFactors = "diagonal"
    ekfac: bool = False
    rules: Rules | None = None

    def __post_init__(self) -> None:
        # Callers without a type checker pass any string: it is refused here, before a model is
        # captured, and not where the option would first be read.
        choice("structure", self.structure, STRUCTURES)
        choice("couplings", self.couplings, COUPLINGS)
        choice("weight_sharing", self.weight_sharing, WEIGHT_SHARING)
        choice("large_factors", self.large_factors, LARGE_FACTORS)
