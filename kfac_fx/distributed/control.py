"""The handshake before processes communicate: the same call everywhere, or a clear error."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_fx.errors import DesynchronisedError, KFACError, WorkerLostError
from kfac_fx.parallel import Agreement
from kfac_fx.torch_internals.error_texts import of_communication


class Control:
    """A gloo group of its own, beside the one that moves the data.

    On it a process that has ended, and one that makes another call, are noticed before any
    communication that would wait for them; its messages are a few numbers.

    Args:
        group: the processes; None for all.
        timeout: seconds that a process waits for the others before it raises.

    Attributes:
        calls: how many agreements there have been.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        self._timeout = timeout
        self.calls = 0
        with self.watching("setting up"):
            self._group = dist.new_group(
                dist.get_process_group_ranks(group),
                timeout=timedelta(seconds=timeout),
                backend="gloo",
                use_local_synchronization=group is not None,
            )

    def agree(self, call: str, good: bool, amount: float) -> Agreement:
        """Return whether it is good in every process, and the sum of the amounts.

        Args:
            call: names the step, the same in all processes.
            good: whether this process can go on.
            amount: this process's summand.

        Raises:
            DesynchronisedError: another process makes another call.
            WorkerLostError: one does not come.
        """
        self.calls += 1
        # The number of the call is part of the code: a process that skipped a step names the same
        # call, but not at the same time.
        code = zlib.crc32(f"{self.calls} {call}".encode())
        own = torch.tensor([float(code), float(good), amount], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self._size)]
        with self.watching(call):
            dist.all_gather(found, own, self._group)
            codes, goods, amounts = torch.stack(found).T
            if not bool((codes == codes[0]).all()):
                self._tell(call)
        return Agreement(bool(goods.all()), float(amounts.sum()))

    def _tell(self, call: str) -> None:
        """Gather the names of all calls, which are long, and raise DesynchronisedError."""
        calls: list[str] = [""] * self._size
        dist.all_gather_object(calls, f"call {self.calls} {call!r}", self._group)
        lines = ", ".join(f"process {rank}: {text}" for rank, text in enumerate(calls))
        raise DesynchronisedError(
            f"the processes do not make the same calls ({lines}): every process must take the same "
            "number of steps and observe the same number of batches"
        )

    def same(self, numbers: Tensor, what: str) -> None:
        """Check that float64 numbers are equal in all processes.

        Args:
            numbers: this process's, on the CPU.
            what: names them in the message.

        Raises:
            DesynchronisedError: they differ.
            WorkerLostError: a process does not come.
        """
        found = [torch.empty_like(numbers) for _ in range(self._size)]
        with self.watching(what):
            dist.all_gather(found, numbers, self._group)
        if any(not torch.equal(other, found[0]) for other in found):
            raise DesynchronisedError(f"{what} differ between the processes: broadcast them first")

    def first(self, value: Tensor) -> None:
        """Replace a CPU tensor by the first process's."""
        with self.watching("the first process's values"):
            dist.broadcast(value, group=self._group, group_src=0)

    @contextmanager
    def watching(self, call: str) -> Iterator[None]:
        """Turn torch's errors of communication inside into WorkerLostError; others pass."""
        try:
            yield
        except RuntimeError as error:
            # Our own errors pass: a process that is out of step is not lost.
            if isinstance(error, KFACError) or not of_communication(error):
                raise
            raise WorkerLostError(
                f"process {self._rank} of {self._size}, in {call!r}: another process has ended, or "
                f"did not come within {self._timeout:g} s; end all and start again from a "
                f"checkpoint ({str(error).splitlines()[0][:200]})"
            ) from error
