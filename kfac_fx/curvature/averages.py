"""Online statistics: epsilon_k = min(1 - 1/k, decay).

See docs/explanation/mathematics.md, section 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_fx.curvature.factor_storage import Average, Storage
from kfac_fx.errors import ParameterChangedError
from kfac_fx.ir import Coupling, CurvatureBlock, CurvatureGraph, Moment, Pair
from kfac_fx.ir.use import StatisticKey
from kfac_fx.ops.gram import Rows, Statistic, multiplied


@dataclass
class Entry:
    """A block or pair with its parameters, and its running averages.

    Attributes:
        stored: the averages as the storage keeps them.
        recorded: number of statistics in the averages.
    """

    block: CurvatureBlock | Pair | Moment
    parameters: tuple[nn.Parameter, ...]
    storage: Storage
    stored: tuple[Average, ...]
    recorded: int = 0

    @classmethod
    def zero(
        cls,
        block: CurvatureBlock | Pair | Moment,
        parameters: tuple[nn.Parameter, ...],
        like: Tensor,
        storage: Storage,
    ) -> Entry:
        """An entry without statistics, in the precision of ``like`` but at least float32."""
        dtype = torch.promote_types(like.dtype, torch.float32).to_real()
        like = torch.zeros((), dtype=dtype, device=like.device)
        matrices = isinstance(block, CurvatureBlock) and block.tapped
        stored = (
            storage.make(f.shape, like, matrices and len(f.shape) > 1 and not f.diagonal)
            for f in block.factors
        )
        return cls(block, parameters, storage, tuple(stored))

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The averages; copies unless the storage is plain."""
        return tuple(map(self.storage.read, self.stored))

    @property
    def halves(self) -> tuple[Tensor, ...]:
        """The same, but what is symmetric holds on and above the diagonals alone."""
        return tuple(map(self.storage.half, self.stored))

    @property
    def kept(self) -> tuple[Average, ...]:
        """As they are stored, without counts."""
        found = zip(self.block.factors, self.stored, strict=True)
        return tuple(average for spec, average in found if spec.role != "count")

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The averages without counts."""
        return tuple(map(self.storage.read, self.kept))

    @property
    def like(self) -> Tensor:
        """[], of the precision and device of the averages that are read."""
        return self.stored[0].like

    @property
    def keys(self) -> tuple[StatisticKey, ...]:
        """The names under which new statistics come, in the order of the block's factors."""
        return tuple(StatisticKey(self.block.slot, spec.name) for spec in self.block.factors)

    def statistics(self, found: Mapping[StatisticKey, Statistic]) -> list[Statistic] | None:
        """Return the new statistics of the block's factors, or None where one did not come.

        Args:
            found: statistics in the scale of one likelihood term. Counts come under their own
                keys; a block without a tap has one, flat, over all its parameters.
        """
        if any(key not in found for key in self.keys):
            return None
        result = [found[key] for key in self.keys]
        # Positions of several uses of one form are counted together
        # (docs/explanation/mathematics.md, section 4).
        specs = self.block.factors
        positions = {s.form: v for s, v in zip(specs, result, strict=True) if s.role == "count"}
        return [
            multiplied(value) / multiplied(positions[spec.form])
            if spec.role == "gradient" and spec.form in positions
            else value
            for spec, value in zip(specs, result, strict=True)
        ]


def sizes(block: CurvatureBlock | Pair | Moment, values: Sequence[Statistic]) -> list[Tensor]:
    """Parts of statistics that show their size, and whether they are finite.

    Of a second moment the diagonal does: no entry is larger than the largest there.
    """
    if not isinstance(block, CurvatureBlock):
        return [multiplied(value) for value in values]
    return [
        value.diagonal()
        if isinstance(value, Rows)
        else (value if spec.diagonal or value.dim() < 2 else value.diagonal(0, -2, -1))
        for spec, value in zip(block.factors, values, strict=True)
    ]


def new_weight(k: int, decay: float) -> float:
    """1 - epsilon_k, of the k-th statistic."""
    return 1 - min(1 - 1 / k, decay)


LEAST_TERMS = 64
"""Likelihood terms that averages are over at least, where batches are large enough."""


def terms_needed(recorded: int, decay: float) -> int:
    """Of the next statistic, after so many."""
    return math.ceil(LEAST_TERMS * new_weight(recorded + 1, decay))


@torch.no_grad()
def fold(
    entries: Sequence[Entry], new: Sequence[Sequence[Statistic] | None], decay: float
) -> list[Entry]:
    """S <- epsilon S + (1 - epsilon) S_new with epsilon = min(1 - 1/k, decay), k of the block.

    Blocks without a new statistic keep theirs. Returns the blocks that got their first.
    """
    by_weight: dict[float, tuple[list[Average], list[Statistic]]] = {}
    first = []
    for entry, statistics in zip(entries, new, strict=True):
        if statistics is None:
            continue
        first += [entry] if entry.recorded == 0 else []
        weight = new_weight(entry.recorded + 1, decay)
        averages, values = by_weight.setdefault(weight, ([], []))
        averages += entry.stored
        values += statistics
    for weight, (averages, values) in by_weight.items():
        entries[0].storage.fold(averages, values, weight)
    for entry, statistics in zip(entries, new, strict=True):
        entry.recorded += statistics is not None
    return first


class Averages:
    """The running averages of all blocks, of pairs of blocks, and of moments in bases.

    Args:
        parameters: those that the blocks cover, by name.
        pairs: the pairs whose cross factors are wanted.
        moments: the blocks whose moments are wanted.
        storage: of all averages.
    """

    def __init__(
        self,
        curvature: CurvatureGraph,
        parameters: Mapping[str, nn.Parameter],
        pairs: Sequence[Pair],
        moments: Sequence[Moment],
        storage: Storage,
    ) -> None:
        self.blocks = {
            name: Entry.zero(
                block,
                tuple(parameters[n] for n in block.parameters),
                parameters[block.parameters[0]],
                storage,
            )
            for name, block in curvature.blocks.items()
        }
        self.pairs = {
            (pair.earlier, pair.later): Entry.zero(
                pair, (), self.blocks[pair.earlier].like, storage
            )
            for pair in pairs
        }
        self.moments = {
            m.block: Entry.zero(m, (), self.blocks[m.block].like, storage) for m in moments
        }
        holders = self.blocks, self.pairs, self.moments
        self.entries: list[Entry] = [entry for held in holders for entry in held.values()]

    @property
    def recorded(self) -> int:
        """Number of statistics in the averages; the largest of all blocks."""
        return max((entry.recorded for entry in self.entries), default=0)

    def restart(self) -> None:
        """The next statistics replace the averages; all at once, as pairs share their cases."""
        for entry in self.entries:
            entry.recorded = 0

    def cross(self, coupling: Coupling, *, kept: bool = False) -> tuple[Tensor, Tensor]:
        """(A, G) of a coupling, child by parent; as read, or as ``kept``."""
        found = self.pairs.get((coupling.child, coupling.parent))
        entry = found or self.pairs[coupling.parent, coupling.child]
        A, G = (a.kept for a in entry.stored) if kept else entry.averages
        return (A, G) if found else (A.mT.contiguous(), G.mT.contiguous())

    def state(self) -> dict[str, Any]:
        """Names of blocks or pairs -> tensors and counts."""
        return {
            "factors": {e.block.name: [a.kept.clone() for a in e.kept] for e in self.entries},
            "recorded": {e.block.name: e.recorded for e in self.entries},
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Raises ParameterChangedError where the state belongs to other blocks."""
        own = {entry.block.name: entry for entry in self.entries}
        given = {name: [f.shape for f in fs] for name, fs in state["factors"].items()}
        if given != {name: [a.kept.shape for a in entry.kept] for name, entry in own.items()}:
            raise ParameterChangedError("the state_dict belongs to other blocks than this module's")

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores a ``state`` that fits."""
        for entry in self.entries:
            name = entry.block.name
            for average, value in zip(entry.kept, state["factors"][name], strict=True):
                entry.storage.write(average, value)
            entry.recorded = int(state["recorded"][name])
