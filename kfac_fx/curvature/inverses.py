"""The inverse of the approximate Fisher: an estimate, the generated program, and its results."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor, fx

from kfac_fx.codegen.approximations.base import InverseKey
from kfac_fx.codegen.approximations.table import TABLES
from kfac_fx.codegen.program import Engine, Program
from kfac_fx.codegen.refresh_module import Refreshed
from kfac_fx.config import CurvatureOptions
from kfac_fx.curvature.choose_couplings import chosen_couplings, mutual_informations, total
from kfac_fx.curvature.ekfac import Moments
from kfac_fx.curvature.estimate import Estimate, EstimateState
from kfac_fx.curvature.factor_storage import storage_of
from kfac_fx.curvature.mean_eigenvalue import (
    DAMPING_SHARE,
    Newest,
    Scale,
    mean_eigenvalue,
    rounding,
)
from kfac_fx.curvature.parameters import CoveredParameters
from kfac_fx.errors import (
    GradientError,
    ParameterChangedError,
    StatisticsError,
    UnknownOptionError,
)
from kfac_fx.ir.coupling import Coupling
from kfac_fx.ir.curvature_graph import CurvatureGraph
from kfac_fx.ir.use import StatisticKey
from kfac_fx.ops.gram import Statistic
from kfac_fx.parallel import Workers

log = logging.getLogger("kfac_fx")


class InverseState(TypedDict):
    """``InverseFisher.state``: tensors and plain values.

    ``inverses`` and ``pending`` are by the keys' names; beside the inverses stands the "damping"
    that they were made with. Without inverses the mapping is empty.
    """

    tikhonov: str
    averages: EstimateState
    newest: dict[str, float]
    mean: float
    couplings: list[list[str]]
    inverses: dict[str, Tensor]
    pending: list[dict[str, Tensor]]
    refreshes: int
    clamped: int


class InverseFisher:
    """Fhat^-1 of a transformed module.

    Args:
        net: a transformed module; EKFAC writes its bases to buffers there.
        curvature: the module's blocks.
        options: structure, damping, storage of the averages and compilation.
        generator: the generator of the draws that round averages in bfloat16.
        workers: the processes that share the refresh.

    Attributes:
        curvature: the blocks.
        covered: the parameters that they cover.
        estimate: the running averages.
        moments: EKFAC's, None unless ``tikhonov="ekfac"``.
        program: for the couplings in use.
        refreshed: what the last refresh made; None before.
        clamped: entries of conditionals that rounding had pushed to one, over all refreshes.

    Raises:
        UnknownOptionError: the damping is not factored and there are couplings, or EKFAC has no
            blocks to estimate, or not all inverses in every process.
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
        _check_damping(options, curvature)
        self.curvature = curvature
        self.covered = CoveredParameters(net, curvature.covered, curvature.frozen)
        estimated = curvature.moments if options.tikhonov == "ekfac" else ()
        storage = storage_of(options.factor_storage, generator)
        self.estimate = Estimate(
            curvature,
            self.covered.parameters,
            curvature.pairs if coupled else (),
            estimated,
            storage,
        )
        self.moments: Moments | None = None
        if estimated:
            self.moments = Moments(net, curvature.blocks, estimated, self.estimate)
        self.refreshed: Refreshed | None = None
        self.clamped = 0
        self._newest = Newest(curvature)
        self._mean = 0.0  # eigenvalue of the averages that a lambda of ours was last taken from
        self._options = options
        self._converts = storage is not None
        self._workers = workers
        self._refreshes = 0
        # The damping and number of folds that ``refreshed`` is of.
        self._made_of: tuple[float | None, int] | None = None
        self._chooses = coupled and curvature.selection == "data" and bool(curvature.pairs)
        program, engine = self._generated(curvature.couplings if coupled else ())
        self.program = program
        self._engine = engine

    def _generated(self, couplings: Sequence[Coupling]) -> tuple[Program, Engine]:
        """Return a program for couplings, and what runs it here."""
        parameters = self.covered.parameters
        low = (torch.float16, torch.bfloat16)
        on_gpu = any(parameter.is_cuda for parameter in parameters.values())
        compile = self._options.compile
        program = Program(
            self.curvature,
            couplings,
            [name for name, parameter in parameters.items() if parameter.dtype in low],
            tikhonov=self._options.tikhonov,
            compile=compile,
            # Each call costs a GPU a launch and a compiler a kernel; on a CPU stacks are copies
            # for nothing. Processes divide single blocks.
            batched=self._workers.size == 1 and bool(compile or on_gpu),
            plain=not self._converts,
        )
        engine = self._workers.engine(program, self.estimate.like)
        if self.moments is not None and set(engine.needed()) != set(program.inverses):
            raise UnknownOptionError("tikhonov='ekfac' needs all inverses: memory_fraction=1.0")
        return program, engine

    @property
    def factors(self) -> dict[str, tuple[Tensor, ...]]:
        """Return the running averages by block, undamped."""
        return {name: averages.read() for name, averages in self.estimate.blocks.items()}

    @property
    def cross_factors(self) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """Return the running averages (A, G) by (child, parent), child by parent."""
        return {(c.child, c.parent): self.estimate.cross(c) for c in self.program.couplings}

    # What a step does.

    def fold(
        self,
        found: Mapping[StatisticKey, Statistic],
        decay: float,
        outlier: float = math.inf,
        *,
        follows: bool = False,
    ) -> bool:
        """Fold new statistics into the averages; return whether they were good enough to.

        Args:
            found, decay, outlier: see ``Estimate.fold``.
            follows: whether lambda follows the averages, so that ``scale`` will be asked for.
        """
        if follows and self.scale().signal < 1:
            decay = 1.0  # what rounding has made of statistics must not take the place of others
        folded = self.estimate.fold(found, decay, outlier)
        if follows:
            self._newest.add(folded.came)
        if folded.first:
            self.refreshed = None  # it has no inverse of a block that had no statistics
        if folded.good and self.refreshed is not None and self.moments is not None:
            self.refreshed = self.moments.scaled(self.refreshed)
        return folded.good

    def follow(self, divisor: float = 1.0) -> float:
        """Return the lambda that follows the averages: a share of their mean eigenvalue.

        Args:
            divisor: how many times smaller it is: where steps agree, noise needs less of a guard.
        """
        self._mean = self.mean_eigenvalue()
        # Averages of nothing but rounding would let it go to zero, and steps along rounding grow.
        least = rounding(self.estimate.like.dtype) * self._newest.largest
        return DAMPING_SHARE * max(self._mean / divisor, least)

    def refresh(
        self, damping: float | None, divisor: float = 1.0, *, if_moved: bool = False
    ) -> None:
        """Compute the inverses from the present averages.

        Args:
            damping: lambda; None for that of ``follow``.
            divisor: see ``follow``.
            if_moved: not where neither the averages nor the damping have moved since the last time.
                Inverses that come into use later than they are made count refreshes: these run.

        Raises:
            StatisticsError: there are none yet.
        """
        if not self.estimate.recorded:
            raise StatisticsError("no statistics yet: nothing to invert")
        made_of = damping, self.estimate.folds
        if if_moved and self._made_of == made_of and self.refreshed and not self._workers.staleness:
            return
        self._refreshes += 1
        # At refreshes 1, 2, 4, 8, ...: a choice costs about a refresh, and later ones change less.
        amount = self.follow(divisor) if damping is None else damping
        if self._chooses and not self._refreshes & (self._refreshes - 1):
            self._choose_couplings(amount)
        factors = self.estimate.arguments(self.program.couplings)
        tensor = torch.full_like(self.estimate.like, amount)
        made = self._engine.refresh(tensor, factors, self.refreshed)
        self.clamped += made.clamped
        self.refreshed = made if self.moments is None else self.moments.rebase(made)
        self._made_of = made_of

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inverse times gradients of covered parameters, by name.

        Args:
            gradients: the gradients by name, in the shapes of the parameters. Parameters that are
                not given count as zero, as the inverse of a coupled block reads its neighbours'
                gradients too.

        Raises:
            StatisticsError: there are no inverses yet.
        """
        if self.refreshed is None:
            raise StatisticsError("no inverses yet: step() or refresh() computes them")
        given = [
            gradients[name] if name in gradients else torch.zeros_like(parameter)
            for name, parameter in self.covered.parameters.items()
        ]
        updates = self._engine.apply(self.refreshed.inverses, given)
        result = {name: updates[name] for name in gradients}
        for name, averages in self.estimate.blocks.items():
            if averages.recorded == 0:  # nothing is known of its curvature
                own = self.curvature.blocks[name].parameters
                result |= {key: gradients[key] for key in own if key in gradients}
        return result

    def apply(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``precondition`` of gradients that somebody gave, once they are checked.

        Raises:
            GradientError: a name is not covered, or a shape is not its parameter's.
            StatisticsError: there are no inverses yet.
        """
        parameters = self.covered.parameters
        for name, gradient in gradients.items() if self.refreshed is not None else ():
            if name not in parameters:
                raise GradientError(f"{name!r} is no covered parameter")
            if gradient.shape != parameters[name].shape:
                raise GradientError(
                    f"the gradient of {name} has shape {tuple(gradient.shape)}, "
                    f"the parameter has {tuple(parameters[name].shape)}"
                )
        return self.precondition(gradients)

    def use(self, refreshed: Refreshed | None) -> None:
        """Take inverses that an earlier refresh made; of several, an optimizer keeps the best."""
        self.refreshed = refreshed

    def damping(self, given: float | None) -> float:
        """Return the lambda that is in force.

        Args:
            given: what ``refresh`` is given. For None it is that of the inverses in use; before
                there are any, that which a refresh would take now.
        """
        if given is not None:
            return given
        if self.refreshed is None:
            return DAMPING_SHARE * self.mean_eigenvalue()
        return float(self.refreshed.damping)

    def scale(self) -> Scale:
        """Return how the newest statistics compare with the averages and with earlier ones."""
        lag = self._newest.lag(self._mean)
        least = rounding(self.estimate.like.dtype)
        return Scale(lag, min(1.0, self._newest.left() / least))

    def mean_eigenvalue(self) -> float:
        """Return the mean eigenvalue of the undamped averages; see ``mean_eigenvalue.py``."""
        return mean_eigenvalue(self.curvature, self.estimate)

    # Couplings.

    def _choose_couplings(self, damping: float) -> None:
        """Take the forest of most mutual information."""
        present = self.program.couplings
        chosen = chosen_couplings(self.curvature, self.estimate, damping, present)
        if chosen != present:
            log.info("other couplings are more informative: the program is generated again")
            program, engine = self._generated(chosen)
            self.program = program
            self._engine = engine
            self.refreshed = None

    def mutual_information(self, couplings: Iterable[Coupling], damping: float) -> float:
        """Return that of a forest's pairs, in nats; see ``Preconditioner.mutual_information``."""
        weights = mutual_informations(self.estimate, damping)
        for c in couplings:
            if (c.child, c.parent) not in weights and (c.parent, c.child) not in weights:
                raise StatisticsError(
                    f"the cross factors of {c.child} and {c.parent} are not recorded; "
                    "couplings='data' in transform() records more pairs"
                )
        return total(weights, couplings)

    # State.

    def kept_elsewhere(self) -> frozenset[InverseKey]:
        """Return the keys of inverses that other processes keep, and this one does not."""
        return frozenset(self.program.inverses) - frozenset(self._engine.needed())

    def state(self) -> InverseState:
        """Return tensors and plain values that ``load`` restores."""
        inverses: dict[str, Tensor] = {}
        if self.refreshed is not None:
            inverses = _by_name(self.refreshed.inverses)
            inverses["damping"] = self.refreshed.damping.clone()
        return {
            "tikhonov": self._options.tikhonov,
            "averages": self.estimate.state(),
            "newest": self._newest.state(),
            "mean": self._mean,
            "couplings": [[c.child, c.parent] for c in self.program.couplings],
            "inverses": inverses,
            "pending": [_by_name(pending) for pending in self._engine.pending()],
            "refreshes": self._refreshes,
            "clamped": self.clamped,
        }

    def load(self, state: InverseState) -> None:
        """Restore a ``state``; nothing changes if the blocks do not fit.

        Inverses of another damping are left out: their names are others, and they are of no use.

        Raises:
            ParameterChangedError: the state belongs to other blocks, or to another process.
        """
        self.estimate.check(state["averages"])
        couplings = tuple(Coupling(child, parent) for child, parent in state["couplings"])
        program, engine = self.program, self._engine
        if couplings != program.couplings:
            program, engine = self._generated(couplings)
        known = state.get("tikhonov", "factored") == self._options.tikhonov
        inverses = state["inverses"] if known else {}
        needed = engine.needed()
        if inverses and any(key.name not in inverses for key in needed):
            raise ParameterChangedError(
                "the state_dict has the inverses of another process, or of another number of them: "
                "kfac_fx.distributed.Checkpoints saves and loads those of all"
            )
        self.estimate.load(state["averages"])
        self._newest = Newest(self.curvature, state.get("newest", {}))
        self._mean = float(state.get("mean", 0.0))
        self._made_of = None
        self.program = program
        self._engine = engine
        self.refreshed = None
        if inverses:
            device = self.estimate.like.device
            own = {key: inverses[key.name].to(device).clone() for key in needed}
            self.refreshed = Refreshed(own, inverses["damping"].to(device).clone())
        engine.resume(state.get("pending", ()) if inverses else ())
        if self.moments is not None:
            self.moments.restore(self.refreshed)
        self._refreshes = int(state["refreshes"])
        self.clamped = int(state["clamped"])


def _by_name(inverses: Mapping[InverseKey, Tensor]) -> dict[str, Tensor]:
    return {key.name: value.clone() for key, value in inverses.items()}


def _check_damping(options: CurvatureOptions, curvature: CurvatureGraph) -> None:
    """Check the option ``tikhonov``, and name the blocks that it does not reach.

    Raises:
        UnknownOptionError: see ``InverseFisher``.
    """
    wanted = options.tikhonov
    if wanted == "factored":
        return
    if options.structure == "block_tridiagonal" and curvature.pairs:
        raise UnknownOptionError(
            f"tikhonov={wanted!r} is for blocks without couplings, whose conditionals would be no "
            "Kronecker form: give structure='block_diagonal' too, or tikhonov='factored'"
        )
    table, blocks = TABLES[wanted], curvature.blocks.values()
    factored = [block.name for block in blocks if table[block.approximation].factored]
    if factored:
        log.warning("factored damping for %s: sums of two products", ", ".join(factored))
    if wanted == "ekfac":
        known = {moment.block for moment in curvature.moments}
        if not known:
            raise UnknownOptionError(
                "tikhonov='ekfac' needs transform(..., ekfac=True), and a layer that is plain"
            )
        able = [block.name for block in blocks if table[block.approximation].estimable]
        rest = [name for name in able if name not in known]
        if rest:
            log.warning("Kronecker eigenvalues for %s: no plain layers", ", ".join(rest))
