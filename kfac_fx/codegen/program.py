"""The generated preconditioner program: refresh and apply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from kfac_fx.codegen.builder import source
from kfac_fx.codegen.calls import FLOORED
from kfac_fx.codegen.compile import compiled
from kfac_fx.codegen.eigen import emit_scales
from kfac_fx.codegen.emit import emit_apply, emit_refresh, inverse_names
from kfac_fx.codegen.forms import FORMS_BY_TIKHONOV
from kfac_fx.codegen.leaf import own_functions, texts
from kfac_fx.codegen.part import converting, part_of_refresh
from kfac_fx.codegen.refresher import Refresher
from kfac_fx.codegen.stacks import ApplyOfStacks
from kfac_fx.ir import Coupling, CurvatureGraph
from kfac_fx.linalg.precision import unrounded

_USAGE = """A generated K-FAC preconditioner. It needs torch alone.

``refresh(damping, ...)``: the damping, a 0-dimensional tensor, and the factors -> inverses by name.
``failed_X`` is not zero where Cholesky failed; ``clamped_X`` and ``indefinite_X`` count entries of
conditionals that rounding had pushed to one, and say that one is not positive.
``precondition(inverses, gradients)``: gradients by parameter name -> updates by parameter name.
"""
_SCALES = """
``scales(damping, ...)``: moments of gradients in the bases -> scales, which take the place of those
of the refresh: ``inverses | scales(...)``.
"""
_PRECONDITION = """
def precondition(inverses: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return apply(*(inverses[name] for name in INVERSES), *(gradients[name] for name in PARAMETERS))
"""


class Program:
    """A program for one curvature graph.

    ``refresh`` (factors and damping -> inverses) and ``apply`` (inverses and gradients -> updates)
    are separate, so inverses may be older than the gradients that they are applied to.

    Args:
        couplings: the forest; none for block-diagonal.
        cast: parameters of lower precision than their factors.
        tikhonov: how Kronecker blocks are damped, "factored", or "exact" and "ekfac", which have
            one program.
        compile: run both through torch.compile; a name is that of its backend.
        batched: serve blocks of equal shapes together; parts of the program compute whole stacks.
        plain: whether factors come in the precision and on the device of the inverses; else a
            refresh converts each to those of the damping, where it is used first.

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
        compile: bool | str = False,
        batched: bool = False,
        plain: bool = True,
    ) -> None:
        self.forms = FORMS_BY_TIKHONOV[tikhonov]
        self.curvature, self.cast = curvature, tuple(cast)
        self.refresh_module = emit_refresh(curvature, couplings, forms=self.forms, batched=batched)
        self.apply_module = emit_apply(curvature, couplings, cast, self.forms, batched)
        arguments = [n.name for n in self.apply_module.graph.nodes if n.op == "placeholder"]
        self.inverse_names = tuple(arguments[: -len(curvature.covered)])
        self.couplings, self._tikhonov = tuple(couplings), tikhonov
        self.clamped = 0
        self._compile, self._plain = compile, plain
        self._refresh = self._refresher(lambda module: module)
        self._apply = ApplyOfStacks(self.apply_module, self.inverse_names, compile)

    @property
    def code(self) -> str:
        """The programs as a readable module that needs torch alone; its docstring says how."""
        named = {"refresh": self.refresh_module}
        if self._tikhonov == "ekfac":
            named["scales"] = emit_scales(self.curvature)
        named["apply"] = self.apply_module
        functions = own_functions(*(module.graph for module in named.values()))
        parameters, inverses = tuple(self.curvature.covered), self.inverse_names
        return "\n".join(
            (
                f'"""{_USAGE}{_SCALES if "scales" in named else ""}"""\n',
                "from __future__ import annotations\n",
                "import torch\nfrom torch import Tensor\n",
                f"INVERSES = {inverses!r}",
                f"PARAMETERS = {parameters!r}\n\n",
                texts(functions) + "\n",
                *(source(module, name) + "\n" for name, module in named.items()),
                _PRECONDITION,
            )
        )

    def save(self, path: str | Path) -> None:
        """Writes ``code`` to a file: a module that runs without kfac_fx."""
        Path(path).write_text(self.code, encoding="utf-8")

    @torch.no_grad()
    def refresh(self, damping: Tensor, factors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inverses by name.

        Where rounding makes Cholesky fail, the inverses are taken with eigenvalues raised to
        rounding level; a conditional that is not positive is left out. Both are logged.

        Args:
            factors: in the order of the blocks, then A and G (child by parent) of every coupling.
        """
        with unrounded():
            result = self._refresh(damping, factors)
        self.clamped = self._refresh.clamped
        return result

    def inverses_of(self, blocks: Collection[str]) -> tuple[str, ...]:
        """Names of the inverses that belong to blocks."""
        names = inverse_names(self.curvature, self.couplings, self.forms)
        return tuple(name for block in names if block in blocks for name in names[block])

    def part(self, blocks: Collection[str]) -> Refresher:
        """The refresh of some blocks; its arguments are those of ``refresh``."""
        wanted = self.inverses_of(blocks)
        return self._refresher(lambda module: part_of_refresh(module, wanted))

    def _refresher(self, cut: Callable[[fx.GraphModule], fx.GraphModule]) -> Refresher:
        def robust() -> fx.GraphModule:
            with torch.no_grad():
                return cut(emit_refresh(self.curvature, self.couplings, FLOORED, self.forms))

        slots = {name: block.slot for name, block in self.curvature.blocks.items()}
        given = {
            f"indefinite_{slots[c.child]}": f"{c.child} given {c.parent}" for c in self.couplings
        }
        module = cut(self.refresh_module)
        run = compiled(module if self._plain else converting(module), self._compile)
        return Refresher(run, robust, given)

    @torch.no_grad()
    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Preconditioned gradients by parameter name; gradients in the order of ``covered``."""
        result: Mapping[str, Tensor] = self._apply(inverses, gradients)
        return result
