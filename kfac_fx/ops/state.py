"""All that taps remember between their calls.

A tap is called in the forward pass, and again when a backward pass brings its derivative. What
links the two, and what one tap knows of the others, is here: a ``FactorState`` for each factor
buffer, and the ``Collection`` that a thread has open.

A collection is for a pass whose backward is asked for statistics alone. Small taps inside of it are
*noted*: they leave an edge of the graph and what they have seen of the forward, and no autograd
node. All derivatives then come from one call of ``torch.autograd.grad``, and statistics are formed
after it, in the order of the forward. That is cheaper than a call back into Python at each tap, and
keeps all derivatives until the end; so only small tensors are noted.

A forward of the user's is no such pass, as nobody knows where it begins. There small taps leave
their notes in the graph itself, and ``Collection.of_graph`` gathers those that outputs came from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from kfac_fx.errors import ObservationError
from kfac_fx.ops.thresholds import THRESHOLDS
from kfac_fx.torch_internals.onlookers import forward_mode, saved_elsewhere, traced


class Stream(NamedTuple):
    """One use in a call of a layer in forward mode: of the value, or of a derivative.

    Attributes:
        call: stands for the call.
        cases: the number of cases that the rows are of.
        a: inputs by row, with the homogeneous coordinate, [rows, d_in].
        g: derivatives by row, [rows, d_out].
        derivative: whether it is the use of a derivative.
        column: of which column of the exact Fisher's root they are; 0 for the other Fishers.
        alone: returns the statistics of the use by itself, where the layer has no derivatives.
    """

    call: object
    cases: int
    a: Tensor
    g: Tensor
    derivative: bool
    column: int = 0
    alone: Callable[[], Sequence[Any]] = tuple


@dataclass(eq=False)
class Gathering:
    """Says whether taps keep streams: backwards that nobody asked would bring more and more.

    Attributes:
        on: as while a backward is asked for statistics.
    """

    on: bool = False


@dataclass(eq=False)
class FactorState:
    """The state of one factor buffer for backward passes. It also stands for its identity.

    Attributes:
        paused: whether backward passes of graphs that are already built skip the factor.
        noted: whether taps may leave notes in the graph, as one backward alone will ask for
            statistics.
        deliveries: how many taps have delivered a statistic of it since the last step; counted for
            the first factor of each tap.
        gathering: where derivatives in forward mode may be joined with the values of their call,
            says when; None elsewhere. What follows is kept of the first factor of a tap.
        joined: for how many ends of steps there may be uses of such derivatives: a forward may be
            run before a step ends, and observed in the next one.
        streamed: how many of the deliveries were streams.
        column: the number of columns of the exact Fisher that came before.
        streams: what the taps of those calls have left.
    """

    paused: bool = False
    noted: bool = False
    deliveries: int = 0
    gathering: Gathering | None = None
    joined: int = 0
    streamed: int = 0
    column: int = 0
    streams: list[Stream] = field(default_factory=list)


class _Known(NamedTuple):
    """A buffer that taps have seen; weak, as networks come and go."""

    buffer: ref[Tensor]
    state: FactorState


# The one place where buffers are told apart by their ids. Beside the buffers, since attributes of a
# tensor do not survive torch.compile and copies; and in no WeakIdKeyDictionary of torch, whose
# look-up takes five times as long: there is one for each factor of each tap of each forward.
_known: dict[int, _Known] = {}


def state_of(buffer: Tensor) -> FactorState:
    """Return the state of a factor buffer, which lives as long as the buffer does."""
    key = id(buffer)
    known = _known.get(key)
    # Another tensor may have got the id of one that is gone.
    if known is not None and known.buffer() is buffer:
        return known.state

    def forget(gone: ref[Tensor]) -> None:
        if key in _known and _known[key].buffer is gone:
            del _known[key]

    state = FactorState()
    _known[key] = _Known(ref(buffer, forget), state)
    return state


def is_paused(buffer: Tensor) -> bool:
    """Return whether backward passes skip a factor buffer."""
    return state_of(buffer).paused


class Seen(NamedTuple):
    """The record of a tap that was passed.

    Attributes:
        statistics: computes them; see ``ops/tap.py``.
        tensors: what it has seen of the forward.
        versions: the versions of the tensors, when they were seen.
        factors, states: the factor buffers.
        guard: the hook that sees derivatives inside of the forward.
    """

    statistics: Any
    tensors: list[Tensor | None]
    versions: list[int]
    factors: Sequence[Tensor]
    states: Sequence[FactorState]
    guard: RemovableHandle


class Note(NamedTuple):
    """A tap that was passed, and where in the graph; see ``Seen``.

    Attributes:
        edge: where the derivative arrives.
    """

    statistics: Any
    tensors: list[Tensor | None]
    versions: list[int]
    factors: Sequence[Tensor]
    states: Sequence[FactorState]
    guard: RemovableHandle
    edge: GradientEdge

    def seen(self) -> list[Tensor | None]:
        """Return the tensors.

        Raises:
            ObservationError: the model has changed one in place since.
        """
        if self.versions != [0 if t is None else t._version for t in self.tensors]:
            raise ObservationError(
                "what a layer has read was changed by an in-place operation afterwards, so its "
                "statistics cannot be formed: use the operation out of place"
            )
        return self.tensors


class Collection:
    """The noted taps of one pass.

    Args:
        buffers: those that the pass records into. Taps with other buffers belong to another
            network that runs inside of this one, and keep their nodes.

    Attributes:
        notes: in the order of the forward.
        places: state of a buffer -> its place among the buffers.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.notes: list[Note] = []
        self.places = {state_of(buffer): place for place, buffer in enumerate(buffers)}

    def takes(self, y: Tensor, states: Sequence[FactorState]) -> bool:
        """Return whether the tap of y is noted; see ``notable``."""
        # A tap with other buffers belongs to another network, whose own backward it has to serve.
        return self.places.keys() >= set(states) and notable(y)

    def note(
        self,
        y: Tensor,
        statistics: Any,
        tensors: Sequence[Tensor | None],
        factors: Sequence[Tensor],
        states: Sequence[FactorState],
        hand_on: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return y, noted.

        Args:
            y: the tapped tensor.
            statistics: computes the tap's statistics.
            tensors: what it will need of the forward.
            factors, states: the factor buffers.
            hand_on: what derivatives of y inside of the forward go through.
        """
        alias, seen = _seen(y, statistics, tensors, factors, states, hand_on)
        self.notes.append(Note(*seen, get_gradient_edge(alias)))
        return alias

    @classmethod
    def of_graph(cls, states: Sequence[FactorState], outputs: Sequence[Tensor]) -> Collection:
        """Return the notes that taps left in the graph of outputs.

        They are taken out of it: it lives on for the training, and what they hold need not.

        Args:
            states: those of the buffers that are recorded into.
            outputs: what a network returned.
        """
        collection = cls(())
        collection.places = {state: place for place, state in enumerate(states)}
        found: list[tuple[int, Seen, Node]] = []
        todo = [output.grad_fn for output in outputs]
        known = set(todo)
        while todo:
            node = todo.pop()
            if node is None:
                continue
            # Only nodes of the notes' own kind are asked: the question makes a dictionary.
            # torch declares the property as a method.
            held: Any = node.metadata if node.name() in _KINDS else ()
            if _KEY in held:
                number, seen = held[_KEY]
                if collection.places.keys() >= set(seen.states):
                    del held[_KEY]
                    seen.guard.remove()
                    found.append((number, seen, node))
            for following, _ in node.next_functions:
                if following is not None and following not in known:
                    known.add(following)
                    todo.append(following)
        found.sort(key=itemgetter(0))
        collection.notes = [Note(*seen, GradientEdge(node, 0)) for _, seen, node in found]
        return collection


SPARSE = {torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}
"""Layouts of tensors that list their entries."""

_KEY = "kfac_fx"
"""Of a note, in the metadata of a node."""

_PLAIN = "AddmmBackward0"
"""Name of the node of a layer x W^T + b on rows, whose own result may stand for itself."""

_KINDS = ("UnsafeViewBackward0", _PLAIN)
"""Names of the nodes that have notes."""

_numbers = count()


def notable(y: Tensor) -> bool:
    """Return whether a tap of y may be noted rather than have nodes.

    A compiler must see nodes; checkpoints run the forward again, where nothing is noted; and
    derivatives in forward mode are further uses, which need nodes as well.
    """
    small = y.numel() <= THRESHOLDS.noted and y.requires_grad and torch.is_grad_enabled()
    return small and not (traced() or forward_mode() or saved_elsewhere())


def leave_note(
    y: Tensor,
    statistics: Any,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    states: Sequence[FactorState],
    hand_on: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return y, with a note in its graph; the arguments are those of ``Collection.note``."""
    alias, seen = _seen(y, statistics, tensors, factors, states, hand_on)
    # The graph owns the note, and not the other way round: it goes when the graph does.
    node = alias.grad_fn
    assert node is not None
    held: Any = node.metadata
    held[_KEY] = next(_numbers), seen
    return alias


def _place(y: Tensor) -> tuple[Tensor, Node]:
    """Return y, or an alias of it, and the node where its derivative arrives."""
    node = y.grad_fn
    # The one result of this node is no view: where the model writes into it in place, it gets
    # another node, and this one stays that of y as it was. An alias would be half of what the tap
    # costs. A node has room for one note.
    if node is not None and node.name() == _PLAIN:
        held: Any = node.metadata  # torch declares the property as a method
        if _KEY not in held:
            return y, node
    # Others may be views, or one of several results. An alias that autograd does not know for a
    # view: the model may write into it in place, and the edge stays the one of y as it was.
    alias: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    node = alias.grad_fn
    assert node is not None
    return alias, node


def _seen(
    y: Tensor,
    statistics: Any,
    tensors: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    states: Sequence[FactorState],
    hand_on: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Seen]:
    """Return y, or an alias of it, and what its tap has seen."""
    alias, node = _place(y)
    held = [None if t is None else t.detach() for t in tensors]
    # A prehook runs in user code's backwards alone: the notes' derivatives are asked for by grad(),
    # after the hooks are gone.
    guard = node.register_prehook(
        lambda found: tuple(None if g is None else hand_on(g) for g in found)
    )
    versions = [0 if t is None else t._version for t in held]
    return alias, Seen(statistics, held, versions, factors, states, guard)


class Collecting(threading.local):
    """The collection that is open in this thread.

    Attributes:
        collection: where small taps are noted, if they are.
        forming: whether statistics of noted taps are being formed, which may stay unmultiplied
            (``Rows``). Nodes must return tensors to the engine.
        apart: whether no two of those taps have seen the same memory, so that no statistic of an
            input serves another one.
    """

    collection: Collection | None = None
    forming: bool = False
    apart: bool = False


collecting_now = Collecting()


@contextmanager
def collecting(collection: Collection | None, *, forming: bool = False) -> Iterator[None]:
    """Note small taps inside, or form the statistics of those that were noted.

    A note takes nothing that happens after the context for its own. Other threads, and the passes
    of other networks inside, go on as they did.

    Args:
        collection: gets the notes; None lets no tap be noted.
        forming: whether the forward is over, and statistics are formed inside.
    """
    # While statistics are formed no tap is passed, and where one is (a checkpoint that computes its
    # part again), its statistics come by nodes.
    outer = collecting_now.collection
    was = collecting_now.forming, collecting_now.apart
    collecting_now.collection = None if forming else collection
    collecting_now.forming = forming
    collecting_now.apart = False
    if forming and collection is not None:
        # Most networks: to look once at all addresses is less than to remember every input.
        # Sparse tensors have no address; statistics read them as dense ones, apart from each other.
        seen = (t for note in collection.notes for t in note.tensors)
        held = [t.data_ptr() for t in seen if t is not None and t.layout not in SPARSE]
        collecting_now.apart = len(set(held)) == len(held)
    try:
        yield
    finally:
        collecting_now.collection = outer
        collecting_now.forming, collecting_now.apart = was
        if collection is not None and not forming:
            for note in collection.notes:
                note.guard.remove()
