"""The form of every approximation."""

from __future__ import annotations

from collections.abc import Mapping

from kfac_fx.codegen.covariance import Covariance, Diagonal
from kfac_fx.codegen.form import Form
from kfac_fx.codegen.kronecker import Kronecker, KroneckerSum

FORMS: Mapping[str, Form] = {
    "kronecker": Kronecker(),
    "kronecker_sum": KroneckerSum(),
    "full": Covariance(),
    "pairs": Covariance(),
    "diagonal": Diagonal(),
}
