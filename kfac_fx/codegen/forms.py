"""The form of every approximation."""

from __future__ import annotations

from collections.abc import Mapping

from kfac_fx.codegen.covariance import Covariance, Diagonal
from kfac_fx.codegen.eigen import EigenKronecker
from kfac_fx.codegen.form import Form
from kfac_fx.codegen.kronecker import Kronecker, KroneckerSum

Forms = Mapping[str, Form]
"""Approximation -> form."""

FORMS: Forms = {
    "kronecker": Kronecker(),
    "kronecker_sum": KroneckerSum(),
    "full": Covariance(),
    "pairs": Covariance(),
    "diagonal": Diagonal(),
}

_EXACT: Forms = {**FORMS, "kronecker": EigenKronecker()}
FORMS_BY_TIKHONOV: Mapping[str, Forms] = {
    "factored": FORMS,
    # Sums keep factored damping: two products and the identity have no common bases.
    "exact": _EXACT,
    "ekfac": _EXACT,  # with other eigenvalues than those that the refresh finds
}
"""The forms by how Kronecker blocks are damped."""
