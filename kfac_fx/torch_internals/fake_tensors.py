"""Find the mode that made the fake tensors of a graph, and make more of them.

Why: a placeholder that is added to an exported graph needs a value of the graph's own mode, as
torch.export would have given it. No public way: torch has no public name for fake tensors. Seen on
torch 2.11, 2.13 and 2.14.
"""

from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["FakeTensorMode", "detect_fake_mode"]
