"""Tell torch's errors apart that have one class, mostly RuntimeError, and differ in their texts.

Why: a user should be told what to do, which depends on why autograd, forward mode or communication
refused. No public way: the classes are built-in ones, and torch promises no text. Where a version
words an error in another way, torch's own error goes through: less clear, and no worse. Seen on
torch 2.11, 2.13 and 2.14.
"""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist

Refusal = Literal["freed", "compiled", "reentrant"]
"""Why autograd refuses a backward pass: the graph was freed; it is a compiled graph that gave its
buffers away, or none was kept; or a reentrant checkpoint allows no backward but the training's."""

COMMUNICATION = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "socket")
"""Words of errors of communication, in lower case; newer ones have the class ``DistError``."""


def backward_refusal(error: RuntimeError) -> Refusal | None:
    """Return why autograd refused a backward pass; None for any other error."""
    text = str(error)
    # In this order: the text about a freed graph advises retain_graph, too.
    if "second time" in text:
        return "freed"
    if "donated" in text or "retain_graph" in text:
        return "compiled"
    return "reentrant" if "use_reentrant" in text else None


def refuses_nested_forward_mode(error: RuntimeError) -> bool:
    """Tell whether a function inside took derivatives in forward mode by autograd's own API."""
    return "Nested forward mode" in str(error)


def refuses_packing(error: RuntimeError) -> bool:
    """Tell whether a sequence was packed in forward mode, of which torch has no derivative."""
    return isinstance(error, NotImplementedError) and "_pack_padded_sequence" in str(error)


def refuses_layout(error: RuntimeError) -> bool:
    """Tell whether a view was asked for that the entries' order in memory does not allow."""
    return "view size is not compatible" in str(error)


def refuses_derivative(error: RuntimeError) -> bool:
    """Tell whether a derivative was asked for of what autograd has no graph of."""
    return "does not require grad and does not have a grad_fn" in str(error)


def of_communication(error: RuntimeError) -> bool:
    """Tell whether processes could not reach each other."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in COMMUNICATION)


def refuses_values(error: ValueError) -> bool:
    """Tell whether a distribution of torch refused values: of its parameters, or outside of it."""
    text = str(error)
    return text.startswith(("Expected parameter ", "Expected value argument")) and (
        "to satisfy the constraint" in text or "to be within the support" in text
    )
