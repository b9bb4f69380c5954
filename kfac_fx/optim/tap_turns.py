"""Several objects on one module: they may take turns with its taps, but not share a step."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, fx, nn

from kfac_fx.errors import TapsTakenError
from kfac_fx.ops.net_buffers import STORE

# Module of factor buffers -> whose turn it is. Graphs that share buffers share their taps, and a
# copy of a model has buffers of its own. Weak both ways: neither models nor optimizers live longer.
_turns: WeakKeyDictionary[nn.Module, ReferenceType[TapTurn]] = WeakKeyDictionary()


class TapTurn:
    """One object's use of the taps of a module, which others may use too.

    A tap records into one buffer and is on or off for everyone. If two objects switched the taps of
    one module in the same step, one would lose its statistics, train on with averages that stand
    still, and say nothing. Whole steps may alternate: that is how two preconditioners are compared
    on one network, and what happens where a notebook makes a ``Preconditioner`` again.

    Args:
        net: a transformed module.
        what: name of the class, for messages.
        buffers: those that the object's statistics arrive in.
    """

    def __init__(self, net: fx.GraphModule, what: str, buffers: Iterable[Tensor]) -> None:
        self._store: nn.Module = getattr(net, STORE)
        self._what = what
        self._buffers = list(buffers)
        self.take()

    def take(self) -> None:
        """Make it this object's turn: it switches the taps, or begins a step of its own."""
        self._observed = False
        _turns[self._store] = ref(self)

    def observe(self) -> None:
        """Begin a step with a forward that has already run.

        Raises:
            TapsTakenError: another object is in the middle of a step, or has switched off taps that
                this one needs, so that the forward recorded too little.
        """
        last = _turns[self._store]()
        if last is not self:
            if last is not None and last._observed:
                raise self._error(last, "is in the middle of a step")
            if not all(buffer.requires_grad for buffer in self._buffers):
                raise self._error(last, "switched off taps that this one needs")
            _turns[self._store] = ref(self)
        self._observed = True

    @property
    def lost(self) -> TapsTakenError | None:
        """The error if another object had a turn since ``observe``: statistics are not whole."""
        last = _turns[self._store]()
        if last is self or not self._observed:
            return None
        return self._error(last, "was made or used between observe() and step()")

    def _error(self, last: TapTurn | None, what_it_did: str) -> TapsTakenError:
        other = "another object" if last is None else f"a {last._what}"
        return TapsTakenError(
            f"{other} on the module of this {self._what} {what_it_did}: finish the step of one "
            "before the other's, or give each a transform of its own "
            "(kfac_fx.transform(copy.deepcopy(model)))"
        )
