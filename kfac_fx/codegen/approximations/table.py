"""The one table of approximations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kfac_fx.codegen.approximations.base import BlockApproximation
from kfac_fx.codegen.approximations.covariance import Covariance, PairedCovariances
from kfac_fx.codegen.approximations.diagonal import Diagonal
from kfac_fx.codegen.approximations.eigen_kronecker import EigenKronecker
from kfac_fx.codegen.approximations.kronecker import Kronecker
from kfac_fx.codegen.approximations.kronecker_sum import KroneckerSum

if TYPE_CHECKING:
    from kfac_fx.config import Tikhonov
    from kfac_fx.ir.use import Approximation

Table = Mapping["Approximation", BlockApproximation]
"""What each approximation that a rule may give a block does in one program."""

_FACTORED: Table = {
    "kronecker": Kronecker(),
    "kronecker_sum": KroneckerSum(),
    "full": Covariance(),
    "pairs": PairedCovariances(),
    "diagonal": Diagonal(),
}
# Sums of products keep factored damping under every option, see their class.
_EXACT: Table = {**_FACTORED, "kronecker": EigenKronecker()}

TABLES: Mapping[Tikhonov, Table] = {
    "factored": _FACTORED,
    "exact": _EXACT,
    # The same programs: the scale that a refresh finds is replaced afterwards.
    "ekfac": _EXACT,
}
"""The approximations by how Kronecker blocks are damped."""

SHAPES: Table = _FACTORED
"""For what the damping has no part in: how a block's gradients are gathered and scattered."""
