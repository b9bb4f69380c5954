"""Find the mode that made the fake tensors of a graph, make more of them, and keep no answers.

Why: a placeholder that is added to an exported graph needs a value of the graph's own mode, as
torch.export would have given it; and torch keeps what operators have answered about fake tensors,
which costs more than it saves where sizes are open. No public way: torch has no public name for
fake tensors, nor for the switch. Seen on torch 2.11, 2.13 and 2.14.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch._dynamo.config as config
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["FakeTensorMode", "detect_fake_mode", "without_fake_cache"]


@contextmanager
def without_fake_cache() -> Iterator[None]:
    """Within the context new fake tensors ask operators every time, and keep no answers.

    An answer of open sizes is made into a tensor again to see whether it can be kept, and once more
    each time it is used. That asks every question about sizes anew: an equivariant transformer of
    two open dimensions took half as long again with it, and the graph is the same one.
    """
    before = config.fake_tensor_cache_enabled
    config.fake_tensor_cache_enabled = False
    try:
        yield
    finally:
        config.fake_tensor_cache_enabled = before
