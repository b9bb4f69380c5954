"""The estimate of the Fisher: running averages of all statistics, and what new ones must be.

S <- epsilon S + (1 - epsilon) S_new with epsilon = min(1 - 1/k, decay) for the k-th statistic of a
block (docs/explanation/mathematics.md, section 8).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor, nn

from kfac_fx.curvature.outliers import SETTLED, Compared, fit
from kfac_fx.errors import ParameterChangedError
from kfac_fx.ir.coupling import Coupling
from kfac_fx.ir.curvature_graph import CurvatureBlock, CurvatureGraph, Holder, Moment, Pair
from kfac_fx.ir.use import StatisticKey
from kfac_fx.linalg.packing import mirror
from kfac_fx.linalg.precision import all_finite
from kfac_fx.ops.gram import Rows, Statistic, multiplied
from kfac_fx.torch_internals import foreach

log = logging.getLogger("kfac_fx")

LEAST_TERMS = 64
"""Likelihood terms that averages are over at least, where batches are large enough."""


class Usual(NamedTuple):
    """A period that the library chose, which begins with shorter ones.

    Attributes:
        early: steps, counted from 0, in which something is due besides.
        every: the period.
    """

    early: frozenset[int]
    every: int


# The averages are of one batch at first, then of two, of four: an inverse of the first, kept for a
# whole period, makes long steps in all directions that this batch did not show.
REFRESHES = Usual(frozenset((1, 2, 4, 8, 16)), 20)

# Averages of many batches move little by one more, which costs more than a step without any. The
# first ones come with the first refreshes: what is recorded between two of these was measured to
# be worth no more than the batches that the other steps make in its time.
STATISTICS = Usual(frozenset((1, 2, 4, 8)), 10)

DECAY = 0.9
"""Largest weight of the old average, where statistics are as rare as that."""


class EstimateState(TypedDict):
    """An estimate as tensors and plain values, by the names of blocks, pairs and moments."""

    factors: dict[str, list[Tensor]]
    recorded: dict[str, int]


class Folded(NamedTuple):
    """The result of a fold.

    Attributes:
        good: whether they were folded; not if one is not finite, or an outlier.
        first: whether a holder got its first, so that it has had no inverse.
        came: what was folded.
    """

    good: bool
    first: bool = False
    came: Sequence[Came] = ()


class Average:
    """One running average, kept as it is read; bases of others are in ``factor_storage``.

    Args:
        shape: the shape of the average.
        like: [], of the precision and on the device that it is read in.
        symmetric: whether it holds symmetric matrices [..., n, n].

    Attributes:
        stored: the tensor that is kept between folds, zero at first.
        upper_only: whether what is below the diagonal is out of date. Folds of many rows write one
            triangle, which halves their work; whoever reads all of it pays for the copy, once.
    """

    def __init__(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> None:
        self.stored = like.new_zeros(shape)
        self.like = like
        self.symmetric = symmetric
        self.upper_only = False

    def whole(self) -> Tensor:
        """Return what is stored, both triangles of it."""
        if self.upper_only:
            mirror(self.stored)
            self.upper_only = False
        return self.stored

    def read(self) -> Tensor:
        """Return the average in the precision and on the device of ``like``."""
        return self.whole()

    def upper(self) -> Tensor:
        """Return ``read``, but what is below a diagonal may be anything."""
        return self.stored

    def write(self, value: Tensor) -> None:
        """Replace the average by the nearest that can be stored."""
        self.stored.copy_(value)
        self.upper_only = False


class Storage(Protocol):
    """Another way to keep averages between folds than as they are read."""

    def make(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> Average:
        """Return an average of zeros; the arguments are those of ``Average``."""

    def fold(self, averages: Sequence[Average], new: Sequence[Statistic], weight: float) -> None:
        """Replace each S by (1 - weight) S + weight S_new."""


class Averages:
    """The running averages of one block, pair or moment.

    Args:
        holder: whose.
        like: [], of the precision and device of its parameters; averages are float32 at least.
        storage: how they are kept between folds; None as they are read.

    Attributes:
        keys: names of its statistics, one a factor.
        all: one average a factor.
        factors: those that are second moments, without the counts of positions.
        recorded: number of statistics in the averages.
        terms: number of likelihood terms in them, where these were told.
    """

    def __init__(self, holder: Holder, like: Tensor, storage: Storage | None) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32).to_real()
        self.holder = holder
        self.like = torch.zeros((), dtype=dtype, device=like.device)
        self.recorded = 0
        self.terms = 0.0
        make = Average if storage is None else storage.make
        of_block = isinstance(holder, CurvatureBlock)
        specs = holder.factors
        self.all = tuple(
            make(
                spec.shape,
                self.like,
                of_block and holder.tapped and len(spec.shape) > 1 and not spec.diagonal,
            )
            for spec in specs
        )
        both = zip(specs, self.all, strict=True)
        self.factors = tuple(average for spec, average in both if spec.role != "count")
        self.keys = tuple(StatisticKey(holder.slot, spec.name) for spec in specs)
        # Several uses of one form: their positions are counted together, and G is their mean
        # (docs/explanation/mathematics.md, section 4). Pairs of places: of G, of its count.
        counts = {spec.form: place for place, spec in enumerate(specs) if spec.role == "count"}
        self._counted = tuple(
            (place, counts[spec.form])
            for place, spec in enumerate(specs)
            if spec.role == "gradient" and spec.form in counts
        )

    def read(self) -> tuple[Tensor, ...]:
        """Return the averages of second moments, in the precision that they are read in."""
        return tuple(average.read() for average in self.factors)

    def taken(self, found: Mapping[StatisticKey, Statistic]) -> list[Statistic] | None:
        """Return the holder's new statistics, one a factor, or None where one did not come."""
        new = [found.get(key) for key in self.keys]
        taken = [value for value in new if value is not None]
        if len(taken) < len(new):
            return None
        for gradient, count in self._counted:
            taken[gradient] = multiplied(taken[gradient]) / multiplied(taken[count])
        return taken

    def compared(self, sizes: Sequence[Tensor]) -> list[Compared]:
        """Return ``sizes`` of new statistics beside the averages that they can be compared with.

        Second moments of inputs are about the same from the first batch on, so theirs are compared
        at once; derivatives may start at zero and grow, so theirs are once averages are settled.
        Numbers of positions are of the batch's form, and no outliers; a state is without them.
        """
        if not self.recorded:
            return []
        settled = self.recorded >= SETTLED
        present = [average.upper() for average in self.all]
        parts = zip(self.holder.factors, sizes, self.sizes(present), strict=True)
        return [
            Compared(value, average, settled)
            for spec, value, average in parts
            if spec.role == "input" or (settled and spec.role != "count")
        ]

    def sizes(self, values: Sequence[Statistic]) -> list[Tensor]:
        """Return the parts of statistics that show their size, and whether they are finite.

        Of a second moment the diagonal does: no entry is larger than the largest there. Cross
        factors are no second moments of one thing, so all of them is looked at.
        """
        if not isinstance(self.holder, CurvatureBlock):
            return [multiplied(value) for value in values]
        return [
            value.diagonal()
            if isinstance(value, Rows)
            else (value if spec.diagonal or value.dim() < 2 else value.diagonal(0, -2, -1))
            for spec, value in zip(self.holder.factors, values, strict=True)
        ]


class Came(NamedTuple):
    """Averages, the new statistics that came for them, one a factor, and the ``sizes`` of these."""

    averages: Averages
    new: list[Statistic]
    sizes: list[Tensor]


class Estimate:
    """The running averages of all blocks, of pairs of blocks, and of moments in bases.

    Args:
        curvature: the blocks.
        parameters: those that the blocks cover, by name; for precisions and devices.
        pairs: the pairs whose cross factors are wanted.
        moments: the blocks whose moments are wanted.
        storage: how averages are kept between folds; None as they are read.

    Attributes:
        blocks: the averages of blocks, by name.
        pairs: the averages of pairs, by the names of the earlier and the later block.
        moments: the averages of moments, by the block's name.
        all: those of all three, in this order.
        like: a tensor [] of the precision and on the device that averages are read in.
        folds: how often statistics were folded.
        recorded: number of statistics in the averages; the largest of all holders.
    """

    def __init__(
        self,
        curvature: CurvatureGraph,
        parameters: Mapping[str, nn.Parameter],
        pairs: Sequence[Pair] = (),
        moments: Sequence[Moment] = (),
        storage: Storage | None = None,
    ) -> None:
        self.blocks = {
            name: Averages(block, parameters[block.parameters[0]], storage)
            for name, block in curvature.blocks.items()
        }
        self.pairs = {
            (pair.earlier, pair.later): Averages(pair, self.blocks[pair.earlier].like, storage)
            for pair in pairs
        }
        self.moments = {
            moment.block: Averages(moment, self.blocks[moment.block].like, storage)
            for moment in moments
        }
        self.folds = 0
        self.recorded = 0
        self.like = next(iter(self.blocks.values())).like
        self.all = [*self.blocks.values(), *self.pairs.values(), *self.moments.values()]
        self._storage = storage
        self._silent: set[str] = set()

    @property
    def holders(self) -> list[Holder]:
        """Return the blocks, pairs and moments whose statistics are wanted, in this order."""
        return [averages.holder for averages in self.all]

    # Folding.

    @torch.no_grad()
    def fold(
        self, found: Mapping[StatisticKey, Statistic], decay: float, outlier: float = math.inf
    ) -> Folded:
        """Fold new statistics into the averages, unless they are no good.

        Args:
            found: statistics in the scale of one likelihood term, in the precision of the averages
                and on their device; counts of positions under keys of their own. For a block
                without a tap the squared gradients of its parameters, one after another. A holder
                of which one statistic is missing keeps its averages.
            decay: largest weight of the old averages, in [0, 1).
            outlier: how many times longer than its average no statistic may be.

        Returns:
            whether they were folded, and whether a holder got its first statistic.
        """
        came: list[Came] = []
        for averages in self.all:
            new = averages.taken(found)
            if new is not None:
                came.append(Came(averages, new, averages.sizes(new)))
        swollen = False
        if outlier < math.inf:  # the comparison costs a synchronisation
            pairs = [pair for each in came for pair in each.averages.compared(each.sizes)]
            fitted = fit(pairs, outlier)
            if fitted.outlier:
                return Folded(good=False)
            swollen = fitted.swollen
        if not all_finite([size for each in came for size in each.sizes]):
            return Folded(good=False)
        if swollen:
            log.warning("statistics are far shorter than the first ones: the averages start anew")
            for averages in self.all:  # all at once, as pairs share the cases of their blocks
                averages.recorded = 0
        if len(came) < len(self.all):
            self._say_silent(came)
        self.folds += 1
        return Folded(good=True, first=self._fold(came, decay), came=came)

    @torch.no_grad()
    def fold_terms(
        self, found: Mapping[StatisticKey, Statistic], terms: float, *, moments: bool = False
    ) -> bool:
        """Fold statistics into means over likelihood terms; of a pass over a data set.

        Args:
            found: statistics as ``fold`` takes them.
            terms: how many terms they are of; a holder of which one is missing does not count them.
            moments: whether those of moments are folded, rather than those of blocks and pairs.

        Returns:
            whether they were finite, so that they were folded.
        """
        others = [*self.blocks.values(), *self.pairs.values()]
        held = [*self.moments.values()] if moments else others
        pairs = ((averages, averages.taken(found)) for averages in held)
        came = [Came(of, new, of.sizes(new)) for of, new in pairs if new is not None]
        if not all_finite([size for each in came for size in each.sizes]):
            return False
        fold = fold_in_place if self._storage is None else self._storage.fold
        for averages, new, _ in came:
            averages.terms += terms
            fold(averages.all, new, terms / averages.terms)
            averages.recorded += 1
        self.folds += 1
        self.recorded = max(averages.recorded for averages in self.all)
        return True

    def _fold(self, came: Sequence[Came], decay: float) -> bool:
        """Fold statistics that are good; say whether a holder got its first."""
        first = False
        # Holders that were recorded equally often share a weight: one call for all of them.
        by_weight: dict[float, tuple[list[Average], list[Statistic]]] = {}
        for averages, new, _ in came:
            first |= averages.recorded == 0
            weight = new_weight(averages.recorded + 1, decay)
            group = by_weight.setdefault(weight, ([], []))
            group[0].extend(averages.all)
            group[1].extend(new)
        fold = fold_in_place if self._storage is None else self._storage.fold
        for weight, (old, values) in by_weight.items():
            fold(old, values, weight)
        for averages, *_ in came:  # not before: a fold that fails must not count
            averages.recorded += 1
        self.recorded = max(averages.recorded for averages in self.all)
        return first

    def _say_silent(self, came: Sequence[Came]) -> None:
        """Warn of holders that got no statistics, each of them once."""
        silent = {averages.holder.name for averages in self.all}
        silent -= {averages.holder.name for averages, *_ in came}
        if silent - self._silent:
            log.warning("no statistics came for %s", ", ".join(sorted(silent - self._silent)))
        self._silent |= silent

    # Reading.

    def cross(self, coupling: Coupling) -> tuple[Tensor, Tensor]:
        """Return (A, G) of a coupling, child by parent, as they are read."""
        found, turned = self._pair(coupling)
        A, G = found.read()
        return (A.mT.contiguous(), G.mT.contiguous()) if turned else (A, G)

    def _pair(self, coupling: Coupling) -> tuple[Averages, bool]:
        """Return a coupling's averages, and whether they are parent by child."""
        found = self.pairs.get((coupling.child, coupling.parent))
        if found is not None:
            return found, False
        return self.pairs[coupling.parent, coupling.child], True

    def arguments(self, couplings: Sequence[Coupling]) -> list[Tensor]:
        """Return what a refresh takes after the damping, in the order of its arguments.

        These are the averages as they are stored, undamped: a program of averages in other
        precisions and places reads each where it is used first.

        Args:
            couplings: those of the program.
        """
        # A plain read for most: this is done for every factor at every refresh.
        found = [
            average.whole() if average.upper_only else average.stored
            for of in self.blocks.values()
            for average in of.factors
        ]
        for coupling in couplings:
            pair, turned = self._pair(coupling)
            both = [average.whole() for average in pair.factors]
            found += [whole.mT.contiguous() for whole in both] if turned else both
        return found

    # State.

    def state(self) -> EstimateState:
        """Return tensors and counts by the names of blocks, pairs and moments."""
        return {
            "factors": {
                of.holder.name: [average.whole().clone() for average in of.factors]
                for of in self.all
            },
            "recorded": {of.holder.name: of.recorded for of in self.all},
        }

    def check(self, state: EstimateState) -> None:
        """Raise where a state belongs to other blocks.

        Raises:
            ParameterChangedError: names or shapes are others than here.
        """
        given = {name: [f.shape for f in fs] for name, fs in state["factors"].items()}
        own = {of.holder.name: [average.stored.shape for average in of.factors] for of in self.all}
        if given != own:
            raise ParameterChangedError("the state_dict belongs to other blocks than this module's")

    def load(self, state: EstimateState) -> None:
        """Restore a ``state`` that fits; see ``check``."""
        for of in self.all:
            for average, value in zip(of.factors, state["factors"][of.holder.name], strict=True):
                average.write(value)
            of.recorded = int(state["recorded"][of.holder.name])
        self.recorded = max(of.recorded for of in self.all)


def fold_in_place(averages: Sequence[Average], new: Sequence[Statistic], weight: float) -> None:
    """Replace each S by (1 - weight) S + weight S_new, all dense ones in one call.

    Args:
        averages: the averages as ``Average`` stores them.
        new: statistics in the same precision; rows are multiplied into the average directly.
        weight: the weight of the new statistics, in (0, 1].
    """
    stored: list[Tensor] = []
    values: list[Tensor] = []
    for average, value in zip(averages, new, strict=True):
        if isinstance(value, Rows):
            average.upper_only |= value.halves
            value.add_to(average.stored, weight)
        else:
            stored.append(average.stored)
            values.append(value)
    if stored:
        foreach.lerp_(stored, values, weight)


def is_due(step: int, given: int | None, usual: Usual) -> bool:
    """Say whether something is due: counted in steps, not by a clock, so that runs repeat.

    Args:
        step: counted from 0.
        given: the user's period, which is kept to from the first step on; None for ours.
        usual: ours.
    """
    if given is not None:
        return step % given == 0
    return step % usual.every == 0 or step in usual.early


def new_weight(k: int, decay: float) -> float:
    """Return 1 - epsilon_k, the weight of the k-th statistic.

    A plain mean of the first statistics, then an exponential one
    (docs/explanation/mathematics.md, section 8).
    """
    return 1 - min(1 - 1 / k, decay)


def terms_needed(recorded: int, decay: float) -> int:
    """Return how many likelihood terms the next statistic should have, after so many statistics.

    An average over k equal statistics is as good as one over their terms, so the first few must
    be larger; later the decay bounds the weight of each.
    """
    return math.ceil(LEAST_TERMS * new_weight(recorded + 1, decay))
