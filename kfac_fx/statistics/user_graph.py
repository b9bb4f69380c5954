"""The graph behind the outputs of a forward: whether, and how often, taps record in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from kfac_fx.errors import ObservationError

AFTER_BACKWARD = "observe() must come before loss.backward(), which frees the graph it needs"


def check_recorded(outputs: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Whether the graph behind the outputs has a tap that records and is still there.

    Raises:
        ObservationError: it has none, or a backward pass has freed it.
    """
    tap = next(_taps(outputs, factors), None)
    if tap is not None:
        _check_alive(tap[0])
    elif factors:
        raise ObservationError(
            "the outputs were not computed by the transformed module while it was recording: pass "
            "what net(x) returned, computed after the Preconditioner was made and with gradients "
            "enabled (another Preconditioner of the same module may have stopped the recording)"
        )


def calls(outputs: Sequence[Tensor], factors: Sequence[Tensor]) -> Counter[int]:
    """How many taps of each factor are behind the outputs, by the factor's id."""
    return Counter(key for _, key in _taps(outputs, factors))


def _taps(outputs: Sequence[Tensor], factors: Sequence[Tensor]) -> Iterator[tuple[Any, int]]:
    """Nodes of the graph that deliver statistics, and the ids of the factors."""
    wanted = {id(factor) for factor in factors}
    todo = [output.grad_fn for output in outputs]
    seen = set(todo)
    while todo and wanted:
        node = todo.pop()
        for following, _ in node.next_functions if node is not None else ():
            key = id(getattr(following, "variable", None))
            if key in wanted:
                yield node, key
            elif following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def _check_alive(tap: Any) -> None:
    try:
        _ = tap.saved_tensors
    except RuntimeError as error:
        raise ObservationError(AFTER_BACKWARD) from error
