"""Backward passes through the outputs of one forward: which of them brought statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kfac_fx.errors import ObservationError

Seen = dict[int, Tensor | None]
"""Index of an output -> the derivative that came to it."""


class Backwards:
    """Told apart by the engine's runs: ``torch.autograd.grad`` for a penalty or a log is one too.

    Args:
        outputs: of the forward.
        delivered: how many statistics have come so far.
    """

    def __init__(self, outputs: Sequence[Tensor], delivered: Callable[[], int]) -> None:
        self._delivered = delivered
        self._run, self._before = -1, 0
        self._seen: Seen = {}
        self._recording: list[Seen] = []
        self._handles: list[RemovableHandle] = [
            output.register_hook(partial(self._see, index))
            for index, output in enumerate(outputs)
            if output.requires_grad
        ]

    def _see(self, index: int, gradient: Tensor | None) -> None:
        run = torch._C._current_graph_task_id()
        if run != self._run:
            self._end()
            self._run, self._before, self._seen = run, self._delivered(), {}
        self._seen[index] = gradient

    def _end(self) -> None:
        """Of a run: it counts if statistics came."""
        if self._seen and self._delivered() > self._before:
            self._recording.append(self._seen)
            self._before = self._delivered()

    @property
    def passed(self) -> bool:
        """Whether one has come."""
        return bool(self._seen)

    def close(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def recorded(self) -> Seen:
        """What came to the outputs in the one that brought statistics.

        Raises:
            ObservationError: none came, or several that brought statistics did.
        """
        self._end()
        if not self._seen:
            raise ObservationError(
                "fisher='empirical' needs loss.backward() before step(), of a loss of the outputs "
                "that observe() got"
            )
        if len(self._recording) > 1:
            raise ObservationError(
                f"{len(self._recording)} backward passes came through one forward, whose "
                "statistics cannot be told apart: add the losses up and call backward() once, or "
                "use fisher='sampled'"
            )
        return self._recording[0] if self._recording else self._seen
