"""The generated preconditioner program: refresh and apply."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from kfac_fx.codegen.builder import source
from kfac_fx.codegen.calls import FLOORED
from kfac_fx.codegen.emit import emit_apply, emit_refresh
from kfac_fx.codegen.forms import FORMS_BY_TIKHONOV
from kfac_fx.codegen.leaf import own_functions, texts
from kfac_fx.ir import Coupling, CurvatureGraph

log = logging.getLogger("kfac_fx")


class Program:
    """A program for one curvature graph.

    ``refresh`` (factors and damping -> inverses) and ``apply`` (inverses and gradients -> updates)
    are separate, so inverses may be older than the gradients that they are applied to.

    Args:
        couplings: the forest; none for block-diagonal.
        cast: parameters of lower precision than their factors.
        tikhonov: how Kronecker blocks are damped, "factored", or "exact" and "ekfac", which have
            one program.
        compile: run both through torch.compile.

    Attributes:
        refresh_module, apply_module: the generated ``fx.GraphModule`` objects.
        clamped: entries of conditionals that rounding had pushed to one, in the last refresh.
    """

    def __init__(
        self,
        curvature: CurvatureGraph,
        couplings: Collection[Coupling] = (),
        cast: Collection[str] = (),
        *,
        tikhonov: str = "factored",
        compile: bool = False,
    ) -> None:
        self._forms = FORMS_BY_TIKHONOV[tikhonov]
        self.refresh_module = emit_refresh(curvature, couplings, forms=self._forms)
        self.apply_module = emit_apply(curvature, couplings, cast, self._forms)
        arguments = [n.name for n in self.apply_module.graph.nodes if n.op == "placeholder"]
        self.inverse_names = tuple(arguments[: -len(curvature.covered)])
        self.couplings = tuple(couplings)
        self.clamped = 0
        self._curvature = curvature
        self._robust_module: fx.GraphModule | None = None
        self._refresh: Any = self.refresh_module
        self._apply: Any = self.apply_module
        if compile:
            self._refresh = torch.compile(self.refresh_module, fullgraph=True, dynamic=False)
            self._apply = torch.compile(self.apply_module, fullgraph=True, dynamic=False)

    @property
    def code(self) -> str:
        """Both programs as readable Python that needs torch alone."""
        functions = own_functions(self.refresh_module.graph, self.apply_module.graph)
        return "\n".join(
            (
                "from __future__ import annotations\n",
                "import torch\nfrom torch import Tensor\n\n",
                texts(functions) + "\n",
                source(self.refresh_module, "refresh") + "\n",
                source(self.apply_module, "apply"),
            )
        )

    def save(self, path: str | Path) -> None:
        """Writes ``code`` to a file."""
        Path(path).write_text(self.code, encoding="utf-8")

    @torch.no_grad()
    def refresh(self, damping: Tensor, factors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inverses by name.

        Where rounding makes Cholesky fail, the inverses are taken with eigenvalues raised to
        rounding level; a conditional that is not positive is left out. Both are logged.

        Args:
            factors: in the order of the blocks, then A and G (child by parent) of every coupling.
        """
        try:
            result, flags = _split(self._refresh(damping, *factors))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            log.warning("eigenvalues failed (%s): the refresh is run in float64", error)
            result, flags = _split(self._robust(damping, factors))
        failed = [name for name, count in flags.items() if count and name.startswith("failed_")]
        if failed:
            names = ", ".join(name.removeprefix("failed_") for name in failed)
            log.warning("Cholesky failed for %s: eigenvalues were raised", names)
            result, flags = _split(self._robust(damping, factors))
        self.clamped = sum(n for name, n in flags.items() if name.startswith("clamped_"))
        for coupling in self.couplings:
            if flags[f"indefinite_{self._curvature.blocks[coupling.child].slot}"]:
                log.warning(
                    "%s given %s is not positive: the coupling is left out until the next refresh",
                    *(coupling.child, coupling.parent),
                )
        return result

    def _robust(self, damping: Tensor, factors: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """The refresh with eigenvalues raised, in float64."""
        if self._robust_module is None:
            with torch.no_grad():
                self._robust_module = emit_refresh(
                    self._curvature, self.couplings, FLOORED, self._forms
                )
        found = self._robust_module(damping.double(), *(f.double() for f in factors))
        return {
            name: value.to(damping.dtype) if value.is_floating_point() else value
            for name, value in found.items()
        }

    @torch.no_grad()
    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Preconditioned gradients by parameter name; gradients in the order of ``covered``."""
        result: Mapping[str, Tensor] = self._apply(
            *(inverses[name] for name in self.inverse_names), *gradients
        )
        return result


_FLAGS = ("failed_", "clamped_", "indefinite_")


def _split(outputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Inverses and flags; one synchronisation for all flags."""
    inverses = {name: value for name, value in outputs.items() if not name.startswith(_FLAGS)}
    names = [name for name in outputs if name.startswith(_FLAGS)]
    if not names:
        return inverses, {}
    counts = torch.stack([outputs[name].long().abs().sum() for name in names]).tolist()
    return inverses, dict(zip(names, map(int, counts), strict=True))
