"""The processes of data-parallel training."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.tensor import DTensor

from kfac_fx.codegen.program import Engine, Program
from kfac_fx.distributed import sharded
from kfac_fx.distributed.buckets import Bucket, TensorForm, cut
from kfac_fx.distributed.control import Control
from kfac_fx.distributed.engine import Divided
from kfac_fx.errors import UnknownOptionError
from kfac_fx.ops.gram import multiplied
from kfac_fx.parallel import (
    ALONE,
    Agreement,
    Net,
    StatisticSlot,
    Values,
    WholeParameters,
    unwrapped,
)

BUCKET_BYTES = 25 * 2**20
"""Of a message; what DistributedDataParallel takes."""


class _Message(NamedTuple):
    """A message on its way: what is in it, its entries, and what waits for it."""

    bucket: Bucket
    flat: Tensor
    work: dist.Work


class DataParallel:
    """Processes that each have a share of every batch: ``Preconditioner(net, workers=...)``.

    W processes with shares of a batch do what one does with the whole: statistics are summed over
    the processes, each weighted by its number of likelihood terms, while the training backward
    runs. ``KFAC`` runs the network itself, so it also averages losses, gradients and products with
    the exact Fisher; everything it decides, it decides from those. With ``Preconditioner`` the
    gradients are averaged before ``step()``: by DistributedDataParallel, by FSDP2, or by the user.

    Draws (signs for statistics, dropout masks) come from one stream of seeds, the first process's
    generator; each process adds its rank. Where a part of a batch counts (tau1, tau2), case i is
    taken to be with process i modulo W, as ``DistributedSampler`` deals. What no tap records is
    squared in each process, and has no statistics where FSDP2 shards it (it is logged, its gradient
    stays as it is). Running statistics of normalisation layers are each process's own.

    Args:
        process_group: the process group of torch.distributed; None for all processes.
        memory_fraction: the share of the inverses' entries that each process may hold of blocks
            that are not its own (KAISA): 1.0 keeps all inverses everywhere, 0.0 sends
            preconditioned gradients instead.
        staleness: refreshes after which inverses come into use; above zero they are computed in a
            thread of their own meanwhile. The first are used at once.
        costs: block -> cost of its refresh, in any unit (``measured_costs``), the first process's
            for all; None for a model of it.
        timeout: seconds that a process waits for the others before it raises. It must be longer
            than the slowest process can be late, saving of a checkpoint included.
        bucket_bytes: the bytes of a message; smaller ones start earlier, larger ones cost less
            latency.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        control: agreements between them.
        group: the group of torch.distributed, which moves the data.
        traffic: bytes of the messages by purpose ("statistics", "gradients", ...).

    Raises:
        UnknownOptionError: torch.distributed is not initialised, or an option is wrong.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        memory_fraction: float = 1.0,
        staleness: int = 0,
        costs: Mapping[str, float] | None = None,
        timeout: float = 600.0,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        if not dist.is_initialized():
            raise UnknownOptionError(
                "torch.distributed.init_process_group() comes before DataParallel()"
            )
        if not (isinstance(staleness, int) and staleness >= 0 <= memory_fraction <= 1):
            raise UnknownOptionError(
                "staleness must be an integer of at least 0 and memory_fraction lie in [0, 1], got "
                f"{staleness!r} and {memory_fraction!r}"
            )
        self.memory_fraction = memory_fraction
        self.staleness = staleness
        self.costs = costs
        self.group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)
        self.control = Control(process_group, timeout)
        self.traffic: Counter[str] = Counter()
        self._bucket_bytes = bucket_bytes

    # What all processes do together: kfac_fx.parallel.Workers says what each is for.

    def unwrapped(self, net: Net) -> Net:
        return unwrapped(net)

    def begin(self, what: str, parameters: Mapping[str, Tensor], seed: torch.Generator) -> None:
        text = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in parameters.items()])
        self.agree(f"new {what} of parameters {zlib.crc32(text.encode()):08x}")
        # One number a parameter tells of replicas that differ, whatever made them so. The control's
        # gloo group moves CPU tensors only.
        sums = [p.detach().abs().double().sum() for p in parameters.values() if not _sharded(p)]
        if sums:
            self.control.same(torch.stack(sums).cpu(), "parameters")
        state = seed.get_state()
        self.control.first(state)
        seed.set_state(state)

    def agree(self, call: str, good: bool = True, amount: float = 0.0) -> Agreement:
        return self.control.agree(call, good, amount)

    def start_sum(self, slots: Sequence[StatisticSlot], values: Values) -> Callable[[], Values]:
        if self.size == 1:
            return lambda: values
        forms = [_form_of(slot) for slot in slots]
        present = torch.tensor([float(value is not None) for value in values])
        # Which values there are at all is sent with them: in float64 the flags would have a bucket,
        # and so a message, of their own.
        flags = TensorForm(present.shape, forms[0].dtype, forms[0].device)
        given = [present.to(forms[0].device)] + [multiplied(value) for value in values]
        started = self._started([flags, *forms], given, "statistics")

        def finished() -> Values:
            counts, *sums = self._finished(started, len(given), "statistics")
            assert counts is not None
            return [s if n else None for s, n in zip(sums, counts.tolist(), strict=True)]

        return finished

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        if self.size == 1:
            return
        # Sums of complex tensors are those of their parts, which every backend can add.
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        forms = [TensorForm(t.shape, t.dtype, t.device) for t in real]
        started = self._started(forms, real, "gradients")
        for tensor, total in zip(
            real, self._finished(started, len(real), "gradients"), strict=True
        ):
            assert total is not None
            tensor.copy_(total)

    def engine(self, program: Program, like: Tensor) -> Engine:
        if self.size == 1 and not self.staleness:
            return program
        return Divided(self, program, like)

    def whole(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            if _sharded(tensor):
                self.traffic["shards"] += tensor.numel() * tensor.dtype.itemsize
            with self.control.watching("gathering shards"):
                found[name] = sharded.whole(tensor)
        return found

    def put(self, values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        for name, tensor in into.items():
            sharded.put(values[name], tensor)

    def hold(self, net: fx.GraphModule, parameters: Mapping[str, Tensor]) -> WholeParameters:
        if not any(_sharded(p) for p in net.parameters()):
            return ALONE.hold(net, parameters)
        return sharded.Gathered(net, parameters)

    def watching(self, call: str = "a step") -> AbstractContextManager[None]:
        """Turn torch's own errors of communication inside (DDP's, FSDP's) into WorkerLostError.

        Args:
            call: names the step in the message.
        """
        return self.control.watching(call)

    # Messages in buckets.

    def start_broadcast(
        self,
        source: int,
        forms: Sequence[TensorForm],
        values: Sequence[Tensor | None],
        purpose: str,
    ) -> Callable[[], list[Tensor]]:
        """Start sending one process's tensors to all; what is returned waits for them.

        Args:
            source: rank of the process that has them.
            forms: the forms of the tensors, known everywhere.
            values: the tensors in that process; elsewhere they are not read.
            purpose: under which ``traffic`` counts the bytes.
        """
        started: list[_Message] = []
        for bucket in cut(forms, self._bucket_bytes):
            flat = bucket.pack(values)
            self.traffic[purpose] += flat.numel() * flat.dtype.itemsize
            with self.control.watching(purpose):
                work = dist.broadcast(flat, group=self.group, group_src=source, async_op=True)
            started.append(_Message(bucket, flat, work))

        def finished() -> list[Tensor]:
            found = self._finished(started, len(forms), purpose)
            return [value for value in found if value is not None]

        return finished

    def _started(
        self, forms: Sequence[TensorForm], values: Sequence[Tensor | None], purpose: str
    ) -> list[_Message]:
        """Start the sums of tensors over the processes; a value that is None counts as zeros."""
        started = []
        for bucket in cut(forms, self._bucket_bytes):
            flat = bucket.pack(values)
            self.traffic[purpose] += flat.numel() * flat.dtype.itemsize
            with self.control.watching(purpose):
                work = dist.all_reduce(flat, group=self.group, async_op=True)
            started.append(_Message(bucket, flat, work))
        return started

    def _finished(self, started: list[_Message], count: int, purpose: str) -> list[Tensor | None]:
        """Wait for messages; return the tensors in them by their places among ``count``."""
        found: list[Tensor | None] = [None] * count
        for message in started:
            with self.control.watching(purpose):
                message.work.wait()
            for place, value in message.bucket.unpack(message.flat):
                found[place] = value
        return found


def _sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _form_of(slot: StatisticSlot) -> TensorForm:
    # Sums of bfloat16 over many processes would lose what each of them adds.
    dtype = torch.promote_types(slot.like.dtype, torch.float32).to_real()
    return TensorForm(slot.like.shape, dtype, slot.like.device, slot.symmetric)
