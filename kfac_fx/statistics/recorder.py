"""The statistics of one step at a time: switches the taps, and gathers what passes leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from kfac_fx.config import Fisher
from kfac_fx.errors import ObservationError, TapsTakenError, UnknownOptionError
from kfac_fx.ir.curvature_graph import Holder
from kfac_fx.ir.use import StatisticKey
from kfac_fx.likelihoods.batch import drawn_seed, output_tensors
from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.ops.gram import Rows, Statistic, multiplied
from kfac_fx.ops.net_buffers import STORE, all_buffers, switch
from kfac_fx.ops.state import state_of
from kfac_fx.ops.tap import OTHER_SHAPE
from kfac_fx.parallel import StatisticSlot, Values, Workers
from kfac_fx.statistics.buffers import Statistics, StatisticSources, sources_of
from kfac_fx.statistics.empirical import EmpiricalStatistics
from kfac_fx.statistics.forward import Forward, run_network
from kfac_fx.statistics.own_pass import OwnPass
from kfac_fx.statistics.pass_cache import CompiledPass
from kfac_fx.statistics.replays import Replays, is_ours
from kfac_fx.statistics.sampled import Collected, SampledStatistics
from kfac_fx.statistics.swap_tensors import Places
from kfac_fx.statistics.user_graph import BackwardWatch
from kfac_fx.torch_internals import foreach

# Module of factor buffers -> whose turn it is. Graphs that share buffers share their taps, and a
# copy of a model has buffers of its own. Weak both ways: neither models nor optimizers live longer.
_turns: WeakKeyDictionary[nn.Module, ReferenceType[Recorder]] = WeakKeyDictionary()


class _Pass(NamedTuple):
    """The statistics of one pass in a step.

    Attributes:
        values: in the order of the step's keys.
        summed: waits for their sum over the processes; None where there is one process.
        total: the number of likelihood terms of all processes.
    """

    values: Values
    summed: Callable[[], Values] | None
    total: float


@contextmanager
def borrowed_taps(net: nn.Module, owner: str) -> Iterator[None]:
    """Give the taps of a module back as they were: on or off, with their bases, in whose turn.

    Args:
        net: the instrumented module.
        owner: who borrows them, for the message.

    Raises:
        TapsTakenError: an optimizer is in the middle of a step with them.
    """
    store: nn.Module = getattr(net, STORE)
    turn = _turns.get(store)
    last = None if turn is None else turn()
    if last is not None and last._observed:
        raise TapsTakenError(
            f"a {last._owner} on this module is in the middle of a step: call step() before {owner}"
        )
    buffers = all_buffers(net)
    on = [buffer for buffer in buffers if buffer.requires_grad]
    joins = [(state, state.gathering) for state in map(state_of, buffers)]
    kept = [(buffer, buffer.clone()) for buffer in buffers if any(buffer.stride())]
    try:
        yield
    finally:
        switch(net, on, True)
        for buffer, value in kept:
            buffer.copy_(value)
        for state, gathering in joins:
            state.gathering = gathering
        if turn is not None:
            _turns[store] = turn


def _check_sound(key: StatisticKey, value: Statistic, shape: torch.Size) -> None:
    """Check that a statistic is a tensor that averages and inverses can be formed of.

    Raises:
        ObservationError: it is of a subclass that runs operators itself, or of another shape.
    """
    tensor = value.rows if isinstance(value, Rows) else value
    # Such subclasses (``__torch_dispatch__``) hold other tensors, and have no memory of their own
    # for the products and decompositions to write into, which would fail with other words later.
    kind: Any = type(tensor)
    if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise ObservationError(
            f"the statistics of {key.slot!r} came as {kind.__name__}, a subclass of torch.Tensor "
            "with __torch_dispatch__, which cannot be averaged: give the network plain tensors in "
            "the passes that are observed"
        )
    if isinstance(value, Tensor) and value.shape != shape:
        raise ObservationError(
            f"the statistic {key.factor} of {key.slot!r} has the shape {list(value.shape)}, where "
            f"its factor has {list(shape)}: {OTHER_SHAPE}"
        )


class StepStatistics:
    """Statistics of one step, from one or several micro-batches and processes.

    Each weighs by its number of likelihood terms, as if they had been one batch.

    Args:
        sources: the tensors that the statistics are gradients of.
        workers: the processes whose statistics are added up.

    Attributes:
        added: the statistics of each pass that were added and not taken yet.
    """

    def __init__(self, sources: StatisticSources, workers: Workers) -> None:
        self._workers = workers
        self._keys = [one.key for one in sources.names.tapped]
        self._inputs = sources.names.inputs
        pairs = zip(sources.names.tapped, sources.factors, strict=True)
        self._places = [StatisticSlot(factor, one.symmetric) for one, factor in pairs]
        parameters = iter(sources.parameters)
        for block in sources.names.untapped:
            own = [next(parameters) for _ in block.names]
            flat = torch.zeros((), dtype=own[0].dtype, device=own[0].device)
            self._keys.append(block.key)
            self._places.append(StatisticSlot(flat.expand(sum(p.numel() for p in own)), False))
        self.added: list[_Pass] = []

    def add(self, collected: Collected) -> None:
        """Take over the statistics of one pass; their sum over the processes starts.

        Derivatives are of a sum over the terms of this process: those of a mean over the terms of
        all, squared and summed over the cases, are 1 / total of it. Statistics of inputs are means
        over this process's cases.

        Raises:
            ObservationError: a statistic is not what its average is made for.
        """
        assert collected.scale is not None
        squares = 1 / (collected.scale**2 * collected.total)
        means = collected.count / collected.total
        values = [collected.statistics.get(key) for key in self._keys]
        for key, slot, one in zip(self._keys, self._places, values, strict=True):
            # Looked at here, and closely only where something is unusual: this is in every step.
            if one is not None and (type(one) is not Tensor or one.shape != slot.like.shape):
                _check_sound(key, one, slot.like.shape)
        split = self._inputs  # statistics of inputs come first
        for factor, places in ((means, range(split)), (squares, range(split, len(values)))):
            if factor == 1.0:
                continue
            tensors = []
            for place in places:
                value = values[place]
                if isinstance(value, Rows):
                    values[place] = value * factor
                elif value is not None:
                    tensors.append(value)
            if tensors:
                foreach.mul_(tensors, factor)
        summed = None
        if self._workers.size > 1:
            summed = self._workers.start_sum(self._places, values)
        self.added.append(_Pass(values, summed, collected.total))

    def take(self) -> Statistics:
        """Return the statistics in the scale of one likelihood term, and start anew.

        It waits for the sums over the processes.
        """
        mean: Statistics = {}
        added = self.added
        self.added = []
        terms = sum(each.total for each in added)
        for each in added:
            weight = each.total / terms
            values = each.values if each.summed is None else each.summed()
            for key, value in zip(self._keys, values, strict=True):
                if value is None:
                    continue
                more = value if weight == 1.0 else value * weight
                mean[key] = more if key not in mean else multiplied(mean[key]) + multiplied(more)
        return mean

    def forget(self) -> None:
        """Start anew; sums over the processes are not waited for, as others may have failed."""
        self.added = []


class Recorder:
    """The statistics of one step at a time.

    ``observe`` takes the user's own forward, ``observe_inputs`` runs a pass of the recorder's own;
    ``take`` ends the step.

    Several objects may use the taps of one module, in turns. A tap records into one buffer and is
    on or off for everyone: if two objects switched the taps of one module in the same step, one
    would lose its statistics, train on with averages that stand still, and say nothing. Whole steps
    may alternate: that is how two preconditioners are compared on one network, and what happens
    where a notebook makes a ``Preconditioner`` again. Within a step the recorder raises an error.

    Args:
        net: carries the taps.
        blocks: whose statistics are wanted: diagonal blocks, then pairs and moments of them.
        likelihood: the likelihood of the outputs.
        fisher: "sampled", "exact" or "empirical".
        generator: the generator of the draws.
        workers: the processes whose statistics are added up.
        forward: a function from (network, inputs) to outputs, of passes of the recorder's own.
        compile: those passes; a name is that of a backend of torch.compile.
        by_inputs: whether statistics come from passes of the recorder's own from the first on.
        owner: name of the class that the recorder works for, for messages.
        draws: how many draws of "sampled" a pass of the recorder's own takes the mean of.

    Attributes:
        sources: the tensors that statistics are gradients of.
        by_inputs: whether statistics come from passes of its own: the taps stay off in others.
        own: such a pass, node by node.
        seed: gives the seed of the draws of the next pass; 0 if there are none.
        compile: the value as given.
        replays: the traces of the network's passes.

    Raises:
        UnknownOptionError: the empirical Fisher of a sum of likelihoods.
    """

    def __init__(
        self,
        net: nn.Module,
        blocks: Iterable[Holder],
        likelihood: Likelihood | Sum,
        fisher: Fisher,
        generator: torch.Generator,
        workers: Workers,
        *,
        forward: Forward = run_network,
        compile: bool | str = False,
        by_inputs: bool = False,
        owner: str = "Preconditioner",
        draws: int = 1,
    ) -> None:
        if fisher == "empirical" and isinstance(likelihood, Sum):
            raise UnknownOptionError(
                "fisher='empirical' reuses the training backward, which mixes the gradients of the "
                "parts of a sum of likelihoods: use 'sampled' or 'exact'"
            )
        self.net = net
        self.by_inputs = by_inputs
        self.compile = compile
        self.sources = sources_of(net, blocks)
        # What recorded with these taps before may have wanted more of them.
        buffers = all_buffers(net)
        switch(net, buffers, False)
        for buffer in buffers:
            buffer.grad = None
        places = Places(net)
        self.own = OwnPass(
            net, self.sources, likelihood, fisher, forward, workers, places, repeats=draws
        )
        # Code that is not the library's may compute other things at the next call.
        pure = forward is run_network and is_ours(likelihood) and draws == 1
        self.replays = Replays(net, pure)
        self._pass = CompiledPass(self.own, compile, self.replays)
        # A pass that draws nothing must not move the generator: ``int`` gives 0.
        self.seed = partial(drawn_seed, generator, workers) if self.own.draws else int
        self._sampled = SampledStatistics(self.sources, likelihood, fisher, workers, self.seed)
        self._empirical = None
        if fisher == "empirical":
            self._empirical = EmpiricalStatistics(self.sources, likelihood, workers)
        self._backward: BackwardWatch | None = None
        self._step = StepStatistics(self.sources, workers)
        self._store: nn.Module = getattr(net, STORE)
        self._owner = owner
        self._observed = False
        self._reference = ref(self)
        self.take_turn()

    @property
    def observing(self) -> bool:
        """Say whether a pass was observed since the taps were switched."""
        return self._backward is not None or bool(self._step.added)

    @property
    def terms(self) -> float:
        """Return the number of likelihood terms of what the step has so far, in all processes."""
        return sum(each.total for each in self._step.added)

    def switch(self, on: bool) -> None:
        """Let the forward passes from now on record or not; what was not taken is forgotten.

        It is this recorder's turn from here on.

        Raises:
            ObservationError: this recorder is a copy of another.
        """
        if self._reference() is not self:
            raise self._copied()
        if _turns.get(self._store) is not self._reference:
            self.take_turn()
        self._end_step(forwards=True)
        on = on and not self.by_inputs
        if any(factor.requires_grad != on for factor in self.sources.factors):
            switch(self.net, self.sources.factors, on)
        # One backward asks for sampled statistics; exact ones take several, and empirical ones are
        # the training's. Another object may have left the taps on, and the notes its way.
        noted = on and self.own.fisher == "sampled"
        if any(state.noted != noted for state in self.sources.states):
            self.sources.note(noted)

    def observe(self, outputs: Tree, targets: Tree) -> bool:
        """Record a forward pass, or prepare to; False if some outputs are not finite.

        Raises:
            LikelihoodError, ObservationError: see ``Preconditioner.observe``.
            TapsTakenError: another object is in the middle of a step, or has switched off taps that
                this one needs, so that the forward recorded too little.
        """
        turn = _turns.get(self._store)
        if turn is None or turn() is not self:
            self._check_turn()
        self._observed = True
        if self.by_inputs:
            raise ObservationError(
                "statistics come from the inputs, because the net is compiled or inputs were "
                "given before: call observe(outputs, targets, inputs=...)"
            )
        if self._backward is not None and not self._backward.passed:
            raise ObservationError("observe() was called twice before loss.backward()")
        if self._backward is not None:
            self._finish()  # another micro-batch of the step
        self.sources.forget()  # what backward passes left that nobody observed
        if self._empirical is not None:
            self._check_targets(targets)
            watch = self._empirical.watch(outputs, targets)
            self._backward = watch or BackwardWatch(output_tensors(outputs))
            return watch is not None
        collected = self._sampled.collect(outputs, targets)
        if collected.finite:
            self._step.add(collected)
        self._backward = BackwardWatch(output_tensors(outputs), tap=collected.tap)
        return collected.finite

    def observe_inputs(self, inputs: Tree, targets: Tree) -> bool:
        """Record a pass of the recorder's own; False if some outputs are not finite.

        Raises:
            LikelihoodError, ObservationError: see ``Preconditioner.observe``.
        """
        self.take_turn()
        self._check_targets(targets)
        return self.add(self._pass(inputs, targets, self.seed()).collected)

    def take(self) -> Statistics:
        """Return the step's statistics in the scale of one likelihood term, and end the step.

        They are empty if there are none. They are the caller's alone: a refresh that follows has
        their memory.

        Raises:
            ObservationError: of empirical statistics, no backward has come to the outputs, or
                several have.
            TapsTakenError: another object had a turn since ``observe``. What was observed is
                forgotten: statistics are not whole, and the next step is.
        """
        if self._reference() is not self:
            raise self._copied()
        if self._observed and _turns[self._store]() is not self:
            lost = self._taken("was made or used between observe() and step()")
            self.switch(True)
            raise lost
        if self._empirical is not None:
            self._finish()
        found = self._step.take()
        self._end_step()
        return found

    # What passes with a loss need (``TrainingStep``).

    def only_own_passes(self) -> OwnPass:
        """Return the recorder's own pass, from which alone statistics come from now on."""
        self.by_inputs = True
        self.switch(False)
        return self.own

    def add(self, collected: Collected) -> bool:
        """Add the statistics of a pass of the recorder's own; False if it was not finite.

        Raises:
            ObservationError: no tap was passed.
        """
        self.by_inputs = True
        self.sources.pause()  # of a training forward that was recorded
        if collected.finite:
            wanted = bool(self.sources.factors) and collected.count > 0
            tapped = (one.key for one in self.sources.names.tapped)
            if wanted and not any(key in collected.statistics for key in tapped):
                raise ObservationError(
                    "the pass came to no layer that is recorded: a closure must return what the "
                    "network that it is given computes, lambda net: net(x), and the forward must "
                    "read its parameters from the modules that registered them, as the pass runs "
                    "with copies in these places (lists and dictionaries will do, tuples will not)"
                )
            self._step.add(collected)
        return collected.finite

    # Turns.

    def take_turn(self) -> None:
        """Make it this recorder's turn: it switches the taps, or begins a step of its own.

        Raises:
            ObservationError: this recorder is a copy of another.
        """
        if self._reference() is not self:
            raise self._copied()
        self._observed = False
        _turns[self._store] = self._reference
        self.sources.claim()

    def _check_turn(self) -> None:
        """Take the turn from another recorder, for a forward that has already run.

        Raises:
            TapsTakenError: see ``observe``.
            ObservationError: this recorder is a copy of another.
        """
        if self._reference() is not self:
            raise self._copied()
        last = _turns[self._store]()
        if last is not None and last._observed:
            raise self._taken("is in the middle of a step")
        if not all(factor.requires_grad for factor in self.sources.factors):
            raise self._taken("switched off taps that this one needs")
        _turns[self._store] = self._reference
        self.sources.claim()

    def _copied(self) -> ObservationError:
        # A copy has buffers of its own, but states and programs that go on looking at the first
        # one's: its statistics would come from there, or from nowhere. It is seen by the reference
        # to itself, which copies leave as it is.
        return ObservationError(
            f"this {self._owner} is a copy by copy.deepcopy, which cannot record: make a new "
            f"{self._owner} on the copied module, and give it the first one's state by "
            "load_state_dict(first.state_dict())"
        )

    def _taken(self, what_it_did: str) -> TapsTakenError:
        last = _turns[self._store]()
        other = "another object" if last is None else f"a {last._owner}"
        return TapsTakenError(
            f"{other} on the module of this {self._owner} {what_it_did}: finish the step of one "
            "before the other's, or give each a transform of its own "
            "(kfac_fx.transform(copy.deepcopy(model)))"
        )

    def _check_targets(self, targets: Tree) -> None:
        if self.own.fisher == "empirical" and targets is None:
            raise ObservationError("fisher='empirical' needs observe(outputs, targets)")

    def _finish(self) -> None:
        """Take what the last observed backward left; another micro-batch may follow."""
        if self._backward is not None:
            self._backward.close()
            self._backward = None
        if self._empirical is None:
            return
        try:
            collected = self._empirical.finish()
        except ObservationError:
            self._end_step()  # half of a step is none
            raise
        if collected is not None:
            self._step.add(collected)

    def _end_step(self, *, forwards: bool = False) -> None:
        """Forget all that the step has left; ``forwards`` as of ``StatisticSources.forget``."""
        self._observed = False
        if self._backward is not None:
            self._backward.close()
            self._backward = None
        if self._empirical is not None:
            self._empirical.stop()
        if self._step.added:
            self._step.forget()
        self.sources.forget(forwards=forwards)
