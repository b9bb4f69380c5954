"""Trace through torch's python dispatcher, which knows decompositions that autograd needs.

Why: make_fx of a function with a backward pass inside stops at composite operators unless their
Python kernels are looked up at every dispatch key. No public way: torch.export switches the same
context on, and gives no name for it. Seen on torch 2.11 and 2.13.
"""

from torch._dispatch.python import enable_python_dispatcher

__all__ = ["enable_python_dispatcher"]
