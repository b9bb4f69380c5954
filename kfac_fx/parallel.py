"""The processes that share a batch and the refresh: what they are asked, and one process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.nn.parallel import DistributedDataParallel

from kfac_fx.errors import UnknownOptionError
from kfac_fx.ops.gram import Statistic

Net = Any
"""A network as the user gives it: a module, wrapped or not, or something else by mistake."""

Values = list[Statistic | None]
"""One statistic a slot; None where no case of this process reached the layer."""

Inverses = dict[str, Tensor]
"""Inverses by the names that the generated program gives them."""


class StatisticSlot(NamedTuple):
    """Where a statistic is added up: what the processes must know of it to send it.

    Attributes:
        like: a tensor of the statistic's shape, dtype and device; its values are not read.
        symmetric: whether it holds symmetric matrices, of which half of the entries is sent.
    """

    like: Tensor
    symmetric: bool


class RunnableProgram(Protocol):
    """A generated program, as far as running all of it needs to know.

    ``kfac_fx.codegen.Program`` fits. This file is far below codegen/, so that likelihoods and
    statistics can be told of workers without importing the generator of programs.
    """

    @property
    def inverse_names(self) -> tuple[str, ...]:
        """Names of all inverses, in the order in which a refresh makes them."""

    @property
    def clamped(self) -> int:
        """How many entries of conditionals rounding had pushed to one in the last refresh."""

    def refresh(self, damping: Tensor, factors: Sequence[Tensor]) -> Inverses:
        """Return the inverses of damped factors."""

    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the inverse times gradients, by parameter name."""


class Engine(Protocol):
    """Runs a program, or this process's part of it."""

    @property
    def clamped(self) -> int:
        """How many entries of conditionals rounding had pushed to one in the last refresh."""

    def needed(self) -> tuple[str, ...]:
        """Return the names of the inverses that this process holds."""

    def refresh(
        self, damping: Tensor, factors: Sequence[Tensor], present: Mapping[str, Tensor]
    ) -> Inverses:
        """Return the inverses that this process holds.

        Args:
            damping: [], lambda, in the precision and on the device of the inverses.
            factors: running averages in the order of the program's arguments.
            present: what the refresh before made, empty at first. A stale engine returns it again
                while the new inverses are still being computed.
        """

    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the inverse times gradients, by parameter name."""

    def pending(self) -> list[Inverses]:
        """Return inverses that are made, or being made, and not yet in use."""

    def resume(self, pending: Sequence[Mapping[str, Tensor]]) -> None:
        """Take what ``pending`` of an interrupted run returned."""


class WholeParameters(Protocol):
    """The parameters with all their entries, for an optimizer that runs the network itself.

    Attributes:
        net: a network that can be run with them.
    """

    net: fx.GraphModule

    def __getitem__(self, name: str) -> Tensor:
        """Return a parameter; while ``open``, the tensor that may be changed."""

    @property
    def given(self) -> Mapping[str, Tensor] | None:
        """What the network has to be called with; None where that is its own parameters."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Gather the parameters, and put them back at the end."""


class Workers(Protocol):
    """Processes with the same network; each has its share of every batch.

    Attributes:
        rank: number of this process, below ``size``.
        size: number of processes.
        staleness: after how many refreshes inverses come into use; 0 for at once.
    """

    rank: int
    size: int
    staleness: int

    def unwrapped(self, net: Net) -> Net:
        """Return the transformed module inside of torch.compile's and DDP's wrappers.

        Raises:
            UnknownOptionError: the module is shared by processes that these workers do not know.
        """

    def begin(self, what: str, parameters: Mapping[str, Tensor], seed: torch.Generator) -> None:
        """Check that all processes make the same object, and give them the first one's generator.

        Args:
            what: name of the class that is made.
            parameters: by name; their values must be the same everywhere.
            seed: takes the state of the first process's generator, so that draws agree.
        """

    def agree(self, call: str, good: bool = True, amount: float = 0.0) -> tuple[bool, float]:
        """Return whether it is good in every process, and the sum of the amounts.

        Args:
            call: names the step; processes that name another one are out of step.
            good: whether this process can go on.
            amount: this process's summand.

        Raises:
            DesynchronisedError: another process makes another call.
            WorkerLostError: one does not come.
        """

    def start_sum(self, slots: Sequence[StatisticSlot], values: Values) -> Callable[[], Values]:
        """Start the sum of statistics over the processes; what is returned waits for it.

        A value is None where a process has none, and in the sum where no process has one.
        """

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace dense tensors by their sums over the processes."""

    def engine(self, program: RunnableProgram, factors: Sequence[Tensor], tikhonov: str) -> Engine:
        """Return what runs a program on factors of these shapes."""

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors with all their entries, gathered where they are sharded."""

    def put(self, value: Tensor, into: Tensor) -> None:
        """Copy a whole tensor to one that may be sharded."""

    def hold(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> WholeParameters:
        """Return the parameters with all their entries, and a network to run with them."""


class _WholeProgram:
    """Runs all of a program at once; the engine of one process."""

    def __init__(self, program: RunnableProgram) -> None:
        self._program = program

    @property
    def clamped(self) -> int:
        return self._program.clamped

    def needed(self) -> tuple[str, ...]:
        return self._program.inverse_names

    def refresh(
        self, damping: Tensor, factors: Sequence[Tensor], present: Mapping[str, Tensor]
    ) -> Inverses:
        return self._program.refresh(damping, factors)

    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        return self._program.apply(inverses, gradients)

    def pending(self) -> list[Inverses]:
        return []

    def resume(self, pending: Sequence[Mapping[str, Tensor]]) -> None:
        pass


class _OwnParameters:
    """A process's own parameters, which nothing shards."""

    given = None

    def __init__(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> None:
        self.net = net
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name]

    @contextmanager
    def open(self) -> Iterator[None]:
        yield


class Alone:
    """One process: nothing is sent, and everything agrees."""

    rank = 0
    size = 1
    staleness = 0

    def unwrapped(self, net: Net) -> Net:
        # Without these checks every process would follow its own statistics, and replicas of one
        # network would drift apart without a word.
        if isinstance(net, DistributedDataParallel) and torch.distributed.get_world_size() > 1:
            raise UnknownOptionError(
                "the network is one of several processes: give "
                "workers=kfac_fx.distributed.DataParallel()"
            )
        net = unwrapped(net)
        if any(hasattr(p, "full_tensor") for p in getattr(net, "parameters", list)()):
            raise UnknownOptionError(
                "the parameters are sharded (DTensor): give "
                "workers=kfac_fx.distributed.DataParallel()"
            )
        return net

    def begin(self, what: str, parameters: Mapping[str, Tensor], seed: torch.Generator) -> None:
        pass

    def agree(self, call: str, good: bool = True, amount: float = 0.0) -> tuple[bool, float]:
        return good, amount

    def start_sum(self, slots: Sequence[StatisticSlot], values: Values) -> Callable[[], Values]:
        return lambda: values

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def engine(self, program: RunnableProgram, factors: Sequence[Tensor], tikhonov: str) -> Engine:
        return _WholeProgram(program)

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    def put(self, value: Tensor, into: Tensor) -> None:
        into.copy_(value)

    def hold(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> WholeParameters:
        return _OwnParameters(net, parameters)


ALONE = Alone()
"""The workers of every object that is not told of others."""


def unwrapped(net: Net) -> Net:
    """Return the module inside of torch.compile's and DistributedDataParallel's wrappers."""
    # Wrappers come in either order: torch.compile of DDP, or DDP of a compiled module.
    while True:
        inner = getattr(net, "_orig_mod", net)
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
        if inner is net:
            return net
        net = inner


def drawn_seed(generator: torch.Generator, workers: Workers) -> int:
    """Draw the next seed; processes that share one stream each get a seed of their own.

    The multiplier is the golden ratio's of 64 bits: seeds of neighbouring ranks lie far apart, and
    no rank's seed is another rank's next one.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    return (seed + 0x9E3779B97F4A7C15 * workers.rank) % 2**62


def share_of(kept: int, workers: Workers) -> int:
    """Return how many of the first ``kept`` cases of a batch a process has.

    Case i of the batch is with process i modulo their number, as ``DistributedSampler`` deals.
    """
    return max(0, -((workers.rank - kept) // workers.size))
