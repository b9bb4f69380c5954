"""How long a preconditioned gradient is: in Fhat, by what gradients agree on, and beside weights.

docs/explanation/mathematics.md, section 9, derives the rules. The step that an optimizer makes of
it is bounded in kfac_fx/optim/taken_step.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac_fx.curvature.mean_eigenvalue import NOTHING_LAGS, Scale
from kfac_fx.parallel import Workers, is_sharded, own_entries
from kfac_fx.torch_internals import foreach

RADIUS = 1e-2
"""Largest squared length of a preconditioned gradient in Fhat, before ``AdaptiveLength.factor``."""

WIDE, NARROW = 0.1, 0.02
"""Largest length of a layer's preconditioned gradient, in units of the length of its weights: where
averages are as new as the statistics, and at least, however far they have fallen behind."""

GROWTH, RETREAT = 0.1, 0.3
"""How fast the factor of all lengths follows gradients that agree with the steps before, and that
disagree. Steps too long for the noise cost more than others gain: weights wander away."""

OBLIVION = 0.05
"""How fast that factor goes back to one where rounding is all that is left of gradients."""

PAST = 0.997
"""Weight of the older of the steps before. Hundreds have to count: in few of them noise hides what
is learnt slowly, and lengths would shrink too early."""

WEAR = 0.05
"""How fast all lengths get smaller while the steps that are made of them have to be cut."""

SMALLEST_FACTOR, LARGEST_FACTOR = 0.05, 10.0
"""Limits of that factor; without the first, steps would come to rest where all is noise."""

TREND, CHANCE, BOLDEST = 0.3, 0.02, 5.0
"""How fast lambda falls where steps go the same way in flat directions; the cosine between them
that counts as chance; and how many times smaller lambda becomes."""

YOUNG, GROWN = 10, 30
"""Steps up to which lambda is not divided, and from which on it is in full. Averages of few batches
do not know which directions are flat, and early gradients agree on all."""

USUAL, LONGEST = 0.9, 1e3
"""Weight of the older in the running mean of squared lengths; the largest of these, in nats, up to
which the scale of the newest statistics is believed."""

SMALL_WEIGHT = 1e-2
"""Root mean square that weights count as at least: layers that start at zero must be able to."""


class NaturalLength:
    """Says how much of a preconditioned gradient to take, by its length in Fhat (KFC's bound).

    Args:
        largest: the trust region: the largest squared length; None for no limit.

    Attributes:
        factor: of all lengths; see ``AdaptiveLength``, here it stays 1.
        widest: the largest length of a layer's part, in units of its weights' length.
        damping_divisor: how many times less than usual a lambda that follows the curvature may be.
    """

    def __init__(self, largest: float | None) -> None:
        self.largest = largest
        self.factor = 1.0
        self.widest = math.inf
        self.damping_divisor = 1.0

    def share(
        self,
        gradient: Sequence[Tensor],
        updates: Sequence[Tensor],
        names: Sequence[str] = (),
        scale: Scale = NOTHING_LAGS,
    ) -> float:
        """Return the factor, at most 1, that a preconditioned gradient is taken with.

        Its squared length is gradient^T Fhat^-1 gradient, so that no product with Fhat is needed.

        Args:
            gradient: the gradient, as long vectors (``LayerSteps.pack``).
            updates: Fhat^-1 times it, in the same order.
            names, scale: not looked at here.

        Returns:
            NaN where an entry of either is not finite.
        """
        squared = 0.0
        for g, u in zip(gradient, updates, strict=True):
            squared += float(u.mul(g if g.element_size() > 2 else g.float()).sum())
        if not math.isfinite(squared):
            wide = _widened([gradient, updates])
            # The sum may have overflowed where all entries are finite: once more, with room.
            return self.share(wide[0], wide[1]) if wide else math.nan
        if squared <= 0 or self.largest is None:  # rounding may leave it below zero
            return 1.0
        return math.sqrt(min(1.0, self.largest / squared))

    def cut(self, kept: float | Tensor) -> None:
        """Take note of which part of the last step's length was taken, of all layers together."""

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load`` restores."""
        return {}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a ``state`` of the same rule; one of another rule changes nothing."""


class AdaptiveLength(NaturalLength):
    """Says how much of a preconditioned gradient to take, from gradients alone.

    Five things are put together (docs/explanation/mathematics.md, section 9):
    - Averages behind a Fisher that shrinks are too large, and their inverses too small, by ``lag``.
    - The length in Fhat, of the present scale, is at most the root of ``RADIUS``, and less where
      the running mean was longer.
    - ``factor`` follows the agreement of each gradient with the steps before: as long as it points
      the same way steps grow, and where noise has the upper hand they shrink. So does
      ``damping_divisor``, which also follows how steps agree where the curvature is low.
    - A layer's part is no longer than a share of its weights, ``WIDE`` to ``NARROW`` times the root
      of ``factor`` above 1: what the Fisher of well-fitted cases says of long steps is not true.
      Where rounding is all that is left of the Fisher, and of gradients, that share goes to zero.
    - ``restraint`` gets smaller with every step that was cut for being too long, for a learning
      rate that is too large would have all steps as long as the bound, in any direction.

    Args:
        quadratic: whether the loss is quadratic in the outputs. Then a nat is no measure of how far
            the Fisher of the outputs is right, which is everywhere: residuals of a thousand would
            be followed in steps of a thousandth. The share is never less than at one nat.

    Attributes:
        restraint: how much less than by the other four is taken.
    """

    def __init__(self, quadratic: bool = False) -> None:
        super().__init__(RADIUS)
        self._least = math.sqrt(RADIUS) if quadratic else 0.0
        self.widest = WIDE
        self.restraint = 1.0
        self._cuts: list[float | Tensor] = []
        self._names: tuple[str, ...] = ()
        # Sums of PAST^k times shares of gradients, and of what was made of them: [2, entries], one
        # for each long vector. Neither is made of the other: Fhat has changed since, at first by
        # powers of ten.
        self._sums: list[Tensor] = []
        self._lengths = [0.0, 0.0]  # squared: of the first in Fhat^-1, of the second's entries
        self._bold = 1.0
        self._steps = 0
        self._usual = 0.0  # running mean of squared lengths of gradients, in the newest scale

    def share(
        self,
        gradient: Sequence[Tensor],
        updates: Sequence[Tensor],
        names: Sequence[str] = (),
        scale: Scale = NOTHING_LAGS,
    ) -> float:
        """Return the factor that a preconditioned gradient is taken with, but for single layers.

        Args:
            gradient: the gradient, as long vectors.
            updates: Fhat^-1 times it, in the same order.
            names: of the parameters; others than in the last step have no agreement with it.
            scale: of the statistics.

        Returns:
            NaN where an entry is not finite: then nothing is remembered of this step.
        """
        # Products of low precisions cannot be added up. The last bit of torch.dot depends on where
        # vectors lie in memory, and a run that goes on from a checkpoint would drift away.
        g, u = (
            [v if v.element_size() > 2 else v.float() for v in vectors]
            for vectors in (gradient, updates)
        )
        if self._names != tuple(names) or len(self._sums) != len(g):
            self._names, self._sums = tuple(names), []
        # Rows of one tensor: half as many calls.
        both = [torch.stack(pair) for pair in zip(g, u, strict=True)]
        rows = [*zip(u, both, strict=True), *zip(u, self._sums, strict=False)]
        dots = [pair.mul(vector).sum(1) for vector, pair in rows]
        # One synchronisation, not two: what they are of may be on a GPU.
        if len(g) > 1:
            dots = [dot.double().to(dots[0].device) for dot in dots]
        read = torch.stack(dots).tolist()
        squared, plain, *crossed = (
            sum(dot[row] for dot in read[start : start + len(g)])
            for start in range(0, len(read), len(g))
            for row in (0, 1)
        )
        if not math.isfinite(squared):
            self._sums = []  # where all are finite the sum has overflowed: once more, with room
            wide = _widened([gradient, updates])
            return self.share(wide[0], wide[1], names, scale) if wide else math.nan
        if squared <= 0:  # by rounding
            return 1.0
        # Draws of a network that is sure and wrong have no curvature: by that scale its enormous
        # gradients would go as far as layers allow for ever, in any direction.
        lag = max(1.0, min(scale.lag, LONGEST / squared))
        length = lag * squared
        # No step of a fit gains a nat a term. Cases that are lost, and that the network is sure of,
        # only their gradient tells of, which must not find the rest in its way.
        signal = max(scale.signal, min(1.0, length))
        known = min(length, LONGEST)  # such a network's would count for hundreds of steps
        self._usual = USUAL * self._usual + (1 - USUAL) * known if self._usual else known
        goes_on = bool(crossed) and math.isfinite(sum(crossed, plain))
        if goes_on:
            cosine, trend = (
                min(max(cross / math.sqrt(max(own * past, 1e-300)), -1.0), 1.0)
                for cross, own, past in zip(crossed, (squared, plain), self._lengths, strict=True)
            )
            turn = cosine * (GROWTH if cosine > 0 else RETREAT)
            # What rounding agrees on is forgotten: it is no reason for longer steps.
            kept = 1 - OBLIVION * (1 - signal)
            moved = self.factor**kept * math.exp(turn)
            self.factor = min(max(moved, SMALLEST_FACTOR), LARGEST_FACTOR)
            moved = self._bold**kept * math.exp(TREND * (trend - CHANCE))
            self._bold = min(max(moved, 1.0), BOLDEST)
        self._steps += 1
        grown = min(max(0.0, (self._steps - YOUNG) / (GROWN - YOUNG)), 1.0)
        self.damping_divisor = (self._bold * max(self.factor, 1.0) ** 2) ** grown
        if self._cuts:
            self._wear()
        agreed = math.sqrt(max(1.0, self.factor))
        self.widest = agreed * max(NARROW, WIDE / math.sqrt(lag)) * self.restraint * signal**2
        # Batches must keep their weights: with steps of one length for all, many easy batches
        # outvote the few with rare cases, whose gradients are longer. One alone is not too long.
        taken: float = lag * max(
            self._least, math.sqrt(min(1.0, RADIUS / max(self._usual, length)))
        )
        taken *= self.factor * self.restraint
        if not goes_on:
            crossed, self._lengths, self._sums = [0.0, 0.0], [0.0, 0.0], []
        # Of older parts by the newest inverse: it changes little within those that count.
        self._lengths = [
            max(0.0, PAST**2 * past + 2 * PAST * taken * cross) + taken**2 * own
            for past, cross, own in zip(self._lengths, crossed, (squared, plain), strict=True)
        ]
        for new, old in zip(both, self._sums, strict=False):  # none before the first step
            old.mul_(PAST).add_(new, alpha=taken)
        self._sums = self._sums or [new * taken for new in both]
        return taken

    def cut(self, kept: float | Tensor) -> None:
        """Take note of which part of the last step's length was taken, of all layers together."""
        if isinstance(kept, Tensor) or kept < 1:
            self._cuts.append(kept)

    def _wear(self) -> None:
        # Here and not where it is noted: the number may be on a GPU, which is waited for anyway.
        for kept in self._cuts:
            self.restraint *= max(float(kept), 1e-6) ** WEAR
        self._cuts.clear()

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load`` restores."""
        self._wear()
        return {
            "factor": self.factor,
            "restraint": self.restraint,
            "names": list(self._names),
            "sums": [[sums[row].clone() for sums in self._sums] for row in (0, 1)],
            "lengths": list(self._lengths),
            "bold": self._bold,
            "divisor": self.damping_divisor,
            "steps": self._steps,
            "usual": self._usual,
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore a ``state`` of the same rule; one of another rule changes nothing."""
        if not state:
            return
        self.factor = float(state["factor"])
        self.restraint = float(state["restraint"])
        self._names = tuple(state["names"])
        # Earlier states have one sum, which says nothing of flat directions: both begin anew.
        sums = state.get("sums", [])
        self._sums = [torch.stack(pair).to(device) for pair in zip(*sums, strict=True)]
        self._lengths = [*state.get("lengths", self._lengths)]
        self._bold = float(state.get("bold", 1.0))
        self.damping_divisor = float(state.get("divisor", 1.0))
        self._steps = int(state.get("steps", GROWN))
        self._usual = float(state.get("usual", 0.0))


def _widened(lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return vectors in a precision in which sums of squares do not overflow; none if they are."""
    if all(vector.dtype == torch.float64 for vector in lists[0]):
        return []
    return [[vector.double() for vector in vectors] for vectors in lists]


class Excess(NamedTuple):
    """How much too long a step is.

    Attributes:
        parts: the part of each parameter's step that is too much: 0 for most; floats, or tensors
            where lengths are not read.
        kept: the part of the length of the whole step that is not.
    """

    parts: Sequence[float | Tensor]
    kept: float | Tensor


class _LayerSums(NamedTuple):
    """Layers as tensors: their members [layers, pieces], floors, and each parameter's row."""

    members: Tensor
    least: Tensor
    rows: Tensor


class LayerSteps:
    """Compares the lengths of steps, layer by layer, with those of the weights.

    Entries are handled as long vectors, one for each precision and device: few operations on much
    take the place of many on little, which is what a step of a small network consists of.

    Args:
        parameters: in the order in which steps and weights are given; sharded ones as local parts.
        layers: the number of each one's layer, in any numbering.
        workers: the processes that share sharded parameters.

    Attributes:
        reads: whether lengths are read on the host, which costs nothing where that computes them.
    """

    def __init__(
        self, parameters: Sequence[Tensor], layers: Sequence[int], workers: Workers
    ) -> None:
        here = [own_entries(parameter) for parameter in parameters]
        sharded = [is_sharded(parameter) for parameter in parameters]
        self._workers = workers
        self._plain = not any(sharded) and not any(p.is_complex() for p in parameters)
        self._like = [parameter.detach() for parameter in here]
        self._complex = [parameter.is_complex() for parameter in parameters]
        self._device = here[0].device
        self.reads = not any(sharded) and all(t.device.type == "cpu" for t in here)
        self._dtype = torch.float32
        for tensor in here:
            self._dtype = torch.promote_types(self._dtype, tensor.dtype)
        numbers = {layer: row for row, layer in enumerate(dict.fromkeys(layers))}
        self._rows = [numbers[layer] for layer in layers]
        self._least = [0.0] * len(numbers)
        for row, parameter in zip(self._rows, parameters, strict=True):
            self._least[row] += SMALL_WEIGHT**2 * parameter.numel()
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place, tensor in enumerate(here):
            kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
        self._kinds = list(kinds.values())
        # Pieces of the vectors are parameters of one layer that follow one another.
        self._sizes: list[list[int]] = []
        self._pieces: list[tuple[int, bool]] = []  # the row of each, and whether it is sharded
        for places in self._kinds:
            sizes: list[int] = []
            for place in places:
                piece = self._rows[place], sharded[place]
                if sizes and self._pieces[-1] == piece:
                    sizes[-1] += here[place].numel()
                else:
                    sizes.append(here[place].numel())
                    self._pieces.append(piece)
            self._sizes.append(sizes)
        self._any_sharded = any(sharded)
        self._sums = None if self.reads else self._layer_sums()

    def pack(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the entries of tensors, one for each parameter, as real vectors of their own.

        Args:
            tensors: in the shapes of the parameters, of which sharded ones count as local parts; or
                whole, for vectors that are not compared with weights.
        """
        if not self._plain:
            tensors = [own_entries(tensor) for tensor in tensors]
        if len(self._kinds) == 1 and len(tensors) > 1:
            return [foreach.flattened(list(tensors))]
        # Of one tensor alone it would be a view, which moves with the tensor.
        return [
            foreach.flattened([tensors[place] for place in kind])
            if len(kind) > 1
            else tensors[kind[0]].flatten().clone()
            for kind in self._kinds
        ]

    def unpack(
        self, vectors: Sequence[Tensor], excess: Excess | None = None, share: float = 1.0
    ) -> list[Tensor]:
        """Return vectors of local parts as tensors of the parameters' shapes, in their memory.

        Args:
            vectors: as ``pack`` gave them.
            excess: is taken away in place.
            share: what is left is multiplied by it, in place.
        """
        if self._plain and len(vectors) == 1:
            found = list(foreach.unflattened(vectors[0], self._like))
        else:
            found = [*self._like]
            for kind, vector in zip(self._kinds, vectors, strict=True):
                parts = foreach.unflattened(vector, [self._like[place] for place in kind])
                for place, part in zip(kind, parts, strict=True):
                    found[place] = torch.view_as_complex(part) if self._complex[place] else part
        if excess is None:
            if share != 1:
                for vector in vectors:
                    vector.mul_(share)
        elif self.reads:
            foreach.mul_(found, [share * (1 - float(much)) for much in excess.parts])
        else:
            for step, much in zip(found, excess.parts, strict=True):
                step.mul_(share * (1 - much))
        return found

    def excess(
        self,
        steps: Sequence[Tensor],
        weights: Sequence[Tensor],
        largest: float,
        *,
        packed: bool = True,
    ) -> Excess | None:
        """Return which part of each parameter's step is too much; None, or zeros, where none is.

        Args:
            steps: as vectors.
            weights: those from before the steps.
            largest: the largest length of a layer's step, in units of its weights' length.
            packed: whether weights are vectors, too, rather than the parameters.
        """
        # Norms of several tensors are one call anyway: a vector of them is made only where its
        # parts are what is compared.
        if not (packed or (self.reads and self._plain)):
            weights, packed = self.pack(weights), True
        vectors = zip([*steps, *weights] if packed else steps, self._sizes * 2, strict=False)
        pieces = [piece for vector, size in vectors for piece in vector.split(size)]
        if not packed:
            pieces += weights
        norms = list(foreach.norm(pieces, 2, self._dtype))
        if not self.reads:
            return self._unread(norms, largest)
        lengths = torch.stack(norms).tolist()
        count = len(self._pieces)
        moved, lasting = [0.0] * len(self._least), [0.0] * len(self._least)
        for length, (row, _) in zip(lengths, self._pieces, strict=False):
            moved[row] += length * length
        rows = [row for row, _ in self._pieces] if packed else self._rows
        for length, row in zip(lengths[count:], rows, strict=True):
            lasting[row] += length * length
        # A step that is not finite is not made up for.
        excess = [
            max(0.0, 1 - largest * math.sqrt(max(weight, least) / step))
            if 0 < step < math.inf
            else 0.0
            for step, weight, least in zip(moved, lasting, self._least, strict=True)
        ]
        if not any(excess):
            return None
        left = sum((1 - e) ** 2 * step for e, step in zip(excess, moved, strict=True))
        return Excess([excess[row] for row in self._rows], math.sqrt(left / sum(moved)))

    def _layer_sums(self) -> _LayerSums:
        """Return what sums over layers need on a device, made once: copies to it are waited for."""
        members = torch.zeros(len(self._least), len(self._pieces), dtype=self._dtype)
        for column, (row, sharded) in enumerate(self._pieces):
            # Whole tensors among sharded ones are in every process, and count once in all.
            whole = self._any_sharded and not sharded
            members[row, column] = 1.0 / self._workers.size if whole else 1.0
        made = members, torch.tensor(self._least, dtype=self._dtype), torch.tensor(self._rows)
        on_device = [tensor.to(self._device) for tensor in made]
        return _LayerSums(on_device[0], on_device[1], on_device[2])

    def _unread(self, norms: list[Tensor], largest: float) -> Excess:
        if self._sums is None:
            self._sums = self._layer_sums()
        members, least, rows = self._sums
        squares = torch.stack([norm.to(self._device) for norm in norms]).square_()
        sums = squares.view(2, -1) @ members.mT
        if self._any_sharded:
            self._workers.sum_([sums])
        excess = (1 - largest * (torch.maximum(sums[1], least) / sums[0]).sqrt_()).clamp_min_(0.0)
        excess = torch.where(sums[0].isfinite(), excess, 0.0)
        left = ((1 - excess).square() * sums[0]).sum() / sums[0].sum()
        pairs = zip(excess[rows].unbind(), self._like, strict=True)
        parts = [part.to(tensor.device, tensor.dtype) for part, tensor in pairs]
        return Excess(parts, left.nan_to_num(1.0).sqrt_())
