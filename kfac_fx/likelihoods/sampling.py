"""Random streams: draws that leave torch's own streams as they were, and what they are put into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class WeightedSum(NamedTuple):
    """A scalar that is only differentiated, and so need not be formed.

    Forming it would take as many calls, and as many more in the backward, as a layer does.

    Attributes:
        tensors: whose entries are summed; functions of a network's outputs.
        weights: of the entries, in the shapes of the tensors; constants.
    """

    tensors: list[Tensor]
    weights: list[Tensor]


@contextmanager
def forked(tensors: Iterable[Tensor]) -> Iterator[list[int]]:
    """Give the streams of the CPU and of the tensors' devices their state back at the end."""
    devices: list[int] = []
    if torch.cuda.is_initialized():
        devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    if devices:
        with torch.random.fork_rng(devices):
            yield devices
        return
    # Passes do this several times a step: fork_rng asks more than has to be known on a CPU.
    before = torch.get_rng_state()
    try:
        yield devices
    finally:
        torch.set_rng_state(before)


@contextmanager
def seeded(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Draw from a seed inside, on the CPU and the CUDA devices of ``tensors``.

    Only those generators are touched: ``torch.manual_seed`` takes milliseconds before CUDA starts.
    """
    with forked(tensors) as devices:
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def fresh_generator() -> torch.Generator:
    """Return a generator seeded by torch's global stream: runs repeat, preconditioners differ."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
