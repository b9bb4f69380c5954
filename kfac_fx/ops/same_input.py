"""A of an input that several layers read one after the other (queries, keys and values): once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kfac_fx.ops.modes import functional
from kfac_fx.ops.rows import Rows, Statistic


class _Formed(NamedTuple):
    """The last A.

    Attributes:
        storage: of the input; where it is gone, so is what another may have in its place.
        key: which entries of the storage, and how A is formed of them.
        value: A, another tensor of its memory, for autograd takes over what nobody else holds.
        version: of A; who got it may have changed it in place.
    """

    storage: StorageWeakRef
    key: tuple[Any, ...]
    value: Statistic
    version: int

    def holds(self, storage: StorageWeakRef, key: tuple[Any, ...]) -> bool:
        """Whether the value still is A of this input."""
        same = self.storage == storage and self.key == key
        return same and not self.storage.expired() and _version(self.value) == self.version


_last: _Formed | None = None


def _version(value: Statistic) -> int:
    return 0 if isinstance(value, Rows) else value._version


def formed_once(x: Tensor, options: tuple[Any, ...], form: Callable[[], Statistic]) -> Statistic:
    """``form()``, or a copy of the last result if that was of the same x and options.

    Args:
        options: all that the result depends on but for x.
    """
    global _last
    if functional(x):
        return form()
    storage = StorageWeakRef(x.untyped_storage())
    key = (x.storage_offset(), x.shape, x.stride(), x.dtype, x._version, *options)
    last = _last  # read once: another thread may set it
    if last and last.holds(storage, key):
        if isinstance(last.value, Rows):
            last.value.shared = True
            return last.value
        return last.value.clone()
    value = form()
    held = value if isinstance(value, Rows) else value.detach()
    _last = _Formed(storage, key, held, _version(value))
    return value


def forget_input() -> None:
    """Lets go of the last A."""
    global _last
    _last = None
