"""What a problem of time_to_target.py consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """What ``KFAC.step`` takes: inputs or a closure from the network to outputs, and targets."""

    inputs: Any
    targets: Any = None


class Scores(NamedTuple):
    """The loss on the training set, and loss (or error) and accuracy on the test set."""

    train: float
    test: float
    accuracy: float | None = None


class Setting(Protocol):
    """Data, objective and measure of a problem."""

    def batches(self, model: nn.Module, seed: int) -> Iterator[Batch]:
        """Yield batches for ever; some depend on the present parameters."""

    def objective(self, net: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
        """Return the likelihood's outputs, and the loss that gradient methods train."""

    def evaluate(self, net: nn.Module) -> Scores:
        """Return what is shown; it may use no random numbers of torch's own stream."""


@dataclass(frozen=True)
class Problem:
    """A network with its data.

    Attributes:
        likelihood: as ``kfac_fx`` takes it, or a function that makes it, so that rivals run where
            kfac_fx is not imported.
        seconds: of the processor for a run.
        deterministic: batches are so large that their noise hardly counts.
        setting: makes data and objective, once.
    """

    name: str
    title: str
    network: Callable[[], nn.Module]
    likelihood: Any
    seconds: float
    deterministic: bool
    setting: Callable[[], Setting]

    def build(self, seed: int) -> nn.Module:
        """Return the network with the initial parameters of a seed."""
        torch.manual_seed(seed)
        return self.network()

    def likelihood_for_kfac(self) -> Any:
        """Return the likelihood as an argument of ``Preconditioner``."""
        return self.likelihood() if callable(self.likelihood) else self.likelihood
