"""The inverse of the approximate Fisher: running averages, the generated program, its results."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kfac_fx.codegen import Program
from kfac_fx.config import TIKHONOV, CurvatureOptions, Tikhonov, choice
from kfac_fx.curvature.averages import Averages, fold, sizes
from kfac_fx.curvature.choose_couplings import chosen_couplings, mutual_informations, total
from kfac_fx.curvature.ekfac import Moments
from kfac_fx.curvature.factor_storage import storage_of
from kfac_fx.curvature.outliers import fit
from kfac_fx.curvature.parameters import CoveredParameters
from kfac_fx.errors import (
    GradientError,
    ParameterChangedError,
    StatisticsError,
    UnknownOptionError,
)
from kfac_fx.ir import Coupling, CurvatureGraph
from kfac_fx.ir.use import StatisticKey
from kfac_fx.linalg.precision import all_finite
from kfac_fx.ops import Statistic, all_buffers, switch
from kfac_fx.parallel import Engine, Workers

log = logging.getLogger("kfac_fx")


class InverseFisher:
    """Fhat^-1 of a transformed module.

    Args:
        net: carries the factor buffers.
        options: structure, damping, storage of the averages and compilation.
        generator: of the draws that round averages in bfloat16.
        workers: the processes that share the refresh.

    Attributes:
        averages: of the factors and cross factors.
        program: for the couplings in use.
        inverses: what the last refresh made; empty before.
        clamped: entries of conditionals that rounding had pushed to one, over all refreshes.

    Raises:
        UnknownOptionError: tikhonov is unknown, or not factored and there are couplings.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        curvature: CurvatureGraph,
        options: CurvatureOptions,
        generator: torch.Generator,
        workers: Workers,
    ) -> None:
        coupled = options.structure == "block_tridiagonal"
        self.curvature = curvature
        self.tikhonov = _tikhonov(options.tikhonov, curvature, coupled)
        self.guard = CoveredParameters(net, curvature.covered)
        self.clamped = 0
        switch(net, all_buffers(net), False)  # another program may have wanted more of them
        for buffer in all_buffers(net):
            buffer.grad = None
        pairs = curvature.pairs if coupled else ()
        moments = curvature.moments if options.tikhonov == "ekfac" else ()
        storage = storage_of(options.factor_storage, generator)
        self.averages = Averages(curvature, self.guard.parameters, pairs, moments, storage)
        self.moments = Moments(net, curvature, self.averages)
        self._compile = options.compile
        self._workers = workers
        self._plain = storage.plain
        self._refreshes = self._folds = 0
        self._present: tuple[float, int] | None = None
        self._silent: set[str] = set()
        self.program, self._engine = self._made(curvature.couplings if coupled else ())
        self.inverses: dict[str, Tensor] = {}

    def _made(self, couplings: Sequence[Coupling]) -> tuple[Program, Engine]:
        low = (torch.float16, torch.bfloat16)
        cast = [name for name, p in self.guard.parameters.items() if p.dtype in low]
        options: Any = {"tikhonov": self.tikhonov, "compile": self._compile}
        # Each call costs a GPU a launch and a compiler a kernel; processes divide single blocks.
        on_gpu = any(p.is_cuda for p in self.guard.parameters.values())
        options["batched"] = self._workers.size == 1 and bool(self._compile or on_gpu)
        options["plain"] = self._plain
        program = Program(self.curvature, couplings, cast, **options)
        forms = [a.like.expand(a.kept.shape) for e in self.averages.blocks.values() for a in e.kept]
        engine = self._workers.engine(program, forms, self.tikhonov)
        if self.moments.blocks and set(engine.needed()) != set(program.inverse_names):
            raise UnknownOptionError("tikhonov='ekfac' needs all inverses: memory_fraction=1.0")
        return program, engine

    def refresh_factors(self, couplings: Iterable[Coupling]) -> list[Tensor]:
        """What a refresh takes, in the order of its arguments; as kept, it reads one by one."""
        groups = [[a.kept for a in entry.kept] for entry in self.averages.blocks.values()]
        groups += [list(self.averages.cross(c, kept=True)) for c in couplings]
        return [factor for group in groups for factor in group]

    def amount(self, damping: float) -> Tensor:
        """The damping as a refresh takes it, in the precision and on the device of the inverses."""
        return torch.full_like(next(iter(self.averages.blocks.values())).like, damping)

    @property
    def factors(self) -> dict[str, tuple[Tensor, ...]]:
        """Block -> running averages, undamped."""
        return {name: entry.factors for name, entry in self.averages.blocks.items()}

    @property
    def cross_factors(self) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """(child, parent) -> running averages (A, G), child by parent."""
        return {(c.child, c.parent): self.averages.cross(c) for c in self.program.couplings}

    def fold(
        self, found: Mapping[StatisticKey, Statistic], decay: float, outlier: float = math.inf
    ) -> bool:
        """Takes new statistics into the averages; False, and nothing is, if they are no good.

        Args:
            decay: largest weight of the old averages.
            outlier: how many times longer than its average no statistic may be.
        """
        entries = self.averages.entries
        new = [entry.statistics(found) for entry in entries]
        compared = fit(entries, new, outlier) if outlier < math.inf else None
        if compared and compared.outlier:
            return False
        came = [(e.block, values) for e, values in zip(entries, new, strict=True) if values]
        if not all_finite([part for block, values in came for part in sizes(block, values)]):
            return False
        if compared and compared.swollen:
            log.warning("statistics are far shorter than the first ones: the averages start anew")
            self.averages.restart()
        silent = {e.block.name for e, s in zip(entries, new, strict=True) if s is None}
        if silent - self._silent:
            log.warning("no statistics came for %s", ", ".join(sorted(silent - self._silent)))
        self._silent |= silent
        self._folds += 1
        if fold(entries, new, decay):
            self.inverses = {}  # a block got its first statistic
        if self.inverses and self.moments.blocks:
            self.inverses = self.inverses | self.moments.scales(self.inverses["damping"])
        return True

    def keep_up(self, damping: float) -> None:
        """``refresh``, unless neither the averages nor the damping have moved since the last one.

        Inverses that come into use later than they are made count refreshes: these always run.
        """
        moved = self._present != (damping, self._folds) or not self.inverses
        if moved or self._workers.staleness:
            self.refresh(damping)

    def refresh(self, damping: float) -> None:
        """Computes the inverses from the present averages.

        Raises:
            StatisticsError: there are none yet.
        """
        if not self.averages.recorded:
            raise StatisticsError("no statistics yet: nothing to invert")
        self._choose_couplings(damping)
        amount = self.amount(damping)
        factors = self.refresh_factors(self.program.couplings)
        # A process may keep no inverse at all, but it knows that there was a refresh.
        self.inverses = self._engine.refresh(amount, factors, self.inverses) | {"damping": amount}
        self.clamped += self._engine.clamped
        if self.moments.blocks:
            self.moments.rebase(self.inverses)
            self.inverses |= self.moments.scales(amount)
        self._present = damping, self._folds

    def use(self, inverses: dict[str, Tensor]) -> None:
        """Go back to inverses that an earlier refresh made, of the same program."""
        self.inverses = inverses

    def _choose_couplings(self, damping: float) -> None:
        """Takes the forest of most mutual information at refreshes 1, 2, 4, 8, ..."""
        self._refreshes += 1
        present = self.program.couplings
        by_data = self.curvature.selection == "data" and self.averages.pairs
        if not by_data or self._refreshes & (self._refreshes - 1):
            return
        chosen = chosen_couplings(self.curvature, self.averages, damping, present)
        if chosen != present:
            log.info("other couplings are more informative: the program is generated again")
            self.program, self._engine = self._made(chosen)
            self.inverses = {}

    def mutual_information(self, couplings: Iterable[Coupling], damping: float) -> float:
        """See ``Preconditioner.mutual_information``."""
        weights = mutual_informations(self.averages, damping)
        for c in couplings:
            if (c.child, c.parent) not in weights and (c.parent, c.child) not in weights:
                raise StatisticsError(
                    f"the cross factors of {c.child} and {c.parent} are not recorded; "
                    "couplings='data' in transform() records more pairs"
                )
        return total(weights, couplings)

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse times gradients by parameter name; see ``Preconditioner.apply``."""
        if not self.inverses:
            raise StatisticsError("no inverses yet: step() or refresh() computes them")
        parameters = self.guard.parameters
        for name, gradient in gradients.items():
            if name not in parameters:
                raise GradientError(f"{name!r} is no covered parameter")
            if gradient.shape != parameters[name].shape:
                raise GradientError(
                    f"the gradient of {name} has shape {tuple(gradient.shape)}, "
                    f"the parameter has {tuple(parameters[name].shape)}"
                )
        filled = {
            n: gradients[n] if n in gradients else torch.zeros_like(p)
            for n, p in parameters.items()
        }
        updates = dict(self._engine.apply(self.inverses, list(filled.values())))
        for name, entry in self.averages.blocks.items():
            if entry.recorded == 0:  # nothing is known of its curvature
                own = self.curvature.blocks[name].parameters
                updates |= {key: gradients[key] for key in own if key in gradients}
        return {name: updates[name] for name in gradients}

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "tikhonov": self.tikhonov,
            "averages": self.averages.state(),
            "couplings": [[c.child, c.parent] for c in self.program.couplings],
            "inverses": {name: value.clone() for name, value in self.inverses.items()},
            "pending": self._engine.pending(),
            "refreshes": self._refreshes,
            "clamped": self.clamped,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores ``state``; nothing changes if the blocks do not fit.

        Raises:
            ParameterChangedError: the state belongs to other blocks.
        """
        self.averages.check(state["averages"])
        couplings = tuple(Coupling(*names) for names in state["couplings"])
        program, engine = self.program, self._engine
        if couplings != program.couplings:
            program, engine = self._made(couplings)
        known = state.get("tikhonov", "factored") == self.tikhonov  # else they are of no use
        inverses, missing = state["inverses"] if known else {}, set(engine.needed())
        if inverses and missing - set(inverses):
            raise ParameterChangedError(
                "the state_dict has the inverses of another process, or of another number of them: "
                "kfac_fx.distributed.Checkpoints saves and loads those of all"
            )
        self.averages.load(state["averages"])
        self._present = None
        self.program, self._engine = program, engine
        device = next(iter(self.guard.parameters.values())).device
        others = set(program.inverse_names) - missing
        self.inverses = {n: v.to(device).clone() for n, v in inverses.items() if n not in others}
        engine.resume(state.get("pending", ()) if inverses else ())
        self.moments.restore(self.inverses)
        self._refreshes = int(state["refreshes"])
        self.clamped = int(state["clamped"])


def _tikhonov(wanted: Tikhonov, curvature: CurvatureGraph, coupled: bool) -> Tikhonov:
    """The option, checked; blocks that it does not reach are named."""
    if choice("tikhonov", wanted, TIKHONOV) == "factored":
        return wanted
    if coupled and curvature.pairs:
        raise UnknownOptionError(
            f"tikhonov={wanted!r} is for blocks without couplings, whose conditionals would be no "
            "Kronecker form: give structure='block_diagonal' too, or tikhonov='factored'"
        )
    sums = [b.name for b in curvature.blocks.values() if b.approximation == "kronecker_sum"]
    if sums:
        log.warning("factored damping for %s: sums of two products", ", ".join(sums))
    if wanted == "ekfac":
        known = {moment.block for moment in curvature.moments}
        if not known:
            raise UnknownOptionError(
                "tikhonov='ekfac' needs transform(..., ekfac=True), and a layer that is plain"
            )
        blocks = curvature.blocks.values()
        rest = [b.name for b in blocks if b.approximation == "kronecker" and b.name not in known]
        if rest:
            log.warning("Kronecker eigenvalues for %s: no plain layers", ", ".join(rest))
    return wanted
