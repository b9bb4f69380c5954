"""A program of which every process runs its part."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, fx

from kfac_fx.codegen.apply_parts import emit_sum, emit_terms, symmetric_inverses, update_shapes
from kfac_fx.codegen.approximations.base import InverseKey
from kfac_fx.codegen.program import Program
from kfac_fx.codegen.refresh_module import Refreshed
from kfac_fx.distributed.buckets import TensorForm
from kfac_fx.distributed.control import Control
from kfac_fx.distributed.costs import refresh_costs
from kfac_fx.distributed.division import Division, divide
from kfac_fx.linalg.precision import unrounded
from kfac_fx.parallel import Agreement


class Processes(Protocol):
    """The processes as the engine sees them; ``DataParallel`` implements it.

    Attributes:
        rank: number of this process, below ``size``.
        size: number of processes.
        staleness: refreshes after which inverses come into use.
        memory_fraction: see ``divide``.
        costs: block -> cost of its refresh; None for a model of it.
        control: sends what all processes must agree on.
    """

    rank: int
    size: int
    staleness: int
    memory_fraction: float
    costs: Mapping[str, float] | None
    control: Control

    def agree(self, call: str, good: bool = True, amount: float = 0.0) -> Agreement:
        """Return whether it is good in every process, and the sum of the amounts."""

    def start_broadcast(
        self,
        source: int,
        forms: Sequence[TensorForm],
        values: Sequence[Tensor | None],
        purpose: str,
    ) -> Callable[[], list[Tensor]]:
        """Start sending one process's tensors to all; what is returned waits for them."""


class Divided:
    """Runs a program's refresh in parts, and its apply where inverses are not everywhere.

    Args:
        workers: the processes.
        program: the whole; it is not batched, as stacks cannot be cut.
        like: a tensor of the precision and on the device of the inverses.

    Attributes:
        division: who computes and keeps what.
    """

    def __init__(self, workers: Processes, program: Program, like: Tensor) -> None:
        self._workers = workers
        self._program = program
        self._forms = _inverse_forms(program, like)
        blocks = program.curvature.blocks
        keys = {block: program.inverses_of([block]) for block in blocks}
        names = {block: tuple(key.name for key in own) for block, own in keys.items()}
        workers.agree(f"a program of {len(blocks)} blocks, {zlib.crc32(repr(names).encode()):08x}")
        self.division = self._divided(keys)
        ranks = range(workers.size)
        self._mine = self.division.computed_by(workers.rank)
        self._part = program.part(self._mine) if self._mine else None
        # What each process sends after a refresh: the inverses of its own that are not its alone.
        self._shared = [
            program.inverses_of(
                [b for b in self.division.computed_by(r) if b in self.division.everywhere]
            )
            for r in ranks
        ]
        self._terms: _Terms | None = None
        if len(self.division.everywhere) < len(blocks):
            self._terms = _Terms(self.division, program, workers, like)
        self._waiting: deque[Future[Refreshed]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def _divided(self, keys: Mapping[str, Collection[InverseKey]]) -> Division:
        """Return the division by the first process's costs: all must make the same one."""
        blocks = self._program.curvature.blocks
        costs = self._workers.costs or refresh_costs(self._program)
        agreed = torch.tensor([costs[name] for name in blocks], dtype=torch.float64)
        self._workers.control.first(agreed)
        return divide(
            self._workers.size,
            self._program.couplings,
            dict(zip(blocks, agreed.tolist(), strict=True)),
            {b: sum(self._forms[key].shape.numel() for key in own) for b, own in keys.items()},
            {name: block.parameter_count for name, block in blocks.items()},
            self._workers.memory_fraction,
        )

    def _kept_alone(self) -> list[str]:
        return self.division.kept_alone(self._workers.rank)

    def needed(self) -> tuple[InverseKey, ...]:
        """Return the keys of the inverses that this process keeps."""
        return self._program.inverses_of({*self.division.everywhere, *self._kept_alone()})

    # Refresh.

    def refresh(
        self, damping: Tensor, factors: Sequence[Tensor], present: Refreshed | None = None
    ) -> Refreshed:
        """Return the inverses that this process keeps, of these factors or of earlier ones."""
        if present is None or not self._workers.staleness:
            self._waiting.clear()
            with unrounded():  # in the thread it would be the training's, too
                own = self._computed(damping, factors)
            return self._exchanged(own)
        # The averages go on changing while the thread reads them.
        copies = [factor.clone() for factor in factors]
        self._thread = self._thread or ThreadPoolExecutor(1, "kfac_fx refresh")
        self._waiting.append(self._thread.submit(self._aside, damping, copies))
        if len(self._waiting) <= self._workers.staleness:
            return replace(present, damping=damping, clamped=0)
        return replace(self._exchanged(self._waiting.popleft().result()), damping=damping)

    def _computed(self, damping: Tensor, factors: Sequence[Tensor]) -> Refreshed:
        return Refreshed({}, damping) if self._part is None else self._part(damping, factors)

    def _aside(self, damping: Tensor, factors: Sequence[Tensor]) -> Refreshed:
        """Compute in the thread; on a GPU beside the training's stream."""
        if damping.device.type != "cuda":
            return self._computed(damping, factors)
        stream = torch.cuda.Stream(damping.device)
        torch.cuda.synchronize(damping.device)  # the copies
        with torch.cuda.stream(stream):
            found = self._computed(damping, factors)
        stream.synchronize()
        return found

    def _exchanged(self, own: Refreshed) -> Refreshed:
        """Return the inverses that all processes keep, and those that this one keeps alone."""
        clamped = int(self._workers.agree("refresh", amount=own.clamped).amount)
        started = [
            self._workers.start_broadcast(
                rank,
                [self._forms[key] for key in keys],
                [own.inverses.get(key) for key in keys],
                "inverses",
            )
            for rank, keys in enumerate(self._shared)
        ]
        kept = self._program.inverses_of(self._kept_alone())
        result = {key: own.inverses[key] for key in kept}
        for keys, finished in zip(self._shared, started, strict=True):
            result |= dict(zip(keys, finished(), strict=True))
        return Refreshed(result, own.damping, clamped)

    def pending(self) -> list[Mapping[InverseKey, Tensor]]:
        """Return what is being computed, for a checkpoint; waits for it."""
        return [future.result().inverses for future in self._waiting]

    def resume(self, pending: Sequence[Mapping[str, Tensor]]) -> None:
        """Take what ``pending`` of an interrupted run returned, by the keys' names."""
        self._waiting.clear()
        mine = self._program.inverses_of(self._mine)
        for inverses in pending:
            made = {key: inverses[key.name].clone() for key in mine}
            future: Future[Refreshed] = Future()
            # The damping that they come into use with is that of the refresh by then.
            future.set_result(Refreshed(made, torch.zeros(())))
            self._waiting.append(future)

    # Apply.

    def apply(
        self, inverses: Mapping[InverseKey, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Return preconditioned gradients by parameter name; see ``Engine.apply``."""
        if self._terms is None:
            return self._program.apply(inverses, gradients)
        return self._terms.apply(inverses, gradients)


class _Owned:
    """Runs the terms of some blocks, if there are any."""

    def __init__(self, program: Program, blocks: Collection[str]) -> None:
        self._keys = program.inverses_of(blocks)
        self._run: fx.GraphModule | None = None
        if blocks:
            self._run = emit_terms(replace(program.recipe, batched=False), blocks)

    def __call__(
        self, inverses: Mapping[InverseKey, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        if self._run is None:
            return {}
        given = (inverses[key] for key in self._keys)
        found: Mapping[str, Tensor] = self._run(*given, *gradients)
        return found


class _Terms:
    """The apply where some inverses are with one process alone."""

    def __init__(
        self, division: Division, program: Program, workers: Processes, like: Tensor
    ) -> None:
        self._workers = workers
        self._order = list(program.curvature.blocks)
        alone = [division.kept_alone(rank) for rank in range(workers.size)]
        self._own = _Owned(program, alone[workers.rank])
        self._common = _Owned(program, division.everywhere)
        parent = {c.child: c.parent for c in program.couplings}
        # A child's pair adds to its parent's update too, wherever the parent is.
        touched = [{*own, *(parent[b] for b in own if b in parent)} for own in alone]
        self._blocks = [[b for b in self._order if b in found] for found in touched]
        shapes = update_shapes(program.recipe)
        self._forms = [
            [TensorForm(shapes[b], like.dtype, like.device) for b in blocks]
            for blocks in self._blocks
        ]
        self._sum = emit_sum(program.recipe)

    @torch.no_grad()
    def apply(
        self, inverses: Mapping[InverseKey, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the updates; all processes add the terms in one order, so their sums are equal."""
        own = self._own(inverses, gradients)
        started = [
            self._workers.start_broadcast(rank, forms, [own.get(b) for b in blocks], "updates")
            for rank, (blocks, forms) in enumerate(zip(self._blocks, self._forms, strict=True))
        ]
        total = dict(self._common(inverses, gradients))
        for blocks, finished in zip(self._blocks, started, strict=True):
            for block, term in zip(blocks, finished(), strict=True):
                total[block] = total[block] + term if block in total else term
        result: Mapping[str, Tensor] = self._sum(
            *(total[block] for block in self._order), *gradients
        )
        return result


def _inverse_forms(program: Program, like: Tensor) -> dict[InverseKey, TensorForm]:
    symmetric = symmetric_inverses(program.recipe)
    return {
        key: TensorForm(shape, like.dtype, like.device, key in symmetric)
        for key, shape in program.inverse_shapes().items()
    }
