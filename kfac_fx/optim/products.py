"""Derivatives of the output Fisher's root in directions, for products with the exact Fisher.

With B the derivative of the root of the output Fisher, F = J^T B^T B J. One derivative in forward
mode gives B J v for a direction v, and the products of those are all that is asked for: F itself
has parameters squared many entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_fx.codegen.functional import NotFunctionalError, no_autocast, random_nodes
from kfac_fx.codegen.replay import replayable
from kfac_fx.likelihoods.batch import BatchLikelihood, BatchTerms, Terms, batch_likelihood
from kfac_fx.likelihoods.builtin import Tree, UnknownRootError
from kfac_fx.likelihoods.named import Sum
from kfac_fx.statistics.own_pass import OwnPass
from kfac_fx.statistics.traced_pass import Arguments, Extra, Facts
from kfac_fx.torch_internals.contiguous_groups import ContiguousGroups
from kfac_fx.torch_internals.error_texts import (
    refuses_layout,
    refuses_nested_forward_mode,
    refuses_packing,
)
from kfac_fx.torch_internals.packed_rows import PackedByRows

Direction = dict[str, Tensor]
"""A tensor of the shape of each parameter, by name: a gradient, a proposal, an update."""

Parameters = Mapping[str, Tensor]
"""Parameters by name, which nobody here writes to."""

Run = Callable[[Parameters], BatchLikelihood]
"""From parameters by name to what the likelihood says about the outputs. Outputs must not depend on
random numbers that change from call to call."""


class NoProductsError(Exception):
    """The exact Fisher has no products here, for the reason that the message says."""


@contextmanager
def products_or_reason() -> Iterator[None]:
    """Tell what is missing for products, rather than torch's words for it.

    Raises:
        NoProductsError: the output Fisher is not known, or torch lacks a derivative.
    """
    try:
        yield
    except UnknownRootError as error:
        raise NoProductsError(f"no root of the Fisher of {error.name} is known") from error
    except NotImplementedError as error:  # of torch, about forward mode
        text = str(error).partition(". ")[0].partition("\n")[0]
        raise NoProductsError(f"torch says {text!r}") from error


class Derivatives(NamedTuple):
    """The derivatives of the root in directions.

    Attributes:
        rows: [n, m], one row a direction, in float64.
        terms: number of likelihood terms.
    """

    rows: Tensor
    terms: float

    def gram(self) -> Tensor:
        """Return v_i^T F v_j of one likelihood term for all pairs of directions: [n, n]."""
        return self.rows @ self.rows.T / self.terms


@torch.no_grad()
def root_derivatives(
    run: Run, parameters: Parameters, directions: Sequence[Sequence[Tensor]]
) -> Derivatives:
    """Return the derivatives of the root in directions.

    Args:
        run: is called once a direction, or for all of them together.
        parameters: where the derivatives are taken.
        directions: v_1 to v_n, each in the order, the shapes and the precision of the parameters.
    """
    tangents = [dict(zip(parameters, direction, strict=True)) for direction in directions]
    with _differentiable_forward():
        try:
            found = [_derivative(run, parameters, tangent) for tangent in tangents]
        except RuntimeError as error:
            if not refuses_nested_forward_mode(error):
                raise
            # The outputs hold forward-mode derivatives themselves (residuals of equations).
            # torch.func nests its levels, dual_level does not; it comes second, as it costs more.
            count, rows = _nested_derivatives(run, parameters, tangents)
        else:
            count, rows = found[-1][0], torch.stack([terms for _, terms in found])
    return Derivatives(rows.double(), count)


@contextmanager
def _differentiable_forward() -> Iterator[None]:
    """Take kernels with a forward-mode derivative: fused attention and oneDNN's LSTM have none."""
    with _without_mkldnn(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    enabled = torch.backends.mkldnn.set_flags(_enabled=False)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


def _derivative(run: Run, parameters: Parameters, tangents: Direction) -> tuple[float, Tensor]:
    """Return the number of terms, and the derivative of the output Fisher's root in a direction."""
    try:
        return _of_duals(run, parameters, tangents)
    except RuntimeError as error:
        # A mode hears of every function that the network calls, so none is there by default.
        if refuses_packing(error):
            with PackedByRows():
                return _of_duals(run, parameters, tangents)
        if refuses_layout(error):
            with ContiguousGroups():
                return _of_duals(run, parameters, tangents)
        raise


def _nested_derivatives(
    run: Run, parameters: Parameters, tangents: Sequence[Direction]
) -> tuple[float, Tensor]:
    """Return what ``_derivative`` does for each direction, stacked, by torch.func."""
    counts: list[float] = []

    def terms_of(given: Parameters) -> Tensor:
        made = run(given)
        counts.append(made.count)
        return made.root()

    def along(tangent: Direction) -> Tensor:
        derivative: Tensor = torch.func.jvp(terms_of, (dict(parameters),), (tangent,))[1]
        return derivative

    if len(tangents) > 1:
        # What directions share is computed once, and calls are as many as for one of them.
        stacked = {name: torch.stack([one[name] for one in tangents]) for name in parameters}
        try:
            rows: Tensor = torch.func.vmap(along, randomness="same")(stacked)
            return counts[-1], rows
        except RuntimeError:  # what vmap refuses (a number taken out of a tensor)
            pass
    rows = torch.stack([along(tangent) for tangent in tangents])
    return counts[-1], rows


def _of_duals(run: Run, parameters: Parameters, tangents: Direction) -> tuple[float, Tensor]:
    with forward_ad.dual_level():
        made = run({n: forward_ad.make_dual(p, tangents[n]) for n, p in parameters.items()})
        terms = made.root()
        tangent: Tensor | None = forward_ad.unpack_dual(terms).tangent
    return made.count, torch.zeros_like(terms) if tangent is None else tangent


class TracedRows:
    """The trace of ``root_derivatives`` for one form of a batch and a number of directions.

    What the directions share, the network's own forward, is in it once.

    Args:
        own: the network and its likelihood.
        given: a batch.
        extra: has the directions, one after another.
        names: of the parameters that the directions are of.

    Attributes:
        once: the graph.

    Raises:
        NotFunctionalError: there is no such graph.
    """

    def __init__(
        self, own: OwnPass, _: Facts, given: Arguments, extra: Extra, names: Sequence[str]
    ) -> None:
        tensors = given.tensors(())
        flat = given.flat((), None)

        def function(*found: Tensor) -> list[Tensor]:
            rest = iter(found)
            batch = flat.filled(rest)
            directions = list(rest)
            each = [directions[k : k + len(names)] for k in range(0, len(directions), len(names))]
            parameters = {name: batch.state[name] for name in names}

            def run(duals: Parameters) -> BatchLikelihood:
                return _run_once(own, batch.state, duals, batch.inputs, batch.terms)

            return [root_derivatives(run, parameters, each).rows]

        # Under no kernel that the pass itself would not take.
        with _differentiable_forward():
            self.once = replayable(function, [*tensors, *extra.tensors])
        if len(extra.tensors) > len(names) and random_nodes(self.once.graph):
            # Each direction's pass draws the masks anew, from the same seed; a trace of all of them
            # would go on drawing.
            raise NotFunctionalError("every direction draws the same masks")
        self._forward = type(self.once).forward

    @torch.no_grad()
    def __call__(self, given: Arguments, extra: Extra, count: float) -> Derivatives:
        """Return the derivatives for other tensors of the same form."""
        # Which kernel a convolution takes is asked when it runs; attention was taken apart before.
        with _without_mkldnn():
            (rows,) = self._forward(self.once, *given.tensors(()), *extra.tensors)
        return Derivatives(rows, count)


def _run_once(
    own: OwnPass,
    state: dict[str, Tensor],
    duals: Parameters,
    inputs: Tree,
    terms: tuple[Terms | None, ...],
) -> BatchLikelihood:
    """Return what the likelihood says where the parameters have tangents."""
    leaves = own.leaves(state)
    leaves.state.update(duals)  # leaves are detached, which drops tangents
    known = BatchTerms(terms, isinstance(own.likelihood, Sum), 1.0)
    with no_autocast():
        outputs = own.outputs(leaves, inputs)
        return batch_likelihood(own.likelihood, outputs, terms=known)
