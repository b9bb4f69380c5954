"""The tensors that statistics are gradients of, and what makes statistics of the gradients.

Autograd returns derivatives in the order in which it was asked for them. ``StatisticSources`` has
that order, and is the one place where derivatives get their names (``StatisticKey``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.ir.curvature_graph import CurvatureBlock, Holder, Moment, Pair
from kfac_fx.ir.use import Role, StatisticKey
from kfac_fx.ops.case_gradients import case_factors
from kfac_fx.ops.gram import Statistic, forget_input, multiplied
from kfac_fx.ops.net_buffers import STORE
from kfac_fx.ops.state import Gathering, state_of

Statistics = dict[StatisticKey, Statistic]
"""New statistics by name; some may not be multiplied yet."""


class TappedFactor(NamedTuple):
    """A statistic that taps deliver.

    Attributes:
        key: its name.
        role: how it depends on the derivative.
        symmetric: whether it holds symmetric matrices [..., n, n].
    """

    key: StatisticKey
    role: Role
    symmetric: bool


class UntappedBlock(NamedTuple):
    """A block without a tap: its statistic is the flat square of its parameters' gradients.

    Attributes:
        key: name of the statistic.
        names: the names of the parameters.
    """

    key: StatisticKey
    names: tuple[str, ...]


@dataclass(frozen=True)
class StatisticNames:
    """The statistics of a network, in the order in which backward passes are asked for them.

    Attributes:
        tapped: statistics of taps; first those that do not depend on the derivative.
        inputs: how many do not.
        untapped: blocks without a tap.
        shared: the G that several calls of a layer share, each with the A whose calls are counted.
        joinable: the statistics of blocks whose calls in forward mode have joint factors, see
            ``kfac_fx.ops.case_gradients``: A, G, and the count of positions where there is one.
    """

    tapped: tuple[TappedFactor, ...]
    inputs: int
    untapped: tuple[UntappedBlock, ...]
    shared: tuple[tuple[StatisticKey, tuple[StatisticKey, ...]], ...]
    joinable: tuple[tuple[StatisticKey, ...], ...]


class StatisticSources:
    """The tensors that statistics are gradients of.

    Args:
        names: what the statistics are called.
        factors: buffers of ``names.tapped``.
        parameters: the parameters of ``names.untapped``, block by block.

    Attributes:
        inputs: the factor buffers that do not depend on the derivative (A, counts).
        gradients: those that are quadratic in it (G, C).
        wanted: all tensors that a backward pass is asked for, in its order.
        states: what backward passes know of ``factors``.
        gathering: switched on while a backward is asked for statistics.
        state_by_buffer: the same by factor buffer; tensors are hashed by identity.
    """

    def __init__(
        self, names: StatisticNames, factors: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        self.names = names
        self.factors = tuple(factors)
        self.parameters = tuple(parameters)
        self.inputs = self.factors[: names.inputs]
        self.gradients = self.factors[names.inputs :]
        self.wanted = (*self.factors, *self.parameters)
        self.states = tuple(state_of(factor) for factor in self.factors)
        self.state_by_buffer = dict(zip(self.factors, self.states, strict=True))
        keys = [one.key for one in names.tapped]
        self._state_by_key = dict(zip(keys, self.states, strict=True))
        self._joinable = {self._state_by_key[key] for keys in names.joinable for key in keys[:2]}
        self.gathering = Gathering()
        self.claim()

    def claim(self) -> None:
        """Say which calls in forward mode are joined; others with these buffers may join others."""
        for state in self.states:
            state.gathering = self.gathering if state in self._joinable else None

    def statistics(
        self, tapped: Sequence[Statistic | None], untapped: Sequence[Tensor | None]
    ) -> Statistics:
        """Return the statistics of one recorded pass by name.

        Args:
            tapped: what came to ``factors``.
            untapped: what came to ``parameters``, as it is. A block counts if all of its have come.
        """
        pairs = zip(self.names.tapped, tapped, strict=True)
        found: Statistics = {one.key: value for one, value in pairs if value is not None}
        calls_of = {key: state.deliveries for key, state in self._state_by_key.items()}
        for keys in self.names.joinable:
            state = self._state_by_key[keys[0]]
            if any(stream.derivative for stream in state.streams):
                # Per-case gradients of all calls are one sum, and count as one use of the layer, of
                # one position, in as far as others are added to them.
                A, G = case_factors(state.streams)
                _add(found, keys, (A, G, A.new_ones(())))
                calls_of[keys[0]] += 1 - state.streamed
            else:  # forward mode was for something that the outputs do not depend on
                with torch.no_grad():
                    for stream in state.streams:
                        _add(found, keys, stream.alone())
            state.streams.clear()
        # As for shared positions A (x) G stands for a sum of uncorrelated terms, one a call of the
        # layer (docs/explanation/mathematics.md, section 4): G is their mean, of a pair's calls the
        # geometric one. A derivative in forward mode is a call of its own.
        for key, inputs in self.names.shared:
            calls = [calls_of[name] for name in inputs]
            if key in found and max(calls) > 1:
                found[key] = found[key] * math.prod(max(1, c) for c in calls) ** (-1 / len(calls))
        start = 0
        for block in self.names.untapped:
            end = start + len(block.names)
            squares = [squared(g).flatten() for g in untapped[start:end] if g is not None]
            if len(squares) == len(block.names):
                found[block.key] = torch.cat(squares).to(squares[0].dtype)
            start = end
        return found

    @property
    def joined(self) -> bool:
        """Say whether taps have seen a call in forward mode whose factors are joint."""
        return any(state.joined > 0 for state in self.states)

    def begin_column(self, place: int) -> None:
        """Tell the streams of a column of the exact Fisher from those of the columns before."""
        for state in self.states:
            state.column = place

    def note(self, may: bool) -> None:
        """Let taps leave notes in the graphs of forward passes from now on, or not."""
        for state in self.states:
            state.noted = may

    def pause(self, paused: bool = True) -> None:
        """Let backward passes of graphs that are already built skip all factors, or no longer."""
        for state in self.states:
            state.paused = paused

    @contextmanager
    def only(self, wanted: Sequence[Tensor]) -> Iterator[None]:
        """Let backward passes inside form the statistics of some factors alone.

        Args:
            wanted: ``inputs`` or ``gradients``.
        """
        taken = set(wanted)
        pairs = zip(self.factors, self.states, strict=True)
        skipped = [state for factor, state in pairs if factor not in taken]
        for state in skipped:
            state.paused = True
        try:
            yield
        finally:
            for state in skipped:
                state.paused = False

    def forget(self, *, forwards: bool = False) -> None:
        """Forget what passes have left in the factors; the only place that does.

        Recorded graphs deliver again, deliveries are counted anew, gradients and the last input
        factor are let go of.

        Args:
            forwards: whether it is the end of a step, after which few recorded forwards are of use.
        """
        for factor, state in zip(self.factors, self.states, strict=True):
            state.paused = False
            state.deliveries = 0
            if state.joined:
                state.streamed = 0
                state.column = 0
                state.streams.clear()
                state.joined -= forwards
            factor.grad = None
        forget_input()


def _add(
    found: Statistics, keys: Sequence[StatisticKey], values: Sequence[Statistic | None]
) -> None:
    """Add what streams make of A, of G, and of a count of positions where there is one."""
    for key, value in zip(keys, values, strict=False):
        if value is not None:
            before = found.get(key)
            found[key] = value if before is None else multiplied(before) + multiplied(value)


def squared(gradient: Tensor) -> Tensor:
    """Return |gradient|^2, dense and in float32 at least."""
    gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return gradient.abs().square() if gradient.is_complex() else gradient.square()


def sources_of(net: nn.Module, blocks: Iterable[Holder]) -> StatisticSources:
    """Return the sources of blocks, pairs and moments.

    Args:
        net: the instrumented module, which holds the factor buffers and the parameters.
        blocks: whose statistics are wanted; a pair comes after its blocks.
    """
    blocks = list(blocks)
    store = getattr(net, STORE)
    names_of = {parameter: name for name, parameter in net.named_parameters()}
    # Not by get_parameter, which a scripted module refuses.
    parameter_at = dict(net.named_parameters(remove_duplicate=False))
    tapped: list[TappedFactor] = []
    untapped: list[UntappedBlock] = []
    for block in blocks:
        if not block.tapped:
            assert isinstance(block, CurvatureBlock)
            key = StatisticKey(block.slot, block.factors[0].name)
            # A tied parameter has several names, and one that the module lists.
            own = [names_of[parameter_at[name]] for name in block.parameters]
            untapped.append(UntappedBlock(key, tuple(own)))
            continue
        for spec in block.factors:
            symmetric = isinstance(block, CurvatureBlock) and spec.role != "count"
            key = StatisticKey(block.slot, spec.name)
            tapped.append(TappedFactor(key, spec.role, symmetric and not spec.diagonal))
    tapped.sort(key=lambda one: one.role == "gradient")  # stable
    inputs = sum(one.role != "gradient" for one in tapped)
    names = StatisticNames(
        tuple(tapped), inputs, tuple(untapped), _shared_uses(blocks), _joinable(blocks)
    )
    factors = [getattr(getattr(store, one.key.slot), one.key.factor) for one in tapped]
    parameters = [parameter_at[name] for block in untapped for name in block.names]
    return StatisticSources(names, factors, parameters)


def _shared_uses(
    blocks: Sequence[Holder],
) -> tuple[tuple[StatisticKey, tuple[StatisticKey, ...]], ...]:
    """Return the G that are divided by the number of calls that were recorded, with those A.

    Of a pair these are the A of both blocks. Blocks that count positions at run time need none of
    this: their counts are statistics.
    """
    inputs: dict[str, StatisticKey] = {}
    found: list[tuple[StatisticKey, tuple[StatisticKey, ...]]] = []
    for block in blocks:
        if not block.tapped or [spec.role for spec in block.factors] != ["input", "gradient"]:
            continue
        A, G = (StatisticKey(block.slot, spec.name) for spec in block.factors)
        inputs.setdefault(block.name, A)
        ends = (block.earlier, block.later) if isinstance(block, Pair) else (block.name,)
        if all(end in inputs for end in ends):
            found.append((G, tuple(inputs[end] for end in ends)))
    return tuple(found)


def _joinable(blocks: Sequence[Holder]) -> tuple[tuple[StatisticKey, ...], ...]:
    """Return the statistics of blocks whose calls in forward mode may have joint factors.

    Blocks of pairs keep factors of single uses, as cross factors are of those: with others the
    coupled matrix need not be positive. So do those whose moments are of single uses.
    """
    apart: set[str] = set()
    for holder in blocks:
        if isinstance(holder, Pair):
            apart |= {holder.earlier, holder.later}
        elif isinstance(holder, Moment):
            apart.add(holder.block)
    roles = ["input", "gradient", "count"]
    return tuple(
        tuple(StatisticKey(block.slot, spec.name) for spec in block.factors)
        for block in blocks
        if isinstance(block, CurvatureBlock)
        and block.tapped
        and block.name not in apart
        and len(block.factors) > 1
        and [spec.role for spec in block.factors] == roles[: len(block.factors)]
    )
