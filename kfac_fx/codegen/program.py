"""The generated preconditioner program: refresh and apply."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, fx

from kfac_fx.codegen.approximations.base import FlagKey, InverseKey, matrices_of
from kfac_fx.codegen.approximations.table import TABLES
from kfac_fx.codegen.builder import source
from kfac_fx.codegen.compile import compiled
from kfac_fx.codegen.emit import (
    FLOORED,
    Recipe,
    emit_apply,
    emit_refresh,
    emit_scales,
)
from kfac_fx.codegen.leaf import own_functions, texts
from kfac_fx.codegen.refresh_module import (
    Refreshed,
    RefreshModule,
    converting,
    depending_on,
    part_of_refresh,
)
from kfac_fx.codegen.stacks import Stacks, given_stacks
from kfac_fx.linalg.precision import unrounded

if TYPE_CHECKING:
    from kfac_fx.config import Tikhonov
    from kfac_fx.ir.coupling import Coupling
    from kfac_fx.ir.curvature_graph import CurvatureGraph

log = logging.getLogger("kfac_fx")

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


class Engine(Protocol):
    """Runs a program: all of it (``Program``), or one process's part of it."""

    def needed(self) -> tuple[InverseKey, ...]:
        """Return the keys of the inverses that this process keeps."""

    def refresh(
        self, damping: Tensor, factors: Sequence[Tensor], present: Refreshed | None = None
    ) -> Refreshed:
        """Return the inverses of damped factors.

        Args:
            damping: lambda, [], in the precision and on the device of the inverses.
            factors: averages in the order of the blocks, then A and G (child by parent) of every
                coupling.
            present: what the refresh before made. An engine whose inverses come into use later
                than they are made returns it meanwhile.
        """

    def apply(
        self, inverses: Mapping[InverseKey, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the inverse times gradients by parameter name.

        Args:
            inverses: what this process keeps.
            gradients: in the order of ``CurvatureGraph.covered``.
        """

    def pending(self) -> list[Mapping[InverseKey, Tensor]]:
        """Return inverses that are made, or being made, and not yet in use."""

    def resume(self, pending: Sequence[Mapping[str, Tensor]]) -> None:
        """Take what ``pending`` of an interrupted run returned, by the keys' names."""


class _Said(NamedTuple):
    """The numbers that tell how a refresh went.

    Attributes:
        flags: the flags.
        lost: for each inverse, whether one of its entries is not finite.
    """

    flags: list[int]
    lost: list[int]


class Refresher:
    """Runs a refresh, whole or in part, and a slower one in its place where rounding breaks it.

    Args:
        module: emitted with Cholesky factorisations.
        run: the same, compiled if it is to be.
        robust: emits the program with eigenvalues raised; called when it is needed first.
        given: slot of a child -> what is said where its conditional is not positive.
    """

    def __init__(
        self,
        module: RefreshModule,
        run: Callable[..., Mapping[str, Tensor]],
        robust: Callable[[], RefreshModule],
        given: Mapping[str, str],
    ) -> None:
        # Names are composed here, once, not at every refresh.
        self._inverses = [(key, key.name) for key in module.inverses]
        self._flags = [(flag, flag.name) for flag in module.flags]
        self._run = run
        self._robust = robust
        self._given = given
        self._whole: RefreshModule | None = None
        # The part that served last: the same blocks fail again.
        self._part: tuple[frozenset[FlagKey | InverseKey], fx.GraphModule] | None = None

    @torch.no_grad()
    def __call__(self, damping: Tensor, factors: Sequence[Tensor]) -> Refreshed:
        """Return what the program makes; see ``Engine.refresh``."""
        # Cholesky says by flags that it failed, which cost one synchronisation for all blocks; eigh
        # raises, where it does not converge, or leaves NaN without a word.
        try:
            found = self._run(damping, *factors)
            said = self._read(found)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            log.warning("eigenvalues failed (%s): the refresh is run in float64", error)
            found = self._raised(damping, factors, None)
            said = self._read(found)
        pairs = zip(self._flags, said.flags, strict=True)
        failed = [flag for (flag, _), count in pairs if count and flag.kind == "failed"]
        lost = [key for (key, _), bad in zip(self._inverses, said.lost, strict=True) if bad]
        if failed:
            names = ", ".join(f"{flag.factor}_{flag.block}" for flag in failed)
            log.warning("Cholesky failed for %s: eigenvalues were raised", names)
        elif lost:
            names = ", ".join(key.name for key in lost)
            log.warning("%s came out not finite: these are made again in float64", names)
        if failed or lost:
            again: frozenset[FlagKey | InverseKey] = frozenset(failed).union(lost)
            found = {**found, **self._raised(damping, factors, again)}
            said = self._read(found)
        flags = said.flags
        clamped = 0
        for (flag, _), count in zip(self._flags, flags, strict=True):
            if flag.kind == "clamped":
                clamped += count
            elif flag.kind == "indefinite" and count:
                log.warning(
                    "%s is not positive: the coupling is left out until the next refresh",
                    self._given[flag.block],
                )
        inverses = {key: found[name] for key, name in self._inverses}
        # LAPACK leaves them column by column, and a checkpoint row by row: products would round in
        # another order, and a run that goes on would drift away from the uninterrupted one. Pieces
        # of a stack stay pieces of one: copied singly, an apply would stack them once more.
        pieces: dict[tuple[int, torch.Size], list[InverseKey]] = {}
        for key, value in inverses.items():
            if not value.is_contiguous():
                place = value.untyped_storage().data_ptr(), value.shape
                pieces.setdefault(place, []).append(key)
        for keys in pieces.values():
            whole = torch.stack([inverses[key] for key in keys])
            inverses.update(zip(keys, whole.unbind(), strict=True))
        return Refreshed(inverses, damping, clamped)

    def _read(self, outputs: Mapping[str, Tensor]) -> _Said:
        """Return the flags in the module's order, and which inverses are not finite."""
        # One synchronisation for all. A sum meets every NaN and infinity; that one of finite
        # numbers overflows costs no more than doing them again.
        counts = [outputs[name].long().abs().sum() for _, name in self._flags]
        sums = [outputs[name].sum() for _, name in self._inverses]
        lost = [(~torch.isfinite(total)).long() for total in sums]
        numbers = torch.stack(counts + lost).tolist() if counts or lost else []
        return _Said(numbers[: len(counts)], numbers[len(counts) :])

    def _raised(
        self,
        damping: Tensor,
        factors: Sequence[Tensor],
        failed: frozenset[FlagKey | InverseKey] | None,
    ) -> Mapping[str, Tensor]:
        """Run the refresh with eigenvalues raised, in float64, on the device of the damping.

        Cholesky refuses what is not positive to working precision. Eigenvalues cost several times
        as much, so this is no default, the program is not even emitted before it is needed, and of
        it only that runs which depends on what has failed: one bad block of a large network must
        not make its refresh ten times slower.

        Args:
            damping, factors: see ``Engine.refresh``.
            failed: flags of factorisations, and keys of inverses; None for the whole.
        """
        if self._whole is None:
            self._whole = self._robust()
        module = self._whole.module
        if failed is not None:
            if self._part is None or self._part[0] != failed:
                flags = [key for key in failed if isinstance(key, FlagKey)]
                lost = {key for key in failed if isinstance(key, InverseKey)}
                wanted = lost.union(depending_on(self._whole, flags))
                self._part = (failed, part_of_refresh(self._whole, wanted).module)
            module = self._part[1]
        taken = [node for node in module.graph.nodes if node.op == "placeholder"][1:]
        given = [
            factor.to(damping.device, torch.float64) if node.users else factor
            for node, factor in zip(taken, factors, strict=True)
        ]
        found: Mapping[str, Tensor] = module(damping.double(), *given)
        return {
            name: value.to(damping.dtype) if value.is_floating_point() else value
            for name, value in found.items()
        }


class Program:
    """A program for one curvature graph.

    ``refresh`` (factors and damping -> inverses) and ``apply`` (inverses and gradients -> updates)
    are separate, so inverses may be older than the gradients that they are applied to. A program
    that one process runs alone is an ``Engine`` as it is.

    Args:
        curvature: the blocks.
        couplings: the forest; none for block-diagonal.
        cast: parameters of lower precision than their factors.
        tikhonov: how Kronecker blocks are damped; "exact" and "ekfac" have one program.
        compile: run both through torch.compile; a name is that of its backend.
        batched: serve blocks of equal shapes together; parts of the program compute whole stacks.
        plain: whether factors come in the precision and on the device of the inverses; else a
            refresh converts each to those of the damping, where it is used first.

    Attributes:
        recipe: what the programs are emitted from.
        refresh_module, apply_module: the generated ``fx.GraphModule`` objects; names of their
            arguments and outputs are those of the keys.
        couplings: the forest in use.
        inverses: keys of all inverses, in the order in which ``apply_module`` takes them.
    """

    def __init__(
        self,
        curvature: CurvatureGraph,
        couplings: Collection[Coupling] = (),
        cast: Collection[str] = (),
        *,
        tikhonov: Tikhonov = "factored",
        compile: bool | str = False,
        batched: bool = False,
        plain: bool = True,
    ) -> None:
        table = TABLES[tikhonov]
        self.recipe = Recipe(curvature, tuple(couplings), table, frozenset(cast), batched)
        self.couplings = self.recipe.couplings
        self._has_scales = tikhonov == "ekfac"
        self._compile = compile
        self._plain = plain
        self._emitted = emit_refresh(self.recipe)
        self.refresh_module = self._emitted.module
        self.apply_module = emit_apply(self.recipe)
        self._inverses = self.recipe.inverses()
        self.inverses = tuple(key for keys in self._inverses.values() for key in keys)
        # Emission and compilation are once a program, and a program is made anew only when other
        # couplings are chosen.
        self._refresh = self._refresher(None)
        # Stacks of inverses are put together when these change, not at every apply.
        self._stacks: Stacks | None = None
        module = self.apply_module
        if batched:
            module, self._stacks = given_stacks(module, self.inverses)
        self._apply = compiled(module, compile)

    @property
    def curvature(self) -> CurvatureGraph:
        """Return the blocks that the program is for."""
        return self.recipe.curvature

    @property
    def inverse_names(self) -> tuple[str, ...]:
        """Return the names of all inverses, in the order in which ``apply_module`` takes them."""
        return tuple(key.name for key in self.inverses)

    @property
    def code(self) -> str:
        """Return the programs as a readable module that needs torch alone."""
        # What is written is what runs, but for stacks and conversions: they serve speed and memory.
        named = {"refresh": self.refresh_module}
        if self._has_scales:
            named["scales"] = emit_scales(self.recipe)
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
        """Write ``code`` to a file: a module that runs without kfac_fx."""
        Path(path).write_text(self.code, encoding="utf-8")

    @torch.no_grad()
    def refresh(
        self, damping: Tensor, factors: Sequence[Tensor], present: Refreshed | None = None
    ) -> Refreshed:
        """Return the inverses of damped factors.

        Where rounding makes Cholesky fail, the inverses are taken with eigenvalues raised to
        rounding level; a conditional that is not positive is left out. Both are logged.

        Args:
            damping: lambda, [].
            factors: in the order of the blocks, then A and G (child by parent) of every coupling.
            present: not looked at; see ``Engine``.
        """
        # TF32 would make positive matrices indefinite, see there.
        with unrounded():
            return self._refresh(damping, factors)

    @torch.no_grad()
    def apply(
        self, inverses: Mapping[InverseKey, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Return preconditioned gradients by parameter name.

        Args:
            inverses: all of them.
            gradients: in the order of ``CurvatureGraph.covered``.
        """
        if self._stacks is None:
            given = [inverses[key] for key in self.inverses]
        else:
            given = self._stacks.arguments(inverses)
        result: Mapping[str, Tensor] = self._apply(*given, *gradients)
        return result

    def needed(self) -> tuple[InverseKey, ...]:
        """Return the keys of all inverses: one process alone keeps them all."""
        return self.inverses

    def pending(self) -> list[Mapping[InverseKey, Tensor]]:
        """Return nothing: inverses are in use as soon as they are made."""
        return []

    def resume(self, pending: Sequence[Mapping[str, Tensor]]) -> None:
        """Do nothing: no inverses were pending, or other processes had them."""

    def inverses_of(self, blocks: Collection[str]) -> tuple[InverseKey, ...]:
        """Return the keys of the inverses that belong to blocks."""
        return tuple(
            key for block in self._inverses if block in blocks for key in self._inverses[block]
        )

    def inverse_shapes(self) -> dict[InverseKey, torch.Size]:
        """Return the shapes of all inverses, without computing them."""
        blocks = self.curvature.blocks
        shapes = [spec.shape for block in blocks.values() for spec in matrices_of(block)]
        for c in self.couplings:
            child, parent = blocks[c.child].dimensions, blocks[c.parent].dimensions
            shapes += [(one[0], other[0]) for one, other in zip(child, parent, strict=True)]
        return self._emitted.shapes(shapes)

    def part(self, blocks: Collection[str]) -> Refresher:
        """Return the refresh of some blocks; its arguments are those of ``refresh``."""
        return self._refresher(self.inverses_of(blocks))

    def _refresher(self, wanted: Collection[InverseKey] | None) -> Refresher:
        """Return the refresh of the inverses that are wanted, or of all."""

        def cut(emitted: RefreshModule) -> RefreshModule:
            return emitted if wanted is None else part_of_refresh(emitted, wanted)

        def robust() -> RefreshModule:
            with torch.no_grad():
                return cut(emit_refresh(replace(self.recipe, batched=False), FLOORED))

        blocks = self.curvature.blocks
        given = {blocks[c.child].slot: f"{c.child} given {c.parent}" for c in self.couplings}
        emitted = cut(self._emitted)
        module = emitted.module if self._plain else converting(emitted.module)
        return Refresher(emitted, compiled(module, self._compile), robust, given)
