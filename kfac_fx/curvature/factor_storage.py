"""How running averages are kept between folds: as they are, in bfloat16, or on the host."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_fx.config import FACTOR_STORAGES, FactorStorage, choice
from kfac_fx.errors import UnknownOptionError
from kfac_fx.linalg.packing import mirror, packed, unpacked
from kfac_fx.ops import Rows, Statistic, multiplied

log = logging.getLogger("kfac_fx")


@dataclass
class Average:
    """A running average.

    Attributes:
        held: as it is stored.
        like: [], of the precision and device that it is read in.
        symmetric: whether it holds symmetric matrices [..., n, n].
        halved: whether what is below the diagonal is out of date.
    """

    held: Tensor
    like: Tensor
    symmetric: bool
    halved: bool = False

    @property
    def kept(self) -> Tensor:
        """As it is stored, all of it."""
        if self.halved:
            mirror(self.held)
            self.halved = False
        return self.held


class Storage:
    """In the precision and on the device in which averages are read; bases of the others.

    Attributes:
        plain: whether what is kept is what is read.
    """

    plain = True

    def make(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> Average:
        """An average of zeros, without statistics."""
        return Average(like.new_zeros(shape), like, symmetric)

    def read(self, average: Average) -> Tensor:
        """The average; a copy unless the storage is plain."""
        return average.kept

    def half(self, average: Average) -> Tensor:
        """``read``, but what is below a diagonal may be anything."""
        return average.held if self.plain else self.read(average)

    def write(self, average: Average, value: Tensor) -> None:
        """Replaces it, to the nearest that can be kept."""
        average.held.copy_(value)
        average.halved = False

    def fold(self, averages: Sequence[Average], new: Sequence[Statistic], weight: float) -> None:
        """S <- (1 - weight) S + weight S_new."""
        both = list(zip(averages, new, strict=True))
        for average, value in both:
            if isinstance(value, Rows):
                average.halved |= value.halves
                value.add_to(average.held, weight)
        whole = [(average.held, value) for average, value in both if isinstance(value, Tensor)]
        if whole:
            held, values = zip(*whole, strict=True)
            torch._foreach_lerp_(list(held), list(values), weight)


class Bfloat16(Storage):
    """In bfloat16, folded in float32 and rounded stochastically.

    Rounding to nearest would lose what changes an average by less than half of its last place,
    2^-9: with a decay of 0.95, statistics that differ from it by up to 4 %.

    Args:
        seeds: gives a seed a fold. It is the same in all processes, so their averages are, too.
    """

    plain = False

    def __init__(self, seeds: torch.Generator) -> None:
        self._seeds = seeds
        self._noise: dict[torch.device, torch.Generator] = {}

    def make(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> Average:
        if like.dtype != torch.float32:
            raise UnknownOptionError(
                f"factor_storage='bfloat16' would keep 8 of the 53 bits of {like.dtype} statistics:"
                " give None or 'host', or parameters in float32"
            )
        return Average(like.new_zeros(shape, dtype=torch.bfloat16), like, symmetric)

    def read(self, average: Average) -> Tensor:
        return average.kept.float()

    def fold(self, averages: Sequence[Average], new: Sequence[Statistic], weight: float) -> None:
        seed = int(torch.randint(2**62, (), generator=self._seeds))
        for device in {average.kept.device for average in averages}:
            self._noise.setdefault(device, torch.Generator(device)).manual_seed(seed)
        for average, value in zip(averages, map(multiplied, new), strict=True):
            kept, noise = average.held, self._noise[average.held.device]
            if average.symmetric:  # both halves are rounded alike
                half = packed(kept).float().lerp_(packed(value), weight)
                kept.copy_(unpacked(rounded(half, noise), kept.shape))
            else:
                kept.copy_(rounded(kept.float().lerp_(value, weight), noise))


class Host(Storage):
    """In CPU memory, pinned for averages of a GPU; folds happen there."""

    plain = False

    def make(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> Average:
        zeros = torch.zeros(shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return Average(zeros, like, symmetric)

    def read(self, average: Average) -> Tensor:
        return average.kept.to(average.like.device, non_blocking=True)

    def write(self, average: Average, value: Tensor) -> None:
        if average.like.is_cuda:  # copies to the device may still be read from what is kept
            torch.cuda.synchronize(average.like.device)
        average.kept.copy_(value)

    def fold(self, averages: Sequence[Average], new: Sequence[Statistic], weight: float) -> None:
        # Copies to the host wait for the stream, and so for earlier copies to the device.
        super().fold(averages, [multiplied(value).cpu() for value in new], weight)


def storage_of(kind: FactorStorage | None, seeds: torch.Generator) -> Storage:
    """The option ``factor_storage``.

    Raises:
        UnknownOptionError: there is no such kind.
    """
    if kind is None:
        return Storage()
    if choice("factor_storage", kind, FACTOR_STORAGES) == "bfloat16":
        return Bfloat16(seeds)
    if torch.cuda.is_available():
        return Host()
    log.info("factor_storage='host' changes nothing: there is no CUDA, all is on the host")
    return Storage()


def rounded(x: Tensor, noise: torch.Generator) -> Tensor:
    """x in bfloat16: one of the two neighbours, with the probabilities that keep the mean.

    Args:
        x: float32, contiguous and finite; it is overwritten.
        noise: on the device of x.
    """
    count = x.numel()
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device)
    drawn.random_(-(2**63), None, generator=noise)  # sixteen bits an entry
    low = drawn.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
    bits = x.view(torch.int32)
    bits.add_(low.view(x.shape)).bitwise_and_(-0x10000)
    return x.bfloat16()
