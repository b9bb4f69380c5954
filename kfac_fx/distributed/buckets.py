"""Many tensors in few messages: flat buckets, symmetric ones by their halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_fx.linalg.packing import packed, packed_size, unpacked


class TensorForm(NamedTuple):
    """The shape, dtype and device of a tensor in a bucket, and whether it is symmetric."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    symmetric: bool = False

    @property
    def length(self) -> int:
        """Return the number of entries in the bucket."""
        return packed_size(self.shape) if self.symmetric else self.shape.numel()


class Bucket(NamedTuple):
    """Tensors of one dtype and device, by their places in the list that was cut.

    Attributes:
        forms: the forms of the tensors at ``places``.
    """

    places: tuple[int, ...]
    forms: tuple[TensorForm, ...]

    def pack(self, values: Sequence[Tensor | None]) -> Tensor:
        """Return one flat tensor of the values at the bucket's places; None counts as zeros."""
        parts = []
        for place, form in zip(self.places, self.forms, strict=True):
            value = values[place]
            if value is None:
                parts.append(torch.zeros(form.length, dtype=form.dtype, device=form.device))
                continue
            value = value.to(form.dtype)
            parts.append(packed(value) if form.symmetric else value.reshape(-1))
        return torch.cat(parts)

    def unpack(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the place and the value of every tensor."""
        pieces = flat.split([form.length for form in self.forms])
        for place, form, piece in zip(self.places, self.forms, pieces, strict=True):
            whole = unpacked(piece, form.shape) if form.symmetric else piece.reshape(form.shape)
            yield place, whole


def cut(forms: Sequence[TensorForm], limit: int) -> list[Bucket]:
    """Return buckets of about ``limit`` bytes, in order; a longer tensor has one of its own."""
    open_: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    filled: list[list[int]] = []
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for place, form in enumerate(forms):
        kind, size = (form.dtype, form.device), form.length * form.dtype.itemsize
        if kind in open_ and sizes[kind] + size > limit:
            filled.append(open_.pop(kind))
        open_.setdefault(kind, []).append(place)
        sizes[kind] = size + (sizes[kind] if len(open_[kind]) > 1 else 0)
    filled += open_.values()
    return [Bucket(tuple(places), tuple(forms[p] for p in places)) for places in filled]
