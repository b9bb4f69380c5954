"""Fixtures shared by all tests: seeds, float64, and one recorded step of the preconditioner."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from support.oracles import Likelihood, Measure, Measured
from support.steps import cloned_factors
from torch import Tensor, nn
from torch._dynamo.utils import counters

import kfac_fx

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """Memory that torch hands out unwritten holds NaN, and not whatever was there before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing compiled before, and no caches: they do not see the bodies of operators."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def measure() -> Measure:
    """One cycle of forward, observe, backward and step, by a preconditioner of its own.

    `likelihood` is the reference; `given` is what the library gets, by default its name.
    """

    def run(
        net: nn.Module,
        x: Tensor | tuple[Tensor, ...],
        y: Tensor | None,
        likelihood: Likelihood,
        fisher: str = "exact",
        reduction: str = "sum",
        given: object = None,
        **options: object,
    ) -> Measured:
        # Gradients are compared with Fhat^-1 times those that came, whatever their length.
        options = {
            "likelihood": given or likelihood.name,
            "damping": 1e-2,
            "structure": getattr(getattr(net, "curvature", None), "structure", None),
            "trust_region": None,
            "largest_step": None,
        } | options
        preconditioner = kfac_fx.Preconditioner(net, fisher=fisher, **options)
        outputs = net(*x) if isinstance(x, tuple) else net(x)
        targets = likelihood.draw(outputs) if y is None else y
        loss = likelihood.nll(outputs, targets)
        if reduction == "mean":
            loss = loss / likelihood.terms(outputs, targets)
        preconditioner.observe(outputs, y)
        loss.backward()
        preconditioner.step()
        return Measured(preconditioner, cloned_factors(preconditioner))

    return run


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Put back the level of the library's log: a benchmark that runs in a test sets its own."""
    logger = logging.getLogger("kfac_fx")
    level = logger.level
    yield
    logger.setLevel(level)
