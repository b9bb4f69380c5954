"""Predicted seconds, bytes and memory of a step of data-parallel K-FAC.

The model: a step costs training, the apply, and shares of what comes less often (statistics,
refresh). The refresh takes as long as the process with the most to do. A sum of n bytes over W
processes moves 2 (W - 1) / W n bytes through every link (ring), a broadcast n; both wait for
log2 W messages (tree), a sum twice. Of gradients and statistics a share is hidden by the
backward, which is two thirds of the training.

So a run on many machines can be planned before they are rented: which ``memory_fraction``, how
often a refresh, in how many processes a step waits for its sums. Measured values go in:
``Compute`` and ``Network`` are taken on one machine and one link.
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
"""Share of the backward in forward and backward: two products a layer of three."""


@dataclass(frozen=True)
class Compute:
    """Seconds of one process.

    Args:
        training: forward, backward and the optimizer's update.
        statistics: recording those of its share of a batch.
        apply: preconditioning all gradients.
        refresh: seconds of each block's refresh, by name.
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
        """Return an estimate from operation counts, for machines that are not at hand.

        Args:
            program: the program of the network.
            rows: block -> cases times positions of a process's share of a batch.
            products: operations a second of matrix products, a multiplication and an addition two.
            factorisations: operations a second of decompositions; n^3 is one of a Cholesky inverse.
            launch: seconds that every block costs besides.
        """
        blocks = program.curvature.blocks
        parent = {c.child: c.parent for c in program.couplings}
        forward = gram = 0.0
        for name, block in blocks.items():
            n = rows.get(name, 0)
            # An embedding looks its rows up, and counts them: no product.
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
    """The speed of the links that carry messages.

    Args:
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
        """Return the seconds of an all-reduce of so many bytes in so many processes."""
        return 2 * ((size - 1) / size * count / self.bandwidth + self._hops(size))

    def broadcast(self, size: int, count: float) -> float:
        """Return the seconds of a broadcast of so many bytes in so many processes."""
        return count / self.bandwidth + self._hops(size) if size > 1 and count else 0.0

    def _hops(self, size: int) -> float:
        return self.latency * ceil(log2(size))


@dataclass(frozen=True)
class Plan:
    """The division of the work; as the options of ``DataParallel`` and ``Preconditioner``.

    Args:
        size: number of processes.
        statistics_every: period of the statistics, in steps.
        refresh_every: period of the refreshes, in steps.
        memory_fraction: the share of the inverses' entries that a process may hold of blocks that
            are not its own.
        staleness: refreshes after which inverses come into use.
        itemsize: bytes of an entry in messages and factors.
        overlap: share of the backward during which gradients and statistics are sent; 0 where they
            are sent after it.
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
    """The predicted time of one step, on average; messages and memory in bytes.

    Attributes:
        seconds: the seconds by stage; the step takes their sum.
        messages: the bytes that one sum of gradients, one of statistics, one refresh and one apply
            send.
        memory: the memory of the process with the most: factors, inverses, and the parameters they
            are for.
    """

    seconds: Mapping[str, float]
    messages: Mapping[str, int]
    memory: Mapping[str, int]

    @property
    def step(self) -> float:
        """Return the seconds of a step."""
        return sum(self.seconds.values())


def simulate(program: Program, compute: Compute, network: Network, plan: Plan) -> Prediction:
    """Predict a step of ``Preconditioner`` in ``plan.size`` processes.

    Args:
        program: the program of the network.
        compute: seconds of one process alone.
        network: seconds of messages.
        plan: how the work is divided.
    """
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
    """Return the seconds of each stage, averaged over the steps of a period."""
    size = plan.size
    ranks = range(size)
    load = max(sum(compute.refresh[b] for b in division.computed_by(rank)) for rank in ranks)
    alone = [rank for rank in ranks if division.kept_alone(rank)]
    seconds = {
        "training": compute.training,
        "statistics": compute.statistics / plan.statistics_every,
        "apply": compute.apply,
        # Where inverses may be stale, a thread makes them while the training goes on: only what
        # takes longer than that many steps is waited for.
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
    # Sums start as soon as a layer's backward is done, and go on beside the rest of it.
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
    """Numbers of entries of tensors.

    Attributes:
        whole: all of them.
        sent: those that go into a message.
        halved: those of them that are the half of a symmetric matrix, which takes time to pack.
    """

    whole: int
    sent: int
    halved: int

    @classmethod
    def of(cls, shape: Sequence[int], symmetric: bool) -> _Sizes:
        """Return the sizes of one tensor."""
        whole = prod(shape)
        half = whole // shape[-1] * (shape[-1] + 1) // 2 if symmetric else 0
        return cls(whole, half or whole, half)


def _added(sizes: Iterable[_Sizes]) -> _Sizes:
    """Return the sizes of several tensors together."""
    every = list(sizes)
    return _Sizes(
        sum(size.whole for size in every),
        sum(size.sent for size in every),
        sum(size.halved for size in every),
    )


def _inverse_sizes(program: Program) -> dict[str, _Sizes]:
    """Return the sizes of each block's inverses."""
    shapes, symmetric = program.inverse_shapes(), symmetric_inverses(program.recipe)
    return {
        block: _added(
            _Sizes.of(shapes[key], key in symmetric) for key in program.inverses_of([block])
        )
        for block in program.curvature.blocks
    }


def _statistics(program: Program) -> _Sizes:
    """Return the sizes of all statistics, with a flag for each that says whether it is there."""
    found = [
        _Sizes.of(f.shape, f.role != "count" and not f.diagonal and len(f.shape) > 1)
        for block in program.curvature.blocks.values()
        for f in block.factors
    ]
    coupled = program.curvature.pairs if program.couplings else ()
    found += [_Sizes.of(f.shape, False) for pair in coupled for f in pair.factors]
    flags = [_Sizes(0, 1, 0) for _ in found]
    return _added(found + flags)


def _updates(program: Program, division: Division, size: int) -> int:
    """Return how many entries of updates owners send, of blocks whose inverses they keep alone."""
    # A child's term changes its parent's update too, so that both are sent.
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
    """Return the bytes of the process that keeps the most."""
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
