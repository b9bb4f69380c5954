"""Running averages that are kept otherwise than they are read: in bfloat16, or on the host.

Averages that are kept as they are read need nothing of this file (``kfac_fx.curvature.estimate``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_fx.config import FactorStorage
from kfac_fx.curvature.estimate import Average, Storage, fold_in_place
from kfac_fx.errors import UnknownOptionError
from kfac_fx.linalg.packing import packed, unpacked
from kfac_fx.ops.gram import Statistic, multiplied

log = logging.getLogger("kfac_fx")


class _Bfloat16Average(Average):
    """An average in bfloat16 that is read in float32."""

    def __init__(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> None:
        self.stored = like.new_zeros(shape, dtype=torch.bfloat16)
        self.like = like
        self.symmetric = symmetric
        self.upper_only = False

    def read(self) -> Tensor:
        return self.whole().float()

    def upper(self) -> Tensor:
        return self.read()


class Bfloat16:
    """Averages in bfloat16, folded in float32 and rounded stochastically.

    Rounding to nearest would lose what changes an average by less than half of its last place,
    2^-9: with a decay of 0.95, statistics that differ from it by up to 4 %.

    Args:
        seeds: gives a seed a fold. It is the same in all processes, so their averages are, too.
    """

    def __init__(self, seeds: torch.Generator) -> None:
        self._seeds = seeds
        self._noise: dict[torch.device, torch.Generator] = {}

    def make(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> Average:
        """Return an average of zeros; see ``Average``.

        Raises:
            UnknownOptionError: the average would be read in float64.
        """
        if like.dtype != torch.float32:
            raise UnknownOptionError(
                f"factor_storage='bfloat16' would keep 8 of the 53 bits of {like.dtype} statistics:"
                " give None or 'host', or parameters in float32"
            )
        return _Bfloat16Average(shape, like, symmetric)

    def fold(self, averages: Sequence[Average], new: Sequence[Statistic], weight: float) -> None:
        """Replace each S by (1 - weight) S + weight S_new, rounded."""
        # One seed a fold and a generator a device: draws do not depend on how averages are grouped
        # over devices, and torch's own stream is left alone.
        seed = int(torch.randint(2**62, (), generator=self._seeds))
        for device in {average.stored.device for average in averages}:
            self._noise.setdefault(device, torch.Generator(device)).manual_seed(seed)
        for average, value in zip(averages, map(multiplied, new), strict=True):
            stored, noise = average.stored, self._noise[average.stored.device]
            if average.symmetric:  # both halves are rounded alike
                half = packed(stored).float().lerp_(packed(value), weight)
                stored.copy_(unpacked(rounded(half, noise), stored.shape))
            else:
                stored.copy_(rounded(stored.float().lerp_(value, weight), noise))


class _HostAverage(Average):
    """An average in CPU memory, pinned if it is read on a GPU."""

    def __init__(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> None:
        self.stored = torch.zeros(shape, dtype=like.dtype, pin_memory=like.is_cuda)
        self.like = like
        self.symmetric = symmetric
        self.upper_only = False

    def read(self) -> Tensor:
        return self.whole().to(self.like.device, non_blocking=True)

    def upper(self) -> Tensor:
        return self.read()

    def write(self, value: Tensor) -> None:
        if self.like.is_cuda:  # copies to the device may still be read from what is kept
            torch.cuda.synchronize(self.like.device)
        super().write(value)


class Host:
    """Averages in CPU memory; folds happen there."""

    def make(self, shape: Sequence[int], like: Tensor, symmetric: bool) -> Average:
        """Return an average of zeros; see ``Average``."""
        return _HostAverage(shape, like, symmetric)

    def fold(self, averages: Sequence[Average], new: Sequence[Statistic], weight: float) -> None:
        """Replace each S by (1 - weight) S + weight S_new.

        Copies to the host wait for the stream, and so for earlier copies to the device.
        """
        fold_in_place(averages, [multiplied(value).cpu() for value in new], weight)


def storage_of(kind: FactorStorage | None, seeds: torch.Generator) -> Storage | None:
    """Return what the option ``factor_storage`` means; None where averages are kept as they are.

    Args:
        kind: the option; None for averages in the precision and on the device they are read in.
        seeds: the seeds of the draws that round, for "bfloat16".
    """
    if kind is None:
        return None
    if kind == "bfloat16":
        return Bfloat16(seeds)
    if torch.cuda.is_available():
        return Host()
    log.info("factor_storage='host' changes nothing: there is no CUDA, all is on the host")
    return None


def rounded(x: Tensor, noise: torch.Generator) -> Tensor:
    """Return x in bfloat16: one of the two neighbours, with probabilities that keep the mean.

    Args:
        x: float32, contiguous and finite; it is overwritten.
        noise: on the device of x.
    """
    # Adding noise below the sixteen bits that stay, then cutting them off, rounds up with the
    # probability of the part that is cut.
    count = x.numel()
    drawn = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device)
    drawn.random_(-(2**63), None, generator=noise)  # sixteen bits an entry
    low = drawn.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
    bits = x.view(torch.int32)
    bits.add_(low.view(x.shape)).bitwise_and_(-0x10000)
    return x.bfloat16()
