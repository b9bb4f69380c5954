"""The processes that share a batch and the refresh: what they are asked, and one process alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.nn.parallel import DistributedDataParallel

from kfac_fx.errors import UnknownOptionError
from kfac_fx.ops.gram import Statistic
from kfac_fx.torch_internals import foreach

Net = Any
"""A network as the user gives it: a module, wrapped or not, or something else by mistake."""

if TYPE_CHECKING:
    # Likelihoods and statistics are told of workers, and are far below the generator of programs.
    from kfac_fx.codegen.program import Engine, Program

Values = list[Statistic | None]
"""One statistic a slot; None where no case of this process reached the layer."""


class StatisticSlot(NamedTuple):
    """A factor buffer as the processes see it, whose statistic they send and add up.

    Attributes:
        like: a tensor of the statistic's shape, dtype and device; its values are not read.
        symmetric: whether it holds symmetric matrices, of which half of the entries is sent.
    """

    like: Tensor
    symmetric: bool


class Agreement(NamedTuple):
    """The answer of all processes to one question.

    Attributes:
        good: whether every process can go on.
        amount: the sum of the amounts of all.
    """

    good: bool
    amount: float


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
        """Return what the network has to be called with; None for its own parameters."""

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
            parameters: the parameters by name; their values must be the same everywhere.
            seed: takes the state of the first process's generator, so that draws agree.
        """

    def agree(self, call: str, good: bool = True, amount: float = 0.0) -> Agreement:
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

    def engine(self, program: Program, like: Tensor) -> Engine:
        """Return what runs a program here: the program itself, or a part of it.

        Args:
            program: for the couplings in use.
            like: a tensor of the precision and on the device of the inverses.
        """

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors with all their entries, gathered where they are sharded."""

    def put(self, values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Copy whole tensors to those of the same names that may be sharded.

        Args:
            values: the values with all their entries, the same in all processes.
            into: every one of its names is written.
        """

    def hold(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> WholeParameters:
        """Return the parameters with all their entries, and a network to run with them."""


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

    # One process agrees with itself: each of these is one call that does nothing, so that the code
    # of a step is the same for one process and for many.

    def begin(self, what: str, parameters: Mapping[str, Tensor], seed: torch.Generator) -> None:
        pass

    def agree(self, call: str, good: bool = True, amount: float = 0.0) -> Agreement:
        return Agreement(good, amount)

    def start_sum(self, slots: Sequence[StatisticSlot], values: Values) -> Callable[[], Values]:
        return lambda: values

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        pass

    def engine(self, program: Program, like: Tensor) -> Engine:
        return program

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors

    def put(self, values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        foreach.copy_(list(into.values()), [values[name] for name in into])

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


def share_of(kept: int, workers: Workers) -> int:
    """Return how many of the first ``kept`` cases of a batch a process has.

    Case i of the batch is with process i modulo their number, as ``DistributedSampler`` deals.
    """
    return max(0, -((workers.rank - kept) // workers.size))


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is divided among processes."""
    # By its method: torch.distributed is not imported for those who train in one process.
    return hasattr(tensor, "to_local")


def own_entries(tensor: Tensor) -> Tensor:
    """Return this process's entries of a tensor, in their place, as real numbers."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return torch.view_as_real(local) if local.is_complex() else local
