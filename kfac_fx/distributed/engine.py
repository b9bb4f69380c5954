"""A program of which every process runs its part."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kfac_fx.codegen import Program
from kfac_fx.codegen.part import (
    emit_sum,
    emit_terms,
    inverse_shapes,
    symmetric_inverses,
    update_shapes,
)
from kfac_fx.distributed.buckets import Form
from kfac_fx.distributed.costs import refresh_costs
from kfac_fx.distributed.division import divide
from kfac_fx.linalg.precision import unrounded

if TYPE_CHECKING:
    from kfac_fx.distributed.workers import DataParallel

Inverses = dict[str, Tensor]


class Divided:
    """Runs a program's refresh in parts, and its apply where inverses are not everywhere.

    Args:
        factors: what the refresh takes, for their shapes.

    Attributes:
        division: who computes and keeps what.
        clamped: as in ``Program``, of all processes together.
    """

    def __init__(
        self, workers: DataParallel, program: Program, factors: Sequence[Tensor], tikhonov: str
    ) -> None:
        self._workers, self._program = workers, program
        self.clamped = 0
        self._forms = _inverse_forms(program, factors)
        curvature, blocks = program.curvature, program.curvature.blocks
        names = {block: program.inverses_of([block]) for block in blocks}
        elements = {
            b: sum(self._forms[name].shape.numel() for name in own) for b, own in names.items()
        }
        gradients = {name: block.parameter_count for name, block in blocks.items()}
        workers.agree(f"a program of {len(blocks)} blocks, {zlib.crc32(repr(names).encode()):08x}")
        costs = workers.costs or refresh_costs(curvature, program.couplings, tikhonov)
        agreed = torch.tensor([costs[name] for name in blocks], dtype=torch.float64)
        workers.control.first(agreed)
        self.division = divide(
            workers.size,
            program.couplings,
            dict(zip(blocks, agreed.tolist(), strict=True)),
            elements,
            gradients,
            workers.memory_fraction,
        )
        ranks = range(workers.size)
        self._mine = self.division.computed_by(workers.rank)
        self._part = program.part(self._mine) if self._mine else None
        self._shared = [
            program.inverses_of(
                [b for b in self.division.computed_by(r) if b not in self._alone(r)]
            )
            for r in ranks
        ]
        if len(self.division.everywhere) < len(blocks):
            self._terms = _Terms(self, program, workers)
        self._waiting: deque[Future[Inverses]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def _alone(self, rank: int) -> list[str]:
        return self.division.kept_alone(rank)

    def needed(self) -> tuple[str, ...]:
        kept = {*self.division.everywhere, *self._alone(self._workers.rank)}
        return self._program.inverses_of(kept)

    # Refresh.

    def refresh(
        self, damping: Tensor, factors: Sequence[Tensor], present: Mapping[str, Tensor]
    ) -> Inverses:
        """The inverses that this process keeps, of these factors or of earlier ones."""
        if not present or not self._workers.staleness:
            self._waiting.clear()
            with unrounded():  # in the thread it would be the training's, too
                own = self._computed(damping, factors)
            return self._exchanged(own)
        copies = [factor.clone() for factor in factors]
        self._thread = self._thread or ThreadPoolExecutor(1, "kfac_fx refresh")
        self._waiting.append(self._thread.submit(self._aside, damping, copies))
        if len(self._waiting) <= self._workers.staleness:
            self.clamped = 0
            return dict(present)
        return self._exchanged(self._waiting.popleft().result())

    def _computed(self, damping: Tensor, factors: Sequence[Tensor]) -> Inverses:
        return {} if self._part is None else self._part(damping, factors)

    def _aside(self, damping: Tensor, factors: Sequence[Tensor]) -> Inverses:
        """In the thread; on a GPU beside the training's stream."""
        if damping.device.type != "cuda":
            return self._computed(damping, factors)
        stream = torch.cuda.Stream(damping.device)
        torch.cuda.synchronize(damping.device)  # the copies
        with torch.cuda.stream(stream):
            found = self._computed(damping, factors)
        stream.synchronize()
        return found

    def _exchanged(self, own: Inverses) -> Inverses:
        """The inverses that all processes keep, and those that this one keeps alone."""
        clamped = 0 if self._part is None else self._part.clamped
        self.clamped = int(self._workers.agree("refresh", amount=clamped)[1])
        started = [
            self._workers.start_broadcast(
                rank,
                [self._forms[name] for name in names],
                [own.get(name) for name in names],
                "inverses",
            )
            for rank, names in enumerate(self._shared)
        ]
        kept = self._program.inverses_of(self._alone(self._workers.rank))
        result = {name: own[name] for name in kept}
        for names, finished in zip(self._shared, started, strict=True):
            result |= dict(zip(names, finished(), strict=True))
        return result

    def pending(self) -> list[Inverses]:
        return [dict(future.result()) for future in self._waiting]

    def resume(self, pending: Sequence[Mapping[str, Tensor]]) -> None:
        self._waiting.clear()
        mine = self._program.inverses_of(self._mine)
        for inverses in pending:
            future: Future[Inverses] = Future()
            future.set_result({name: inverses[name].clone() for name in mine})
            self._waiting.append(future)

    # Apply.

    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        if len(self.division.everywhere) == len(self._program.curvature.blocks):
            return self._program.apply(inverses, gradients)
        return self._terms.apply(inverses, gradients)


class _Terms:
    """The apply where some inverses are with one process alone."""

    def __init__(self, engine: Divided, program: Program, workers: DataParallel) -> None:
        self._workers, self._program = workers, program
        curvature, couplings = program.curvature, program.couplings

        def emitted(owned: Any) -> Any:
            given = curvature, couplings, program.cast, program.forms
            return emit_terms(*given, owned) if owned else None

        alone = [engine.division.kept_alone(rank) for rank in range(workers.size)]
        self._own, self._own_blocks = emitted(alone[workers.rank]), alone[workers.rank]
        self._common, self._common_blocks = (
            emitted(engine.division.everywhere),
            engine.division.everywhere,
        )
        parent = {c.child: c.parent for c in couplings}
        touched = [{*own, *(parent[b] for b in own if b in parent)} for own in alone]
        self._blocks = [[b for b in curvature.blocks if b in found] for found in touched]
        shapes = update_shapes(curvature)
        like = next(iter(engine._forms.values()))
        self._forms = [
            [Form(shapes[b], like.dtype, like.device) for b in blocks] for blocks in self._blocks
        ]
        self._sum = emit_sum(curvature, program.cast)

    @torch.no_grad()
    def apply(
        self, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        """All processes add the terms in the same order, so that their sums are equal."""
        own = self._run(self._own, self._own_blocks, inverses, gradients)
        started = [
            self._workers.start_broadcast(rank, forms, [own.get(b) for b in blocks], "updates")
            for rank, (blocks, forms) in enumerate(zip(self._blocks, self._forms, strict=True))
        ]
        total = dict(self._run(self._common, self._common_blocks, inverses, gradients))
        for blocks, finished in zip(self._blocks, started, strict=True):
            for block, term in zip(blocks, finished(), strict=True):
                total[block] = total[block] + term if block in total else term
        result: Mapping[str, Tensor] = self._sum(
            *(total[block] for block in self._program.curvature.blocks), *gradients
        )
        return result

    def _run(
        self, terms: Any, blocks: Any, inverses: Mapping[str, Tensor], gradients: Sequence[Tensor]
    ) -> Mapping[str, Tensor]:
        if terms is None:
            return {}
        given = (inverses[name] for name in self._program.inverses_of(blocks))
        found: Mapping[str, Tensor] = terms(*given, *gradients)
        return found


def _inverse_forms(program: Program, factors: Sequence[Tensor]) -> dict[str, Form]:
    symmetric = symmetric_inverses(program.curvature)
    like = factors[0]
    return {
        name: Form(shape, like.dtype, like.device, name in symmetric)
        for name, shape in inverse_shapes(program).items()
    }
