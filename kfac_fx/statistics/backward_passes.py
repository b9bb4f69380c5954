"""Backward passes through the outputs of one forward: which of them brought statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        sources: leaves that statistics are accumulated in, as gradients.
    """

    def __init__(self, outputs: Sequence[Tensor], sources: Iterable[Tensor]) -> None:
        self._seen: dict[int, Seen] = {}
        self._arrived: list[tuple[int, int]] = []
        self._last = -1
        self._handles: list[RemovableHandle] = [
            output.register_hook(partial(self._see, index))
            for index, output in enumerate(outputs)
            if output.requires_grad
        ]
        self._handles += [s.register_post_accumulate_grad_hook(self._arrive) for s in sources]

    def _see(self, index: int, gradient: Tensor | None) -> None:
        self._last = torch._C._current_graph_task_id()
        self._seen.setdefault(self._last, {})[index] = gradient

    def _arrive(self, _: Tensor) -> None:
        self._arrived.append((torch._C._current_graph_task_id(), self._last))

    @property
    def passed(self) -> bool:
        """Whether one has come."""
        return bool(self._seen)

    @property
    def nested(self) -> bool:
        """Whether statistics came in runs inside of others (reentrant checkpoints)."""
        return any(run not in self._seen for run, _ in self._arrived)

    def close(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def recorded(self) -> Seen:
        """What came to the outputs in the one that brought statistics; if none did, in the last.

        Raises:
            ObservationError: none came, or several that brought statistics did.
        """
        if not self._seen:
            raise ObservationError(
                "fisher='empirical' needs loss.backward() before step(), of a loss of the outputs "
                "that observe() got"
            )
        # A run that came to no output is nested in the one that came to them last.
        runs = {run if run in self._seen else outer for run, outer in self._arrived} - {-1}
        if len(runs) > 1:
            raise ObservationError(
                f"{len(runs)} backward passes came through one forward, whose statistics cannot be "
                "told apart: add the losses up and call backward() once, or use fisher='sampled'"
            )
        return self._seen[runs.pop() if runs else self._last]
