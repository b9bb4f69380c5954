"""The processes that share a batch and the refresh; one alone unless there are more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.nn.parallel import DistributedDataParallel

from kfac_fx.codegen import Program
from kfac_fx.errors import UnknownOptionError
from kfac_fx.ops import Statistic

Values = list[Statistic | None]


class Place(NamedTuple):
    """Where a statistic goes: a tensor of its shape and dtype, and whether it is symmetric."""

    like: Tensor
    symmetric: bool


class Engine(Protocol):
    """Runs a program, or a process's part of it."""

    @property
    def clamped(self) -> int:
        """See ``Program.clamped``."""

    def needed(self) -> tuple[str, ...]:
        """Names of the inverses that this process holds."""

    def refresh(
        self, damping: Tensor, factors: Sequence[Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See ``Program.refresh``; ``present`` is what the refresh before made, if anything."""

    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """See ``Program.apply``."""

    def pending(self) -> list[dict[str, Tensor]]:
        """Inverses that are made, or being made, and not yet in use."""

    def resume(self, pending: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes ``pending`` of an interrupted run."""


class Held(Protocol):
    """The parameters as a whole, for an optimizer that runs the network itself.

    Attributes:
        net: a network that can be run with them.
    """

    net: fx.GraphModule

    def __getitem__(self, name: str) -> Tensor:
        """A parameter; while ``open``, what may be changed."""

    @property
    def given(self) -> Mapping[str, Tensor] | None:
        """What the network has to be run with; None where that is its own parameters."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Gathers them, and puts them back at the end."""


class Workers(Protocol):
    """Processes with the same network; each has its share of every batch.

    Attributes:
        rank: of this process, below ``size``.
        staleness: refreshes after which inverses come into use.
    """

    rank: int
    size: int
    staleness: int

    def unwrapped(self, net: Any) -> Any:
        """The transformed module inside of wrappers."""

    def begin(self, what: str, parameters: Mapping[str, Tensor], seed: torch.Generator) -> None:
        """Checks that all processes make the same; they go on with the first one's generator."""

    def agree(self, call: str, good: bool = True, amount: float = 0.0) -> tuple[bool, float]:
        """Whether it is good in every process, and the sum of the amounts.

        Raises:
            DesynchronisedError: another process makes another call.
            WorkerLostError: one does not come.
        """

    def start_sum(self, places: Sequence[Place], values: Values) -> Callable[[], Values]:
        """Starts the sum over the processes; what is returned waits for it.

        A value is None where a process has none, and in the sum where no process has one.
        """

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces dense tensors by their sums over the processes."""

    def engine(self, program: Program, factors: Sequence[Tensor], tikhonov: str) -> Engine:
        """What runs a program on factors of these shapes."""

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors that are sharded as a whole."""

    def put(self, value: Tensor, into: Tensor) -> None:
        """Copies a whole tensor to one that may be sharded."""

    def hold(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> Held:
        """The parameters as a whole."""


class _Whole:
    """All of a program, at once."""

    def __init__(self, program: Program) -> None:
        self._program = program

    @property
    def clamped(self) -> int:
        return self._program.clamped

    def needed(self) -> tuple[str, ...]:
        return self._program.inverse_names

    def refresh(
        self, damping: Tensor, factors: Sequence[Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return self._program.refresh(damping, factors)

    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        return self._program.apply(inverses, gradients)

    def pending(self) -> list[dict[str, Tensor]]:
        return []

    def resume(self, pending: Sequence[Mapping[str, Tensor]]) -> None:
        pass


class _Own:
    """A process's own parameters, as they are."""

    given = None

    def __init__(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> None:
        self.net, self._parameters = net, parameters

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name]

    @contextmanager
    def open(self) -> Iterator[None]:
        yield


class Alone:
    """One process."""

    rank, size, staleness = 0, 1, 0

    def unwrapped(self, net: Any) -> Any:
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

    def start_sum(self, places: Sequence[Place], values: Values) -> Callable[[], Values]:
        return lambda: values

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def engine(self, program: Program, factors: Sequence[Tensor], tikhonov: str) -> Engine:
        return _Whole(program)

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    def put(self, value: Tensor, into: Tensor) -> None:
        into.copy_(value)

    def hold(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> Held:
        return _Own(net, parameters)


ALONE = Alone()


def unwrapped(net: Any) -> Any:
    """The module inside of torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(net, "_orig_mod", net)
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner
        if inner is net:
            return net
        net = inner


def drawn_seed(generator: torch.Generator, workers: Workers) -> int:
    """The next seed; of one stream that the processes share, each takes its own."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return (seed + 0x9E3779B97F4A7C15 * workers.rank) % 2**62


def share_of(kept: int, workers: Workers) -> int:
    """How many of the first cases of a batch a process has.

    Case i of the batch is with process i modulo their number, as ``DistributedSampler`` deals.
    """
    return max(0, -((workers.rank - kept) // workers.size))
