"""Predicted seconds, bytes and memory of a step of data-parallel K-FAC.

The model: a step costs training, the apply, and shares of what comes less often (statistics,
refresh). The refresh takes as long as the process with the most to do. A sum of n bytes over W
processes moves 2 (W - 1) / W n bytes through every link (ring), a broadcast n; both wait for
log2 W messages (tree), a sum twice. Of gradients and statistics a share is hidden behind the
backward, which is two thirds of the training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2, prod
from typing import NamedTuple

from kfac_fx.codegen.apply_parts import symmetric_inverses
from kfac_fx.codegen.program import Program
from kfac_fx.distributed.costs import apply_operations, refresh_costs
from kfac_fx.distributed.division import Division, divide

BACKWARD = 2 / 3


@dataclass(frozen=True)
class Compute:
    """Seconds of one process.

    Attributes:
        training: forward, backward and the optimizer's update.
        statistics: recording those of its share of a batch.
        apply: preconditioning all gradients.
        refresh: by block.
    """

    training: float
    statistics: float
    apply: float
    refresh: Mapping[str, float]

    @classmethod
    def modelled(
        cls,
        program: Program,
        rows: Mapping[str, int],
        *,
        products: float,
        factorisations: float,
        launch: float = 0.0,
    ) -> Compute:
        """From operation counts.

        Args:
            rows: block -> cases times positions of a process's share of a batch.
            products, factorisations: operations a second; n^3 is one of a Cholesky inverse.
            launch: seconds that every block costs besides.
        """
        blocks, parent = program.curvature.blocks, {c.child: c.parent for c in program.couplings}
        forward = gram = 0.0
        for name, block in blocks.items():
            n = rows.get(name, 0)
            # An embedding looks its rows up, and counts them.
            counted = any(f.diagonal and f.role == "input" for f in block.factors)
            forward += 0.0 if counted else 2.0 * n * block.parameter_count
            gram += sum(2.0 * n * prod(f.shape) for f in block.factors if f.role != "count")
            if name in parent:
                pair = zip(block.dimensions, blocks[parent[name]].dimensions, strict=True)
                gram += sum(2.0 * n * one[0] * other[0] for one, other in pair)
        applied = apply_operations(program)
        costs = refresh_costs(program)
        each = launch * len(blocks)
        return cls(
            3 * forward / products + each,
            (forward + gram) / products + each,  # one more backward, without weight gradients
            applied / products + each,
            {name: cost / factorisations + launch for name, cost in costs.items()},
        )


@dataclass(frozen=True)
class Network:
    """Attributes:
    latency: seconds of a message.
    bandwidth: bytes a second of a link.
    handshake: seconds of the check before processes communicate.
    packing: seconds that a process needs to pack and unpack a byte of a symmetric matrix.
    """

    latency: float
    bandwidth: float
    handshake: float = 0.0
    packing: float = 0.0

    def sum(self, size: int, count: float) -> float:
        """Seconds of an all-reduce of so many bytes."""
        return 2 * ((size - 1) / size * count / self.bandwidth + self._hops(size))

    def broadcast(self, size: int, count: float) -> float:
        """Seconds of a broadcast."""
        return count / self.bandwidth + self._hops(size) if size > 1 and count else 0.0

    def _hops(self, size: int) -> float:
        return self.latency * ceil(log2(size))


@dataclass(frozen=True)
class Plan:
    """How the work is divided; as the options of ``DataParallel`` and ``Preconditioner``.

    Attributes:
        overlap: share of the backward behind which gradients and statistics are sent.
    """

    size: int
    statistics_every: int = 1
    refresh_every: int = 10
    memory_fraction: float = 1.0
    staleness: int = 0
    itemsize: int = 4
    overlap: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Of one step, on average; messages and memory in bytes.

    Attributes:
        seconds: by stage.
        messages: of one sum of gradients, one of statistics, one refresh, one apply.
        memory: of the process with the most: factors, inverses, and the parameters they are for.
    """

    seconds: Mapping[str, float]
    messages: Mapping[str, int]
    memory: Mapping[str, int]

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def simulate(program: Program, compute: Compute, network: Network, plan: Plan) -> Prediction:
    """Predicts a step of ``Preconditioner`` in ``plan.size`` processes."""
    blocks = program.curvature.blocks
    costs = {name: compute.refresh[name] for name in blocks}
    sizes = _inverse_sizes(program)
    gradients = {name: block.parameter_count for name, block in blocks.items()}
    elements = {name: sizes[name].whole for name in blocks}
    fraction = plan.memory_fraction
    division = divide(plan.size, program.couplings, costs, elements, gradients, fraction)
    statistics = _statistics(program)
    inverses = _added(sizes[name] for name in division.everywhere)
    messages = {
        "gradients": plan.itemsize * sum(gradients.values()),
        "statistics": plan.itemsize * statistics.sent,
        "inverses": plan.itemsize * inverses.sent,
        "updates": plan.itemsize * _updates(program, division, plan.size),
    }
    seconds = _seconds(compute, network, plan, division, messages)
    if plan.size > 1:
        halved = statistics.halved / plan.statistics_every + inverses.halved / plan.refresh_every
        seconds["packing"] = network.packing * plan.itemsize * halved
    return Prediction(seconds, messages, _memory(program, plan, division, elements))


def _seconds(
    compute: Compute,
    network: Network,
    plan: Plan,
    division: Division,
    messages: Mapping[str, int],
) -> dict[str, float]:
    size, ranks = plan.size, range(plan.size)
    load = max(sum(compute.refresh[b] for b in division.computed_by(rank)) for rank in ranks)
    alone = [rank for rank in ranks if division.kept_alone(rank)]
    seconds = {
        "training": compute.training,
        "statistics": compute.statistics / plan.statistics_every,
        "apply": compute.apply,
        # A thread hides it behind the training of the steps until it is needed.
        "refresh": max(0.0, load / plan.refresh_every - plan.staleness * compute.training),
    }
    if size == 1:
        return seconds
    if alone:  # of these blocks each process has its part of the apply
        most = max(len(division.kept_alone(rank)) for rank in ranks)
        count = len(division.owner)
        seconds["apply"] *= (len(division.everywhere) + most) / count
    sent = network.sum(size, messages["gradients"])
    sent += network.sum(size, messages["statistics"]) / plan.statistics_every
    hidden = min(sent, plan.overlap * BACKWARD * compute.training)
    seconds["sums"] = sent - hidden
    owners = len({division.owner[b] for b in division.everywhere})
    seconds["inverses"] = (
        messages["inverses"] / network.bandwidth + owners * network.broadcast(size, 1)
    ) / plan.refresh_every
    seconds["updates"] = messages["updates"] / network.bandwidth
    seconds["updates"] += len(alone) * network.broadcast(size, 1)
    calls = 1 + 1 / plan.statistics_every + 1 / plan.refresh_every
    seconds["handshakes"] = calls * network.handshake
    return seconds


class _Sizes(NamedTuple):
    """Entries: of a tensor, as it is sent, and sent as the half of a symmetric matrix."""

    whole: int
    sent: int
    halved: int

    @classmethod
    def of(cls, shape: Sequence[int], symmetric: bool) -> _Sizes:
        whole = prod(shape)
        half = whole // shape[-1] * (shape[-1] + 1) // 2 if symmetric else 0
        return cls(whole, half or whole, half)


def _added(sizes: Iterable[_Sizes]) -> _Sizes:
    return _Sizes(*(sum(column) for column in zip(_Sizes(0, 0, 0), *sizes, strict=True)))


def _inverse_sizes(program: Program) -> dict[str, _Sizes]:
    """Of each block's inverses."""
    shapes, symmetric = program.inverse_shapes(), symmetric_inverses(program.recipe)
    return {
        block: _added(
            _Sizes.of(shapes[key], key in symmetric) for key in program.inverses_of([block])
        )
        for block in program.curvature.blocks
    }


def _statistics(program: Program) -> _Sizes:
    """Of all statistics, and a flag for each."""
    found = [
        _Sizes.of(f.shape, f.role != "count" and not f.diagonal and len(f.shape) > 1)
        for block in program.curvature.blocks.values()
        for f in block.factors
    ]
    coupled = program.curvature.pairs if program.couplings else ()
    found += [_Sizes.of(f.shape, False) for pair in coupled for f in pair.factors]
    return _added([*found, *(_Sizes(0, 1, 0) for _ in found)])


def _updates(program: Program, division: Division, size: int) -> int:
    """Entries of the terms that owners send."""
    parent = {c.child: c.parent for c in program.couplings}
    blocks = program.curvature.blocks
    total = 0
    for rank in range(size):
        own: Collection[str] = division.kept_alone(rank)
        touched = {*own, *(parent[name] for name in own if name in parent)}
        total += sum(blocks[name].parameter_count for name in touched)
    return total


def _memory(
    program: Program, plan: Plan, division: Division, elements: Mapping[str, int]
) -> dict[str, int]:
    everywhere = sum(elements[name] for name in division.everywhere)
    alone = max(sum(elements[b] for b in division.kept_alone(r)) for r in range(plan.size))
    coupled = program.curvature.pairs if program.couplings else ()
    factors = sum(prod(f.shape) for b in program.curvature.blocks.values() for f in b.factors)
    factors += sum(prod(f.shape) for pair in coupled for f in pair.factors)
    parameters = sum(block.parameter_count for block in program.curvature.blocks.values())
    return {
        "parameters": plan.itemsize * parameters,
        "factors": plan.itemsize * factors,
        "inverses": plan.itemsize * (everywhere + alone),
    }
