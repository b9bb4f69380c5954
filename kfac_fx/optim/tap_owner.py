"""Which object records with the taps of a module: the one that was made last."""

from __future__ import annotations

from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import fx, nn

from kfac_fx.errors import TapsTakenError
from kfac_fx.ops import STORE

_owners: WeakKeyDictionary[nn.Module, ReferenceType[TapOwner]] = WeakKeyDictionary()
# Keyed by the module of factor buffers: graphs that share buffers share their taps, and a copy of a
# model has buffers of its own. Weak both ways, so that neither models nor optimizers live longer.


class TapOwner:
    """One object's claim to the taps of a module; a later claim takes them.

    A tap records into one buffer and is on or off for everyone. If two objects switched the taps of
    one module, each would lose the statistics of some steps without a word, and train on.

    The last one that is made gets the taps, because notebooks make a ``Preconditioner`` again and
    again while the old one still lives. The old one may be read from, but it cannot record: it says
    so as soon as it is used.

    Args:
        net: a transformed module.
        what: name of the class that claims, for messages.
    """

    def __init__(self, net: fx.GraphModule, what: str) -> None:
        self._store: nn.Module = getattr(net, STORE)
        self._what = what
        _owners[self._store] = ref(self)

    def check(self) -> None:
        """Raise if another object took the taps; take them back if that one is gone.

        Raises:
            TapsTakenError: another object that still lives was made on this module later.
        """
        newest = _owners[self._store]()
        if newest is None:
            _owners[self._store] = ref(self)
        elif newest is not self:
            raise TapsTakenError(
                f"a {newest._what} was made on this module after this {self._what} and records "
                "with its taps now: use that one, or give each of them a transform of its own "
                "(kfac_fx.transform(copy.deepcopy(model)))"
            )
