"""Tell whether a graph unpacks nested inputs by itself.

Why: a graph of torch.export takes nested arguments apart before its placeholders, so the arguments
of a call to it are not the values of its placeholders and it cannot be inlined as others can.
No public way: a graph's code generator has no public class. Seen on torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from torch import fx
from torch.fx.graph import _PyTreeCodeGen


def unpacks_inputs(graph: fx.Graph) -> bool:
    """Tell whether a graph's placeholders are the leaves of nested arguments."""
    # Modules of torch.export have a generator of this kind even where nothing is nested: they stay
    # whole too, which costs blocks but is never wrong.
    return isinstance(graph._codegen, _PyTreeCodeGen)
