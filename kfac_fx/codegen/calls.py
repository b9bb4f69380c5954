"""The functions of ``kfac_fx.linalg`` as programs call them."""

from __future__ import annotations

from kfac_fx.codegen.leaf import leaf
from kfac_fx.linalg import conditional, damping, eigen, kronecker, positive, triangular

damped = leaf(damping.damped)
mean_eigenvalue = leaf(damping.mean_eigenvalue)
trace_ratio = leaf(damping.trace_ratio)
common_basis = leaf(kronecker.common_basis)
sum_inverse_product = leaf(kronecker.sum_inverse_product)
eigenbasis = leaf(eigen.eigenbasis)
damped_scale = leaf(eigen.damped_scale)
moment_scale = leaf(eigen.moment_scale)
eigen_product = leaf(eigen.eigen_product)
conditional_side = leaf(conditional.conditional_side)
conditional_scale = leaf(conditional.conditional_scale)
symmetric_product = leaf(triangular.symmetric_product)

CHOLESKY = positive.Factorise(*map(leaf, positive.CHOLESKY))
FLOORED = positive.Factorise(*map(leaf, positive.FLOORED))
