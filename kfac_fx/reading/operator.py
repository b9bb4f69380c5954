"""Fhat as a linear operator: products, solutions, samples, determinant, trace, diagonal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kfac_fx.codegen.approximations.base import BlockSpectrum
from kfac_fx.curvature.block_vectors import gathered, scattered
from kfac_fx.curvature.ekfac import Moments
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.errors import OperatorError, StatisticsError
from kfac_fx.ir.coupling import parents
from kfac_fx.ir.curvature_graph import CurvatureBlock
from kfac_fx.linalg.forest import Forest
from kfac_fx.linalg.spectral import Spectral
from kfac_fx.reading.conditionals import conditionals

Blocks = dict[str, Tensor]
"""The arrays [..., g, a] that the blocks act on, by the blocks' names."""

# NumPy and SciPy are no dependencies, and their arrays have no base class that mypy knows here.
Vector: TypeAlias = Any
"""A mapping from parameter names to tensors, a tensor [n], or a NumPy array [n]."""

Matrix: TypeAlias = Any
"""A tensor or a NumPy array [n, k]."""


class CurvatureOperator:
    """The damped Fhat of the statistics and the damping at the time it is made.

    Symmetric, positive, [n, n] over the entries of all covered parameters, in the order of the
    network's ``parameters()``. With couplings Fhat = Xi^-1 Lambda^-1 Xi^-T, whose diagonal blocks
    are those of Ftilde (Martens & Grosse 2015, section 4.3). Entries that no block covers are the
    identity's, as in ``Preconditioner.apply``, which is ``solve`` with the inverses of the last
    refresh.

    Vectors are mappings from parameter names to tensors (missing ones are zero; results have all
    names), tensors [n], or NumPy arrays [n]; results are of the same kind, in the operator's
    precision. ``scipy.sparse.linalg.aslinearoperator`` and its solvers take the object as it is.

    Args:
        inverse: holds the averages.
        damping: lambda.
        dtype: the dtype of the operator; float64 unless the device has none.
        scale: the operator is this times that of the averages; its damping is lambda all the same.
        blocks: the damped blocks, where they are known; then there are no couplings.

    Attributes:
        shape: (n, n).

    Raises:
        StatisticsError: a block has no statistics.
        OperatorError: a block is of a form, or of complex parameters, that has no operator.
    """

    def __init__(
        self,
        inverse: InverseFisher,
        damping: float,
        dtype: torch.dtype = torch.float64,
        *,
        scale: float = 1.0,
        blocks: Mapping[str, BlockSpectrum] | None = None,
    ) -> None:
        self._blocks = inverse.curvature.blocks
        self._recipe = inverse.program.recipe
        self._parameters = {n: p.detach() for n, p in inverse.covered.in_module_order().items()}
        self._device = next(iter(self._parameters.values())).device
        self._dtype = dtype
        n = sum(p.numel() for p in self._parameters.values())
        self.shape = (n, n)
        for name, averages in inverse.estimate.blocks.items():
            self._check(self._blocks[name], averages.recorded)
        # As the next refresh would damp them: the operator is of the present averages, while
        # ``apply`` uses the inverses of the last refresh.
        coupled = blocks is None
        found = self._damped(inverse, damping / scale) if blocks is None else dict(blocks)
        cross = {pair: [f.to(dtype) for f in fs] for pair, fs in inverse.cross_factors.items()}
        # A child whose conditional is not positive stands alone, as it does in the program.
        couplings = inverse.program.couplings if coupled else ()
        given = conditionals(parents(couplings), found, cross)
        parent = parents(c for c in couplings if c.child in given)
        self._forest = Forest(parent, {child: made.psi for child, made in given.items()})
        self._diagonals = {name: scale * made.diagonal for name, made in found.items()}
        spectra = {name: made.spectral for name, made in found.items()}
        spectra |= {child: made.sigma for child, made in given.items()}
        self._spectra = {n: replace(s, d=scale * s.d) for n, s in spectra.items()}

    def _damped(self, inverse: InverseFisher, damping: float) -> dict[str, BlockSpectrum]:
        """Return the blocks as the next refresh would damp them."""
        found = {
            name: self._recipe.of(block).spectrum(
                block, [factor.to(self._dtype) for factor in inverse.factors[name]], damping
            )
            for name, block in self._blocks.items()
        }
        if inverse.moments is not None:
            for name in inverse.moments.blocks:
                found[name] = self._estimated(inverse.moments, name, damping)
        return found

    def _check(self, block: CurvatureBlock, recorded: int) -> None:
        if not recorded:
            raise StatisticsError(f"block {block.name}: no statistics, so no curvature, is known")
        if any(self._parameters[name].is_complex() for name in block.parameters):
            raise OperatorError(f"block {block.name}: there is no operator of complex parameters")

    def _estimated(self, moments: Moments, name: str, damping: float) -> BlockSpectrum:
        """Return a block of EKFAC, in the bases of the last refresh."""
        basis = moments.eigenbasis(name)
        if basis is None:
            raise StatisticsError(f"block {name}: no bases yet, step() or refresh() computes them")
        return basis.spectrum(damping, self._dtype)

    # The matrix.

    def matvec(self, vector: Vector) -> Vector:
        """Return Fhat times a vector."""
        return self._on(vector, self._product)

    def solve(self, vector: Vector) -> Vector:
        """Return Fhat^-1 times a vector, or times the columns of a tensor or array [n, k]."""
        return self._on(vector, self._solution)

    def sqrt_solve(self, vector: Vector) -> Vector:
        """Return S times a vector, for an S [n, n] with S S^T = Fhat^-1; S is not symmetric."""
        return self._on(vector, self._root_solution)

    def matmat(self, matrix: Matrix) -> Matrix:
        """Return Fhat times the columns of a tensor or array [n, k]."""
        return self._on_columns(matrix, self._product)

    rmatvec, rmatmat = matvec, matmat  # Fhat is symmetric

    def __matmul__(self, other: Matrix) -> Matrix:
        """Return ``matvec`` or ``matmat``, by the dimensions of ``other``."""
        if isinstance(other, Mapping) or other.ndim == 1:
            return self.matvec(other)
        return self.matmat(other)

    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return a draw of N(0, Fhat^-1), by parameter name.

        Args:
            generator: on the CPU; torch's own by default.
        """
        z = torch.randn(self.shape[0], generator=generator, dtype=self._dtype)
        return self.split(self.sqrt_solve(z.to(self._device)))

    def eigenvalues(self) -> dict[str, Tensor]:
        """Return the eigenvalues of every block in no order, by the block's name.

        Raises:
            OperatorError: blocks are coupled, or one has coordinates that are not orthonormal (a
                sum of two products).
        """
        skew = [
            name
            for name, made in self._spectra.items()
            if any(j is not k for j, k in zip(made.J, made.K, strict=True))
        ]
        if self._forest.parent or skew:
            what = "coupled blocks" if self._forest.parent else f"block {skew[0]}"
            raise OperatorError(f"the eigenvalues of {what} do not follow from those of factors")
        return {name: made.d.flatten() for name, made in self._spectra.items()}

    def frobenius_norm(self) -> Tensor:
        """Return the root of the sum of all squared entries of Fhat.

        Raises:
            OperatorError: see ``eigenvalues``.
        """
        norm: Tensor = torch.cat(list(self.eigenvalues().values())).square().sum().sqrt()
        return norm

    def logdet(self) -> Tensor:
        """Return log det Fhat; Xi has the determinant one."""
        # Xi is unit triangular in the order of the forest, so Lambda alone counts.
        return torch.stack([s.log_determinant() for s in self._spectra.values()]).sum()

    def trace(self) -> Tensor:
        """Return the trace of Fhat."""
        return self.diagonal().sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal of Fhat, [n]."""
        # Entries that no block covers are those of the identity.
        ones = {n: torch.ones_like(p, dtype=self._dtype) for n, p in self._parameters.items()}
        return self.flat(self._scattered(self._diagonals, ones))

    def dense(self) -> Tensor:
        """Return Fhat as a matrix [n, n], for small networks."""
        eye = torch.eye(self.shape[0], dtype=self._dtype, device=self._device)
        result: Tensor = self.matmat(eye)
        return result

    # Vectors.

    @property
    def dtype(self) -> Any:
        """Return the precision as NumPy's dtype, which SciPy asks for."""
        return torch.empty(0, dtype=self._dtype).numpy().dtype

    def flat(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Return a mapping as one tensor [n]; missing parameters are zero.

        Raises:
            OperatorError: a name is not covered, or a shape is not its parameter's.
        """
        for name, value in vector.items():
            own = self._parameters.get(name)
            if own is None or own.shape != value.shape:
                want = "is no covered parameter" if own is None else f"has shape {tuple(own.shape)}"
                raise OperatorError(f"{name!r} of shape {tuple(value.shape)}: the parameter {want}")
        given = [vector.get(n, torch.zeros_like(p)) for n, p in self._parameters.items()]
        return torch.cat([value.to(self._device, self._dtype).reshape(-1) for value in given])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the mapping that ``flat`` was given, with all parameters."""
        own = self._parameters
        parts = vector.split([p.numel() for p in own.values()])
        return {n: v.reshape(p.shape) for (n, p), v in zip(own.items(), parts, strict=True)}

    # Fhat = Xi^-1 Lambda^-1 Xi^-T: each method is one reading of it, from right to left.

    def _product(self, v: Blocks) -> Blocks:
        v = self._forest.transposed_solution(v)
        return self._forest.solution(self._each(Spectral.product, v))

    def _solution(self, v: Blocks) -> Blocks:
        v = self._forest.product(v)
        return self._forest.transposed_product(self._each(Spectral.solution, v))

    def _root_solution(self, v: Blocks) -> Blocks:
        return self._forest.transposed_product(self._each(Spectral.root_solution, v))

    def _each(self, function: Callable[[Spectral, Tensor], Tensor], v: Blocks) -> Blocks:
        return {name: function(self._spectra[name], value) for name, value in v.items()}

    @torch.no_grad()
    def _on(self, vector: Vector, function: Callable[[Blocks], Blocks]) -> Vector:
        # Results are of the kind that was given, so that SciPy's solvers get arrays back.
        if isinstance(vector, Mapping):
            return self.split(self._flat_result(self.flat(vector), function))
        if vector.ndim == 2:
            return self._on_columns(vector, function)
        given = self._tensor(vector, (self.shape[0],))
        result = self._flat_result(given, function)
        return result if isinstance(vector, Tensor) else result.cpu().numpy()

    @torch.no_grad()
    def _on_columns(self, matrix: Matrix, function: Callable[[Blocks], Blocks]) -> Matrix:
        given = self._tensor(matrix, (self.shape[0], *matrix.shape[1:2]))
        # All columns at once: each product is a batch of matrices then.
        result = torch.vmap(self._flat_result, (1, None), 1)(given, function)
        return result if isinstance(matrix, Tensor) else result.cpu().numpy()

    def _tensor(self, value: Matrix, shape: tuple[int, ...]) -> Tensor:
        if tuple(value.shape) != shape:
            raise OperatorError(f"the operator takes shape {shape}, not {tuple(value.shape)}")
        return torch.as_tensor(value).to(self._device, self._dtype)

    def _flat_result(self, vector: Tensor, function: Callable[[Blocks], Blocks]) -> Tensor:
        given = self.split(vector)
        return self.flat(self._scattered(function(self._gathered(given)), given))

    def _gathered(self, given: Mapping[str, Tensor]) -> Blocks:
        """Return each block's array [..., g, a]; vectors of covariances become columns."""
        found = {name: gathered(block, given) for name, block in self._blocks.items()}
        return {
            name: V if self._recipe.of(self._blocks[name]).two_sided else V.unsqueeze(-1)
            for name, V in found.items()
        }

    def _scattered(self, blocks: Blocks, into: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``into`` with the entries of all blocks replaced."""
        result = dict(into)
        for name, block in self._blocks.items():
            U = blocks[name] if self._recipe.of(block).two_sided else blocks[name].squeeze(-1)
            result |= scattered(block, U, result)
        return result
