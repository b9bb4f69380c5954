"""Random numbers that leave torch's own streams as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def forked(tensors: Iterable[Tensor]) -> Iterator[list[int]]:
    """Draws inside leave the streams of the CPU and of the tensors' devices as they were."""
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices):
        yield devices


@contextmanager
def seeded(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Draws inside, on the CPU and the CUDA devices of ``tensors``, come from the seed.

    Only those generators are touched: ``torch.manual_seed`` takes milliseconds before CUDA starts.
    """
    with forked(tensors) as devices:
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
