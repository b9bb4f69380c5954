"""Second moments: sums over rows of outer products, formed at once, later, or once for several.

``gram`` multiplies one half of the symmetric result and copies the other. ``second_moment`` may
leave few rows unmultiplied (``Rows``) until they enter an average. ``formed_once`` is for layers
that read the same input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import pad

from kfac_fx.ops.library import LIBRARY
from kfac_fx.ops.state import collecting_now
from kfac_fx.ops.thresholds import THRESHOLDS
from kfac_fx.torch_internals.onlookers import dispatch_mode, traced, transforms_active

MOST_SLABS = {"cpu": 16, "cuda": 9}
"""Into how many slabs a large symmetric product is cut: of 16, 17/32 of its multiply-adds remain.
"""

NARROWEST = {"cpu": 64, "cuda": 256}
"""Features that a slab has at least, for each thread of a CPU: narrower ones multiply slowly.

Twice as many where rows are few, or in half precision, and copies cost more beside the products.
"""

SMALL = 2**15
"""Entries of rows whose copy costs less than a call."""

Range = tuple[int, int]


def functional(rows: Tensor) -> bool:
    """Return whether rows must go through operators that write into nothing.

    Compilers, modes and transforms see operators and not what they write into, and autograd needs
    what it saved unchanged.
    """
    return (
        torch.compiler.is_compiling()
        or dispatch_mode() is not None
        or (rows.requires_grad and torch.is_grad_enabled())
        or transforms_active()
    )


def gram(rows: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale`` times the sum over rows of the outer product: [..., S, d] -> [..., d, d]."""
    # One group is no batch of products, and only a single matrix is formed by slabs.
    if rows.dim() == 3 and len(rows) == 1:
        return gram(rows[0], scale).unsqueeze(0)
    # Few entries are one slab, whatever their shape: that need not be found out.
    ranges = _slabs(rows) if rows.numel() >= SMALL else ()
    if len(ranges) < 2:
        if rows.dim() == 2 and scale != 1.0:  # scaled inside the product
            # Zeros, though beta is 0: torch.func.vmap multiplies what is there by it, and memory
            # that was not written may hold a NaN.
            return torch.addmm(rows.new_zeros(()), rows.mT, rows, beta=0, alpha=scale)
        return rows.mT @ rows if scale == 1.0 else rows.mT @ rows * scale
    if _opaque(rows):
        product: Tensor = torch.ops.kfac_fx.gram.default(rows, scale)
        return product
    if functional(rows):
        slabs = [
            torch.addmm(rows.new_zeros(()), rows[:, a:b].mT, rows[:, a:], beta=0, alpha=scale)
            for a, b in ranges
        ]
        return _assembled(slabs, ranges)
    return _written(rows, scale)


def homogeneous_gram(rows: Tensor, scale: float = 1.0, one: float = 1.0) -> Tensor:
    """Return ``gram`` of the rows with a 1 appended: [..., S, d] -> [..., d+1, d+1].

    Args:
        rows: the inputs of a layer with a bias.
        scale: the scale of the whole result.
        one: what is appended; tangents have no constant, so 0.
    """
    count, d = rows.shape[-2:]
    low = rows.element_size() < 4
    few = rows.numel() <= SMALL
    if not few and _opaque(rows) and len(_slabs(rows)) > 1:
        product: Tensor = torch.ops.kfac_fx.gram.default(rows, scale, one)
        return product
    if not few and rows.dim() == 2 and not low and not functional(rows):
        return _written(rows, scale, one)
    # The border can be put around the rows or around the product. Around the rows where they are
    # the smaller copy, where calls count more than copies, and in half precision, whose sums of
    # rows would be rounded more than once.
    if few or low or count < d:
        return gram(pad(rows, (0, 1), value=one), scale)
    return bordered(gram(rows, scale), rows.sum(-2) * (one * scale), count * one**2 * scale)


def bordered(second: Tensor, first: Tensor, count: float) -> Tensor:
    """Return the Gram matrix of homogeneous rows.

    Args:
        second: the sum of r r^T, [..., d, d].
        first: the sum of r, [..., d].
        count: the number of rows.
    """
    last = pad(first, (0, 1), value=count).unsqueeze(-2)
    return torch.cat([torch.cat([second, first.unsqueeze(-1)], -1), last], -2)


def cut_gram(rows: Tensor, count: int) -> Tensor:
    """Return ``gram`` of ``count`` equal parts of the features, the last filled up with zeros.

    [..., S, d] -> [..., count, b, b] with b = ceil(d / count).
    """
    size = -(-rows.shape[-1] // count)
    rows = pad(rows, (0, count * size - rows.shape[-1]))
    return gram(rows.unflatten(-1, (count, size)).movedim(-2, -3))


def _opaque(rows: Tensor) -> bool:
    """Return whether a compiler is given one call: it cannot write slabs where they stay."""
    return rows.device.type == "cpu" and traced()


def _slabs(rows: Tensor) -> list[Range]:
    """Return ranges of features, by multiples of 16, that a symmetric product is formed by."""
    count, d = rows.shape[-2:]
    kind = rows.device.type
    # Half of the product is redundant, but slabs are calls of their own: worth it only where each
    # still multiplies at full speed. The numbers were measured (tests/benchmarks/kernels.py).
    width = NARROWEST.get(kind, d) * (torch.get_num_threads() if kind == "cpu" else 1)
    width *= max(1, 4 // rows.element_size())
    width = width if count >= 8 * width else 2 * width
    if rows.dim() > 2 or count < width or d < 2 * width:
        return [(0, d)]
    width = max(width, -(-d // MOST_SLABS[kind]) + 15 & ~15)
    return [(start, min(start + width, d)) for start in range(0, d, width)]


def _fill(result: Tensor, rows: Tensor, scale: float, ranges: Sequence[Range]) -> None:
    """Write ``gram`` into a matrix, or a part of one: each slab from the diagonal on, mirrored."""
    for start, end in ranges:
        slab = result[start:end, start:]
        torch.addmm(slab, rows[:, start:end].mT, rows[:, start:], beta=0, alpha=scale, out=slab)
        if end < len(result):
            result[end:, start:end] = slab[:, end - start :].mT


def _written(rows: Tensor, scale: float, one: float | None = None) -> Tensor:
    """Return ``gram``, or with ``one`` ``homogeneous_gram``, of [S, d], written where it stays."""
    count, d = rows.shape
    side = d + (one is not None)
    result = rows.new_empty(side, side)
    _fill(result[:d, :d], rows, scale, _slabs(rows))
    if one is not None:
        torch.sum(rows, 0, out=result[d, :d]).mul_(one * scale)
        result[d, d].fill_(count * one**2 * scale)  # a number assigned would wait for a GPU
        result[:d, d] = result[d, :d]
    return result


def _assembled(slabs: Sequence[Tensor], ranges: Sequence[Range]) -> Tensor:
    """Return [d, d] from its slabs, as a function: what lies left of one mirrors the others."""
    lines = []
    for start, end in ranges:
        above = zip(slabs, ranges, strict=True)
        left = [slab[:, start - a : end - a].mT for slab, (a, b) in above if b <= start]
        lines.append(torch.cat([*left, slabs[len(left)]], 1))
    return torch.cat(lines)


def _shape(rows: Tensor, scale: float, one: float | None = None) -> Tensor:
    side = rows.shape[1] + int(one is not None)  # the shape may be symbolic
    return rows.new_empty(side, side)


LIBRARY.define("gram(Tensor rows, float scale, float? one=None) -> Tensor")
LIBRARY.impl("gram", _written, "CPU")
torch.library.register_fake("kfac_fx::gram", _shape, lib=LIBRARY)


# Rows that are multiplied later.


class Rows:
    """``scale`` times the sum over rows of the outer product, [d, d], of rows [S, d], S < d.

    Fewer rows than features take less memory than their Gram matrix, which is then added to the
    average where that stays, one half of it: no matrix of its own, no copied half, and no pass over
    it to scale.

    Args:
        rows: [S, d]; nobody else changes them.
        scale: the scale of the matrix.

    Attributes:
        shared: whether several averages take it; then its product is formed once.
    """

    def __init__(self, rows: Tensor, scale: float) -> None:
        self.rows = rows
        self.scale = scale
        self.shared = False
        self._product: Tensor | None = None

    def __mul__(self, factor: float) -> Rows:
        return Rows(self.rows, self.scale * factor)

    def share(self) -> Rows:
        """Return the same rows, for one more average."""
        self.shared = True
        return self

    def product(self) -> Tensor:
        """Return the matrix; of shared rows the same one for all."""
        if self._product is not None:
            return self._product
        with torch.autocast(self.rows.device.type, enabled=False):
            product = gram(self.rows, self.scale)
        self._product = product if self.shared else None
        return product

    def diagonal(self) -> Tensor:
        """Return the matrix's diagonal, [d]."""
        return self.rows.square().sum(0) * self.scale

    @property
    def halves(self) -> bool:
        """Say whether ``add_to`` leaves what is below the diagonal out of date."""
        return not self.shared and len(_row_slabs(self.rows.shape[1])) > 1

    def add_to(self, average: Tensor, weight: float) -> None:
        """Replace ``average`` by (1 - weight) average + weight product."""
        if self.shared:
            average.lerp_(self.product(), weight)
            return
        for start, end in _row_slabs(self.rows.shape[1]):
            slab, rows = average[start:end, start:], self.rows[:, start:]
            left = rows[:, : end - start].mT
            torch.addmm(slab, left, rows, beta=1 - weight, alpha=weight * self.scale, out=slab)


Statistic = Tensor | Rows
"""A new statistic: a tensor, or rows whose Gram matrix it is."""


def stay(rows: Tensor) -> bool:
    """Return whether rows stay unmultiplied, where statistics of noted taps are formed.

    Only there (``collecting_now.forming``), for the engine takes tensors from a node; only on a
    CPU, where the writes of a product are what it costs; and only where the product has more than
    one slab and more entries than the rows.
    """
    count, d = rows.shape[-2:]
    few = rows.dim() == 2 and count < d and d >= 2 * THRESHOLDS.slab * torch.get_num_threads()
    return few and rows.device.type == "cpu" and not rows.is_complex()


def second_moment(rows: Tensor, scale: float = 1.0) -> Statistic:
    """Return ``gram``, or a copy of rows that stay: until then others may write into them."""
    few = rows.shape[-2] < rows.shape[-1]  # most are not, and need no closer look
    if collecting_now.forming and few and stay(rows):
        return Rows(rows.clone(), scale)
    return gram(rows, scale)


@overload
def multiplied(statistic: Statistic) -> Tensor: ...
@overload
def multiplied(statistic: Statistic | None) -> Tensor | None: ...
def multiplied(statistic: Statistic | None) -> Tensor | None:
    """Return a statistic as a tensor, and None as it is."""
    return statistic.product() if isinstance(statistic, Rows) else statistic


def added(total: Statistic | None, more: Statistic | None) -> Statistic | None:
    """Return the sum of two statistics of one factor, or the one that there is."""
    if total is None or more is None:
        return more if total is None else total
    return multiplied(total) + multiplied(more)


def _row_slabs(d: int) -> list[Range]:
    """Return ranges that cover the features of unmultiplied rows."""
    width = THRESHOLDS.slab * torch.get_num_threads()
    return [(start, min(start + width, d)) for start in range(0, d, width)]


# Inputs that several layers read one after the other (queries, keys and values).


class _Formed(NamedTuple):
    """The last A.

    Attributes:
        storage: the storage of the input; where it is gone, so is what another may have in its
            place.
        key: which entries of the storage, and how A is formed of them.
        value: A, another tensor of its memory, for autograd takes over what nobody else holds.
        version: the version of A; who got it may have changed it in place.
    """

    storage: StorageWeakRef
    key: tuple[object, ...]
    value: Statistic
    version: int


_last: _Formed | None = None


def formed_once(x: Tensor, options: tuple[object, ...], form: Callable[[], Statistic]) -> Statistic:
    """Return ``form()``, or a copy of the last result if that was of the same x and options.

    Args:
        x: the input that the result is formed of.
        options: all that the result depends on but for x.
        form: makes it.
    """
    global _last
    # A compiler finds equal subexpressions by itself, and a graph must not hold last call's result.
    if functional(x) or collecting_now.apart:
        return form()
    storage = StorageWeakRef(x.untyped_storage())
    key = (x.storage_offset(), x.shape, x.stride(), x.dtype, x._version, *options)
    last = _last  # read once: another thread may set it
    # A storage that has expired may have another one's address.
    # The same memory, shape and version is the same input, without a look at its values.
    if last and last.storage == storage and last.key == key and not last.storage.expired():
        value = last.value
        if isinstance(value, Rows):
            return value.share()
        if value._version == last.version:
            return value.clone()
    value = form()
    if isinstance(value, Rows):
        _last = _Formed(storage, key, value, 0)
    else:
        _last = _Formed(storage, key, value.detach(), value._version)
    return value


def forget_input() -> None:
    """Let go of the last A, which is memory that nobody counts."""
    global _last
    _last = None
