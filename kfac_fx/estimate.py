"""The Fisher of a data set, without training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, NamedTuple

import torch

from kfac_fx.config import FISHERS, CurvatureOptions, Fisher, Structure, choice, period
from kfac_fx.curvature.ekfac import Eigenbasis
from kfac_fx.curvature.inverses import InverseFisher
from kfac_fx.curvature.parameters import transformed
from kfac_fx.errors import StatisticsError, UnknownOptionError
from kfac_fx.likelihoods.builtin import Tree
from kfac_fx.likelihoods.named import Given, likelihood_of
from kfac_fx.likelihoods.sampling import forked, fresh_generator
from kfac_fx.parallel import ALONE, Workers
from kfac_fx.reading.fisher_estimate import FisherEstimate
from kfac_fx.statistics.forward import Forward, run_network
from kfac_fx.statistics.recorder import Recorder, borrowed_taps

if TYPE_CHECKING:
    from torch import fx

log = logging.getLogger("kfac_fx")

Progress = Callable[[int, int], None]
"""Called with the number of batches that are done, and of all, 0 where the loader has no length."""


class _Batch(NamedTuple):
    """A batch of a loader: what the network is called with, and the targets."""

    inputs: Tree
    targets: Tree


def estimate(
    net: fx.GraphModule,
    loader: Iterable[Tree],
    likelihood: Given = "categorical",
    *,
    fisher: Fisher = "sampled",
    draws: int = 1,
    ekfac: bool = False,
    structure: Structure | None = None,
    targets: str = "labels",
    forward: Forward = run_network,
    generator: torch.Generator | None = None,
    workers: Workers = ALONE,
    progress: Progress | None = None,
) -> FisherEstimate:
    """Return the Fisher of a data set: means over its likelihood terms, for linear algebra.

    Nothing is trained, and nothing changes: parameters, gradients, buffers and torch's random
    stream stay as they are, an optimizer on the same network goes on as if nothing had been. The
    network is in the mode that it is in: call ``net.eval()`` before for frozen batch norms.

    Args:
        net: what ``kfac_fx.transform`` returned; of ``ekfac``, with ``ekfac=True``.
        loader: its batches are pairs (inputs, targets), mappings with the targets under a key of
            their own and keywords of the network else, or a tensor of inputs alone. ``ekfac`` goes
            through it twice.
        likelihood: what the outputs mean; see ``Preconditioner``.
        fisher: "sampled", "exact" or "empirical"; see ``Preconditioner``.
        draws: of "sampled", how many targets are drawn for every forward. The error of an entry
            falls as the root of terms times draws.
        ekfac: whether eigenvalues of Kronecker blocks are second moments of per-case gradients.
        structure: "block_diagonal" leaves the couplings out; None for the transform's own.
        targets: the key of the targets in batches that are mappings.
        forward: from (network, inputs) to the likelihood's outputs, where the network does not
            return them.
        generator: the generator of the draws, on the CPU. None for one that torch's global stream
            seeds.
        workers: the processes that share each batch (``kfac_fx.distributed.DataParallel``); each
            goes through a loader of its own, of as many batches.
        progress: called after each batch with how many are done and how many there are.

    Raises:
        UnknownOptionError: an option is wrong, or the network records no moments.
        LikelihoodError: outputs or targets do not fit the likelihood.
        StatisticsError: the loader is empty, or can be gone through only once and is needed again;
            or statistics of a batch are not finite.
        TapsTakenError: an optimizer on the network is in the middle of a step.
    """
    choice("fisher", fisher, FISHERS)
    period("draws", draws)
    if draws > 1 and fisher != "sampled":
        raise UnknownOptionError(f"draws={draws} is for fisher='sampled': {fisher!r} draws nothing")
    curvature, structure = transformed(net, "block_diagonal" if ekfac else structure)
    generator = generator or fresh_generator()
    options = CurvatureOptions(structure=structure, tikhonov="ekfac" if ekfac else "factored")
    with borrowed_taps(net, "estimate()"):
        inverse = InverseFisher(net, curvature, options, generator, workers)
        workers.begin("estimate", inverse.covered.parameters, generator)
        recorder = Recorder(
            net,
            inverse.estimate.holders,
            likelihood_of(likelihood),
            fisher,
            generator,
            workers,
            forward=forward,
            by_inputs=True,
            owner="estimate()",
            draws=draws,
        )

        def went_through(*, moments: bool) -> float:
            """Fold the moments of all batches, or the rest, and return the number of terms."""
            total = 0.0
            for batch in _batches(loader, targets, progress):
                with forked(inverse.covered.parameters.values()):
                    finite = recorder.observe_inputs(batch.inputs, batch.targets)
                terms = recorder.terms
                found = recorder.take()
                if not (finite and inverse.estimate.fold_terms(found, terms, moments=moments)):
                    raise StatisticsError("outputs or statistics of a batch are not finite")
                total += terms
            return total

        terms = went_through(moments=False)
        if not terms:
            raise StatisticsError("the loader has no batch")
        bases: dict[str, Eigenbasis] = {}
        if inverse.moments is not None:
            # The bases are known only after a pass, and moments in them need one more.
            inverse.refresh(1.0)
            if not went_through(moments=True):
                raise StatisticsError(
                    "ekfac=True goes through the loader twice, and the second time it was empty: "
                    "give a list or a DataLoader instead of a generator"
                )
            bases = inverse.moments.copied()
    return FisherEstimate(inverse, terms, bases)


def _batches(loader: Iterable[Tree], targets: str, progress: Progress | None) -> Iterator[_Batch]:
    """Yield the batches of a loader, and tell of each that is done."""
    count = len(loader) if isinstance(loader, Sized) else 0
    for done, batch in enumerate(loader, start=1):
        if isinstance(batch, Mapping):
            rest = {name: value for name, value in batch.items() if name != targets}
            yield _Batch(rest, batch.get(targets))
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            yield _Batch(batch[0], batch[1])
        elif isinstance(batch, (tuple, list)):
            raise UnknownOptionError(
                f"a batch must be (inputs, targets), a mapping or a tensor, got {len(batch)} "
                "items: put several inputs into a tuple, ((x, mask), targets)"
            )
        else:
            yield _Batch(batch, None)
        log.debug("estimate: batch %d of %s", done, count or "?")
        if progress is not None:
            progress(done, count)
