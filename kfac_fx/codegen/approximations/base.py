"""The interface of an approximation of a block, and the values that it names.

To add one: write its class in a file of this folder (and its linear algebra in ``kfac_fx.linalg``),
give it a name in ``kfac_fx.ir.use.Approximation`` and a line in ``table.py``. Nothing else compares
names of approximations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kfac_fx.codegen.builder import ProgramBuilder
    from kfac_fx.codegen.leaf import Value
    from kfac_fx.ir.curvature_graph import CurvatureBlock
    from kfac_fx.ir.use import FactorSpec
    from kfac_fx.linalg.spectral import SideMatrix, Spectral

Invert: TypeAlias = "Callable[[Value], tuple[Value, Value]]"
"""A positive definite matrix -> its inverse, and a flag that is not zero where that failed."""

InverseKind = Literal["inverse", "basis", "scale", "L", "R", "s"]
FlagKind = Literal["failed", "clamped", "indefinite"]


class InverseKey(NamedTuple):
    """Names one tensor that a refresh makes and the apply reads.

    Values are compared and looked up by keys; ``name`` is for generated programs and state dicts.

    Attributes:
        block: slot of the block; of what a coupling adds, the child's.
        kind: "inverse" of a factor, "basis" that makes it diagonal, "scale" of coordinates by one
            over eigenvalues; of a coupling the canonical coordinates "L" of the child and "R" of
            the parent, and their squared correlations "s".
        factor: name of the factor it is made of; "" where it belongs to the whole block.
    """

    block: str
    kind: InverseKind
    factor: str = ""

    # The only place where names are composed. Checkpoints hold them: another form of a name is
    # another version of the state.
    @property
    def name(self) -> str:
        """Return the name in programs and state dicts: A_0_inverse, A_basis_0, scale_0, L_A_0."""
        if self.kind == "inverse":
            return f"{self.factor}_{self.block}_inverse"
        if self.kind in ("L", "R", "s"):
            return f"{self.kind}_{self.factor}_{self.block}"
        return "_".join(filter(None, (self.factor, self.kind, self.block)))


class FlagKey(NamedTuple):
    """Names one output of a refresh that says how the refresh went.

    Attributes:
        block: slot of the block; of a coupling, the child's.
        kind: "failed" is not zero where a factorisation failed, "clamped" counts entries of a
            conditional that rounding had pushed to one, "indefinite" says that one is not positive.
        factor: name of the factor of a factorisation, else "".
    """

    block: str
    kind: FlagKind
    factor: str = ""

    @property
    def name(self) -> str:
        """Return the name in programs: failed_A_0, clamped_0."""
        return "_".join(filter(None, (self.kind, self.factor, self.block)))


class Damping(NamedTuple):
    """The damping as the refresh program has it, both 0-dimensional.

    Attributes:
        lam: lambda, what is added to a whole block.
        gamma: its square root, which factored Tikhonov damping splits between two factors.
    """

    lam: Value
    gamma: Value


class Emitted(NamedTuple):
    """Inverses and flags that the refresh of a block made, by key."""

    inverses: dict[InverseKey, Value]
    flags: dict[FlagKey, Value]


class BlockSpectrum(NamedTuple):
    """A damped diagonal block of Fhat in coordinates that make it diagonal.

    Attributes:
        spectral: the block, as [..., g, a]; covariances have a = 1.
        diagonal: its diagonal in the same shape.
        sides: the damped A and G of a block that couplings can be taken of, else None.
    """

    spectral: Spectral
    diagonal: Tensor
    sides: tuple[SideMatrix, SideMatrix] | None = None


@dataclass(frozen=True)
class DampingReport:
    """The damping of one block's factors, for reports.

    Attributes:
        amounts: what is added to the eigenvalues of each factor, [] or one for each group.
        pi: the pi of factored Tikhonov damping, one for each group; None where it has no place.
        product: what is added to the eigenvalues of the product A (x) G; None where its factors
            are damped.
    """

    amounts: tuple[Tensor, ...]
    pi: Tensor | None = None
    product: float | None = None


# Cost of an operation on an n x n matrix over that of a Cholesky inverse, n^3 each; measured with
# one thread on matrices of 400 to 2000.
INVERSE_COST = 1.0
WHITENER_COST = 0.8
EIGEN_COST = 5.0
PRODUCT_COST = 1.0


def matrices_of(block: CurvatureBlock) -> list[FactorSpec]:
    """Return the block's factors without the counts of positions."""
    return [spec for spec in block.factors if spec.role != "count"]


def cubes(block: CurvatureBlock) -> float:
    """Return the sum of n^3 over the matrices of a block; vectors cost nothing of that order."""
    return sum(
        float(prod(spec.shape)) * spec.shape[-1]
        for spec in matrices_of(block)
        if not spec.diagonal and len(spec.shape) > 1
    )


class BlockApproximation:
    """Everything that is special about one approximation of a block of the Fisher.

    The methods that emit (``refresh``, ``gather``, ``apply``, ``scatter``) are called with values
    of a program under construction and, but for ``refresh``, with tensors too. The others take
    tensors. Here are the answers that most approximations share: one covariance C + lambda I.

    Attributes:
        cube_cost: cost of the refresh, in Cholesky inverses of its matrices.
        alone: whether blocks of equal shapes cannot be served by one call on their stacks.
        factored: whether damping is split between A and G (pi and gamma) rather than added to the
            block.
        two_sided: whether it acts on matrices [g, a], rather than on vectors [d].
        estimable: whether the eigenvalues can be replaced by second moments in the bases (EKFAC).
    """

    # Attributes rather than methods: they are asked for before there is a block to ask about.
    cube_cost = INVERSE_COST
    alone = False
    factored = False
    two_sided = False
    estimable = False

    def inverses(self, block: CurvatureBlock) -> tuple[InverseKey, ...]:
        """Return the keys of what the refresh hands to ``apply``, in that order."""
        raise NotImplementedError

    def refresh(
        self,
        build: ProgramBuilder,
        block: CurvatureBlock,
        factors: Sequence[Value],
        damping: Damping,
        invert: Invert,
    ) -> Emitted:
        """Emit the inverses of damped factors.

        Args:
            build: names values that are worth reading.
            block: the block, or the first of several of equal shapes.
            factors: in the order of ``matrices_of``; of several blocks stacks [k, ...].
            damping: lambda and gamma.
            invert: how a positive matrix is inverted.
        """
        raise NotImplementedError

    def gather(self, block: CurvatureBlock, gradients: Sequence[Value]) -> Value:
        """Return the gradients, in the shapes of the layouts, as the array that ``apply`` takes."""
        flat = [gradient.reshape(-1) for gradient in gradients]
        # A program of many biases would copy each of them for nothing.
        return torch.cat(flat) if len(flat) > 1 else flat[0]

    def apply(self, block: CurvatureBlock, inverses: Sequence[Value], V: Value) -> Value:
        """Return the inverse block times V, in the shape of V; stacks of both give a stack."""
        raise NotImplementedError

    def scatter(self, block: CurvatureBlock, U: Value) -> Sequence[Value]:
        """Return U as one array a parameter, in the shapes of the layouts."""
        shapes = [layout.shape for layout in block.layouts]
        if len(shapes) == 1:
            return [U.reshape(shapes[0])]
        # Parameters that share a covariance have one entry a channel each, so equal lengths.
        size = block.factors[0].shape[0] // len(shapes)
        return [
            U[index * size : (index + 1) * size].reshape(shape)
            for index, shape in enumerate(shapes)
        ]

    def symmetric(self, block: CurvatureBlock) -> frozenset[InverseKey]:
        """Return the inverses that are symmetric matrices, of which one half need be sent."""
        return frozenset()

    def refresh_cost(self, block: CurvatureBlock) -> float:
        """Return the cost of the refresh, in operations of a Cholesky inverse."""
        # The parameters count for blocks without matrices, which would be free otherwise, and all
        # be given to one process.
        return self.cube_cost * cubes(block) + block.parameter_count

    def spectrum(
        self, block: CurvatureBlock, factors: Sequence[Tensor], damping: float
    ) -> BlockSpectrum:
        """Return the block, damped as the program damps it, for linear algebra with Fhat.

        Args:
            block: the block.
            factors: undamped averages, in the order of ``matrices_of``.
            damping: lambda.
        """
        raise NotImplementedError

    def damping(
        self, block: CurvatureBlock, factors: Sequence[Tensor], gamma: float
    ) -> DampingReport:
        """Return how the factors are damped; in float64 on the CPU.

        Args:
            block: the block.
            factors: undamped averages, in the order of ``matrices_of``.
            gamma: the square root of lambda.
        """
        amount = torch.full((), gamma**2, dtype=torch.float64)
        return DampingReport((amount,) * len(matrices_of(block)))

    def condition(self, values: Sequence[Tensor], damping: DampingReport) -> Tensor | None:
        """Return the condition number of the damped block, one for each group.

        Args:
            values: eigenvalues of the undamped factors, [..., n].
            damping: the damping of the same block.

        Returns:
            None where the condition does not follow from the factors.
        """
        conditions = [
            (value + amount.unsqueeze(-1)).amax(-1) / (value + amount.unsqueeze(-1)).amin(-1)
            for value, amount in zip(values, damping.amounts, strict=True)
        ]
        # Eigenvalues of a Kronecker product are the products of those of its factors.
        return conditions[0] if len(conditions) == 1 else conditions[0] * conditions[1]
