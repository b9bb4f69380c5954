"""The graph of a forward's outputs: its taps, derivatives of it, and what comes through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from kfac_fx.errors import ObservationError
from kfac_fx.likelihoods.sampling import WeightedSum
from kfac_fx.ops.state import FactorState
from kfac_fx.torch_internals.error_texts import backward_refusal
from kfac_fx.torch_internals.graph_tasks import at_end_of_run, current_graph_task

AFTER_BACKWARD = "observe() must come before loss.backward(), which frees the graph it needs"


def check_recorded(outputs: Sequence[Tensor], states: Mapping[Tensor, FactorState]) -> None:
    """Check that taps recorded the forward of the outputs, and that its graph is still there.

    Args:
        outputs: the outputs of the forward, with their graph.
        states: the states of the factor buffers that taps record into.

    Raises:
        ObservationError: the graph has no such tap, or a backward pass has freed it.
    """
    for tap, _ in _taps([output.grad_fn for output in outputs], states):
        # One tap tells it all, the first one that is found: a backward frees a whole graph, and
        # torch says so nowhere but in the error that reading a saved tensor raises.
        try:
            _ = tap.saved_tensors  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise ObservationError(AFTER_BACKWARD) from error
        return
    if states:
        raise ObservationError(
            "the outputs were not computed by the transformed module while it was recording: pass "
            "what net(x) returned, computed after the Preconditioner was made and with gradients "
            "enabled (another Preconditioner of the same module may have stopped the recording)"
        )


def nearest_tap(outputs: Sequence[Tensor], states: Mapping[Tensor, FactorState]) -> Node | None:
    """Return one tap in the graph of the outputs, the first one that is found from there."""
    nodes = [output.grad_fn for output in outputs]
    return next((tap for tap, _ in _taps(nodes, states)), None)


def tap_counts(
    nodes: Sequence[Node | None], states: Mapping[Tensor, FactorState]
) -> Counter[FactorState]:
    """Return how many taps of each factor are in the graph beneath nodes; it may be freed."""
    return Counter(state for _, state in _taps(nodes, states))


def _taps(
    nodes: Sequence[Node | None], states: Mapping[Tensor, FactorState]
) -> Iterator[tuple[Node, FactorState]]:
    """Yield the nodes of the graph that deliver statistics, with the factors' states."""
    # From the outputs down; a generator, so that most callers stop at the first tap.
    todo = [*nodes]
    seen = set(todo)
    while todo and states:
        node = todo.pop()
        for following, _ in node.next_functions if node is not None else ():
            # Only nodes that accumulate into a leaf have it: a factor buffer is one.
            leaf = getattr(following, "variable", None)
            state = None if leaf is None else states.get(leaf)
            if state is not None:
                assert node is not None
                yield node, state
            elif following is not None and following not in seen:
                seen.add(following)
                todo.append(following)


def derivatives(
    scalar: Tensor | WeightedSum, tensors: Sequence[Tensor | GradientEdge], *, last: bool = False
) -> Sequence[Tensor | None]:
    """Return the derivatives of a scalar at tensors and edges of the graph, by one backward.

    Args:
        scalar: is differentiated.
        tensors: where; None comes where the scalar does not depend on one.
        last: whether the graph may be freed.

    Raises:
        ObservationError: the graph was freed, or was not kept for this backward.
    """
    of, weights = (scalar, None) if isinstance(scalar, Tensor) else scalar
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(
            of,
            tensors,  # type: ignore[arg-type]  # edges and tensors may be mixed
            grad_outputs=weights,
            retain_graph=not last,
            allow_unused=True,
        )
        return found
    except RuntimeError as error:
        refusal = backward_refusal(error)
        if refusal == "freed":
            raise ObservationError(AFTER_BACKWARD) from error
        if refusal == "compiled":
            raise ObservationError(
                "a compiled forward keeps no graph for a second backward: give the inputs, "
                "observe(outputs, inputs=...), use fisher='empirical', or set "
                "torch._functorch.config.donated_buffer = False before compiling"
            ) from error
        if refusal == "reentrant":
            raise ObservationError(
                "a reentrant activation checkpoint allows no backward but the training's: use "
                "checkpoint(..., use_reentrant=False) or fisher='empirical'"
            ) from error
        raise


def batched_derivatives(
    rows: Tensor, tensors: Sequence[Tensor | GradientEdge], picked: Tensor
) -> Sequence[Tensor | None]:
    """Return derivatives of several sums over rows, by one backward whose tensors are batched.

    Args:
        rows: what is summed.
        tensors: where; None comes where the rows do not depend on one.
        picked: the weights of the rows' entries in each sum, [K, *rows.shape].

    Returns:
        [K, ...] each.

    Raises:
        RuntimeError: an operator cannot be batched, or the reasons of ``derivatives``.
    """
    there: list[bool] = []

    def came(weights: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(
            [rows],
            tensors,  # type: ignore[arg-type]  # edges and tensors may be mixed
            grad_outputs=[weights],
            retain_graph=True,
            allow_unused=True,
        )
        there.extend(one is not None for one in found)
        return [one for one in found if one is not None]

    # vmap around grad() rather than its is_grads_batched: the nodes of taps call operators that
    # torch takes apart before they are batched, which only vmap does.
    values = iter(torch.vmap(came)(picked))
    return [next(values) if one else None for one in there]


class BackwardWatch:
    """Notices backward passes through the outputs of one forward.

    They are told apart by autograd's graph-task id: ``torch.autograd.grad`` for a penalty or a log
    has one, too, but brings no statistics.

    Args:
        outputs: the outputs of the forward.
        leaves: tensors that statistics are accumulated in, as gradients.
        tap: a node of the forward's graph; a backward that comes there counts as one, though it
            does not come to the outputs: where the loss is formed inside of the network, the
            outputs may be copies (logits in float32) that the loss was not computed from.
        begun: called when a backward comes to the outputs.
        brought: called at the end of such a backward, if it or one before has brought statistics:
            what comes to the leaves from then on is of other forwards.

    Attributes:
        nested: whether statistics came in runs inside of others (reentrant checkpoints).
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        leaves: Iterable[Tensor] = (),
        tap: Node | None = None,
        *,
        begun: Callable[[], None] | None = None,
        brought: Callable[[], None] | None = None,
    ) -> None:
        self.nested = False
        self._seen: dict[int, dict[int, Tensor | None]] = {}
        self._tapped = False
        self._begun = begun
        self._when_brought = brought
        # Runs that statistics came in and that belong to no other yet; those that brought some.
        self._arrived: set[int] = set()
        self._brought: list[int] = []
        self._mixed = False
        self._last = -1
        self._handles: list[RemovableHandle] = [
            output.register_hook(partial(self._see, index))
            for index, output in enumerate(outputs)
            if output.requires_grad
        ]
        self._handles += [leaf.register_post_accumulate_grad_hook(self._arrive) for leaf in leaves]
        if tap is not None:
            self._handles.append(tap.register_prehook(self._pass_tap))

    def _pass_tap(self, _: Sequence[Tensor | None]) -> None:
        self._tapped = True

    def _see(self, index: int, gradient: Tensor | None) -> None:
        # Hooks of one backward() or grad() see the same id, those of a later one another.
        self._last = current_graph_task()
        if self._last not in self._seen:
            self._seen[self._last] = {}
            if self._begun is not None:
                self._begun()
            if self._when_brought is not None:
                at_end_of_run(partial(self._end, self._last))
        self._seen[self._last][index] = gradient

    def _arrive(self, _: Tensor) -> None:
        self._arrived.add(current_graph_task())

    def _end(self, run: int) -> None:
        """Take what has arrived for the run's, at its end."""
        # A reentrant checkpoint starts a run inside of another, which has the larger number. What
        # has a smaller one had come before.
        own = {one for one in self._arrived if one >= run}
        if own:
            self._mixed |= not self._brought and len(own) < len(self._arrived)
            self.nested |= own != {run}
            self._brought.append(run)
        if self._brought:
            self._arrived.clear()
            assert self._when_brought is not None
            self._when_brought()

    @property
    def passed(self) -> bool:
        """Say whether one has come."""
        return self._tapped or bool(self._seen)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def recorded(self) -> dict[int, Tensor | None]:
        """Return what came to the outputs in the backward pass that brought statistics.

        If none did, it is the last one; derivatives are by the index of the output.

        Raises:
            ObservationError: no backward came, several that brought statistics did, or one of
                another forward came before.
        """
        if not self._seen:
            raise ObservationError(
                "fisher='empirical' needs loss.backward() before step(), of a loss of the outputs "
                "that observe() got"
            )
        if len(self._brought) > 1:
            raise ObservationError(
                f"{len(self._brought)} backward passes came through one forward, whose statistics "
                "cannot be told apart: add the losses up and call backward() once, or use "
                "fisher='sampled'"
            )
        if self._mixed:
            raise ObservationError(
                "between observe(outputs, targets) and the backward of these outputs, "
                "loss.backward() came through another forward, whose statistics cannot be told "
                "apart: call observe() right before the backward of its outputs"
            )
        return self._seen[self._brought[0] if self._brought else self._last]


class GradientWatch:
    """Adds up what backward passes bring to parameters; ``autograd.grad()`` brings nothing.

    A parameter's ``.grad`` will not do: it also holds other micro-batches, and may be clipped or
    unscaled by the time it is read.

    Args:
        parameters: in the order of ``gradients``.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.gradients: list[Tensor | None] = [None] * len(parameters)
        self._arrived: list[Tensor | None] = [None] * len(parameters)
        self._handles: list[RemovableHandle] = []
        for place, parameter in enumerate(parameters):
            self._handles += [
                parameter.register_hook(partial(self._arrive, place)),
                parameter.register_post_accumulate_grad_hook(partial(self._accumulate, place)),
            ]

    def _arrive(self, place: int, gradient: Tensor) -> None:
        self._arrived[place] = gradient.detach()

    def _accumulate(self, place: int, _: Tensor) -> None:
        # The hook before accumulation has seen this backward's own part of ``.grad``; where only
        # autograd.grad() came, this hook does not run, and nothing is added.
        more = self._arrived[place]
        assert more is not None
        self._arrived[place] = None
        total = self.gradients[place]
        self.gradients[place] = more.clone() if total is None else total + more

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
