"""Elementwise operations and norms of whole lists of tensors, in one call.

Why: an optimizer's step over a hundred parameters is bound by the number of calls, and on a GPU by
the number of kernels; torch.optim does its steps in this way. No public way: torch has no public
name for these functions, though torch.optim's ``foreach`` option is public. They are bound here
without a wrapper, for a wrapper would cost what they save. Seen on torch 2.11, 2.13 and 2.14.
"""

import torch

add_ = torch._foreach_add_
"""Add to each tensor its partner in another list (times ``alpha``), or one number, in place."""

copy_ = torch._foreach_copy_
"""Copy into each tensor its partner in another list, in place."""

flattened = torch._C._nn.flatten_dense_tensors
"""Return the entries of tensors of one dtype, one after another, as a vector."""

unflattened = torch._C._nn.unflatten_dense_tensors
"""Return the parts of such a vector in the shapes of tensors, in its memory."""

lerp_ = torch._foreach_lerp_
"""Move each tensor towards its partner in another list by a weight, in place."""

mul = torch._foreach_mul
"""Return the products of each tensor with its partner in another list, or with one number."""

mul_ = torch._foreach_mul_
"""Multiply each tensor by its partner in another list, or all by one number, in place."""

norm = torch._foreach_norm
"""Return the norm of each tensor; the order is 2 unless it is given."""

sub = torch._foreach_sub
"""Return each tensor less its partner in another list."""

zero_ = torch._foreach_zero_
"""Set each tensor to zero, in place."""
