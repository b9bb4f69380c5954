"""The generated preconditioner program: refresh and apply."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from kfac_fx.codegen import block_diagonal
from kfac_fx.codegen.builder import source
from kfac_fx.errors import UnsupportedStructureError
from kfac_fx.ir import CurvatureGraph
from kfac_fx.linalg.positive import floored_inverse

log = logging.getLogger("kfac_fx")


class Program:
    """A program for one curvature graph.

    ``refresh`` (factors and damping -> inverses) and ``apply`` (inverses and gradients -> updates)
    are separate, so inverses may be older than the gradients that they are applied to.

    Attributes:
        refresh_module, apply_module: the generated ``fx.GraphModule`` objects.
    """

    def __init__(
        self, curvature: CurvatureGraph, cast: Collection[str] = (), *, compile: bool = False
    ) -> None:
        if curvature.structure != "block_diagonal":
            raise UnsupportedStructureError(
                f"no program can be generated yet for structure={curvature.structure!r}; "
                "use 'block_diagonal'"
            )
        self.refresh_module = block_diagonal.emit_refresh(curvature)
        self.apply_module = block_diagonal.emit_apply(curvature, cast)
        self._curvature = curvature
        self._robust_module: fx.GraphModule | None = None
        self._refresh: Any = self.refresh_module
        self._apply: Any = self.apply_module
        if compile:
            self._refresh = torch.compile(self.refresh_module, fullgraph=True, dynamic=False)
            self._apply = torch.compile(self.apply_module, fullgraph=True, dynamic=False)
        arguments = [n.name for n in self.apply_module.graph.nodes if n.op == "placeholder"]
        self.inverse_names = tuple(arguments[: -len(curvature.covered)])

    @property
    def code(self) -> str:
        """Both programs as readable Python that needs torch alone."""
        return "\n".join(
            (
                "import torch\n\n",
                source(self.refresh_module, "refresh") + "\n",
                source(self.apply_module, "apply"),
            )
        )

    def save(self, path: str | Path) -> None:
        """Writes ``code`` to a file."""
        Path(path).write_text(self.code, encoding="utf-8")

    @torch.no_grad()
    def refresh(self, damping: Tensor, factors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inverses by name, from factors in the order of the blocks.

        Where rounding makes Cholesky fail, the inverse is taken with its eigenvalues raised to
        rounding level, which is logged.
        """
        result: dict[str, Tensor] = dict(self._refresh(damping, *factors))
        flags = {name: result.pop(name) for name in list(result) if name.startswith("failed_")}
        if flags and int(torch.stack([flag.abs().sum() for flag in flags.values()]).sum()):
            failed = [name.removeprefix("failed_") for name, flag in flags.items() if flag.any()]
            log.warning("Cholesky failed for %s: eigenvalues were raised", ", ".join(failed))
            robust = self._robust(damping, factors)
            result |= {f"{name}_inverse": robust[f"{name}_inverse"] for name in failed}
        return result

    def _robust(self, damping: Tensor, factors: Sequence[Tensor]) -> Mapping[str, Tensor]:
        if self._robust_module is None:
            with torch.no_grad():
                self._robust_module = block_diagonal.emit_refresh(self._curvature, floored_inverse)
        result: Mapping[str, Tensor] = self._robust_module(damping, *factors)
        return result

    @torch.no_grad()
    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Preconditioned gradients by parameter name; gradients in the order of ``covered``."""
        result: Mapping[str, Tensor] = self._apply(
            *(inverses[name] for name in self.inverse_names), *gradients
        )
        return result
