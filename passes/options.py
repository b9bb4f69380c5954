"""The options of a transform as one value, made once from the keywords of the public functions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from kfac_fx.config import (
    COUPLINGS,
    DEFAULT_LIMITS,
    LARGE_FACTORS,
    MAX_FACTOR_DIM,
    STRUCTURES,
    WEIGHT_SHARING,
    Couplings,
    LargeFactors,
    SideLimits,
    Structure,
    WeightSharing,
    choice,
)

if TYPE_CHECKING:
    from kfac_fx.passes.rules.base import Rules


class TransformKeywords(TypedDict, total=False):
    """The fields of ``TransformOptions`` as keywords, for functions that hand them on."""

    structure: Structure | None
    couplings: Couplings
    exclude: Collection[str]
    strict: bool
    weight_sharing: WeightSharing
    max_factor_dim: int | None
    large_factors: LargeFactors
    ekfac: bool
    rules: Rules | None


@dataclass(frozen=True)
class TransformOptions:
    """Say which curvature blocks a model gets; ``kfac_fx.transform`` explains every option.

    Attributes:
        structure: "block_tridiagonal" couples each layer with one that follows it,
            "block_diagonal" takes layers as independent. None finds the couplings, and leaves them
            to optimizers that take them; with couplings="data" it is "block_tridiagonal".
        couplings: "topology" takes the couplings from the graph alone, "data" records more pairs,
            so that statistics can choose among them.
        exclude: names or globs of parameters or modules that get no block.
        strict: raise ``CoverageError`` where a block would be weaker than its kind allows.
        weight_sharing: "expand" counts positions that share a weight as cases, "reduce" works with
            their mean input and summed derivative.
        max_factor_dim: the largest side of a Kronecker factor that is kept as a whole matrix; None
            leaves it to the library (``limits``).
        large_factors: "diagonal" keeps larger sides as vectors, "blocks" cuts those of uses that
            can be cut into equal sub-blocks.
        ekfac: record the second moments that ``tikhonov="ekfac"`` needs.
        rules: those that are asked about every call; None stands for the library's own and those
            that ``register_rule`` has added when a model is analysed.

    Raises:
        UnknownOptionError: an option is none of the values that it may have.
    """

    structure: Structure | None = None
    couplings: Couplings = "topology"
    exclude: Collection[str] = ()
    strict: bool = False
    weight_sharing: WeightSharing = "expand"
    max_factor_dim: int | None = None
    large_factors: LargeFactors = "diagonal"
    ekfac: bool = False
    rules: Rules | None = None

    @property
    def recorded(self) -> Structure:
        """Return the structure that taps record the statistics of."""
        return self.structure or "block_tridiagonal"

    @property
    def preferred(self) -> Structure:
        """Return the structure that ``Preconditioner`` takes unless it is told another one."""
        # By the second block-diagonal wins on most problems, so couplings are for who asks: here,
        # where the forest is chosen by data, or there.
        if self.structure is None and self.couplings == "data":
            return "block_tridiagonal"
        return self.structure or "block_diagonal"

    @property
    def limits(self) -> SideLimits:
        """Return the sizes at which the form of a Kronecker factor changes."""
        limit = self.max_factor_dim
        # Cut sides have no cross factors and no second moments, and are weaker: who asks for one of
        # these, or for nothing weaker, has asked for whole sides and not for cheap ones.
        coupled = self.preferred == "block_tridiagonal"
        if limit is None and (coupled or self.ekfac or self.strict):
            limit = MAX_FACTOR_DIM
        return DEFAULT_LIMITS if limit is None else SideLimits(limit, limit, limit)

    def __post_init__(self) -> None:
        # Callers without a type checker pass any string: it is refused here, before a model is
        # captured, and not where the option would first be read.
        if self.structure is not None:
            choice("structure", self.structure, STRUCTURES)
        choice("couplings", self.couplings, COUPLINGS)
        choice("weight_sharing", self.weight_sharing, WEIGHT_SHARING)
        choice("large_factors", self.large_factors, LARGE_FACTORS)
