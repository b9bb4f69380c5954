"""The problems of time_to_target.py: networks, data, losses and what is measured, by name.

Small enough for seconds on one thread. Data come from scikit-learn's digits, from the text of
Python's own library or from a formula, so nothing is downloaded. Where a loss has a floor above
zero (the entropy of grey pixels), the floor is subtracted from what is shown, not from what is
trained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from problem_equations import EQUATIONS
from problem_networks import (
    PixelTransformer,
    RecurrentClassifier,
    TextTransformer,
    convolutional,
    perceptron,
    sequence_convolutional,
)
from problem_parts import Batch, Problem, Scores
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

Loss = Callable[[Tensor, Tensor], Tensor]


class Data(NamedTuple):
    """Inputs and targets of a training and of a test set."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Supervised:
    """A problem with a data set, of batches that are shuffled anew in every epoch.

    Attributes:
        batch: cases of a batch; all of them make the problem deterministic.
        floor: of the loss, subtracted where it is shown; by data set.
        scored: cases of the training set that an evaluation looks at.
    """

    data: Data
    loss: Loss
    batch: int
    floor: Loss | None = None
    scored: int = 1500

    def batches(self, model: nn.Module, seed: int) -> Iterator[Batch]:
        """Yield batches for ever; a last one that is smaller is left out."""
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = self.data.inputs, self.data.targets
        if self.batch >= len(inputs):
            while True:
                yield Batch(inputs, targets)
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for chosen in order.split(self.batch):
                if len(chosen) == self.batch:
                    yield Batch(inputs[chosen], targets[chosen])

    def objective(self, net: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
        """Return outputs, and the loss that is trained."""
        outputs = net(batch.inputs)
        return outputs, self.loss(outputs, batch.targets)

    @torch.no_grad()
    def evaluate(self, net: nn.Module) -> Scores:
        """Return losses (and accuracy) in evaluation mode, from outputs in float64."""
        training = net.training
        net.eval()
        data = self.data
        train = self._score(net, data.inputs[: self.scored], data.targets[: self.scored])
        test = self._score(net, data.test_inputs[: self.scored], data.test_targets[: self.scored])
        net.train(training)
        return Scores(train[0], *test)

    def _score(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float | None]:
        outputs = torch.cat([net(part) for part in inputs.split(500)]).double()
        wide = targets.double() if targets.is_floating_point() else targets
        loss = self.loss(outputs, wide)
        if self.floor is not None:
            loss = loss - self.floor(outputs, wide)
        accuracy = None
        if not targets.is_floating_point():
            accuracy = float((outputs.argmax(-1) == targets).double().mean())
        return float(loss), accuracy


# Losses, as the likelihoods of kfac_fx have them.


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over cases and positions."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def pixel_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy of logits, summed over pixels, mean over cases."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(targets)


def entropy_of_pixels(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the smallest value that `pixel_entropy` can have."""
    return -(torch.xlogy(targets, targets) + torch.xlogy(1 - targets, 1 - targets)).sum() / len(
        targets
    )


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return half the squared error of a case, mean over cases."""
    return 0.5 * (outputs - targets).square().flatten(1).sum(1).mean()


# Data sets.


@cache
def digits() -> Data:
    """Return 1,297 and 500 images [cases, 1, 8, 8], scaled by fixed constants."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (torch.tensor(found.images, dtype=torch.float32)[:, None] - 4.9) / 6.0
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    return Data(images[train], labels[train], images[test], labels[test])


@cache
def digit_pixels() -> Data:
    """Return the same as grey levels in [0, 1], which are their own targets."""
    flat = [((x * 6.0 + 4.9) / 16.0).clamp(0, 1).flatten(1) for x in (digits()[0], digits()[2])]
    return Data(flat[0], flat[0], flat[1], flat[1])


@cache
def digit_rows() -> Data:
    """Return digits as sequences of eight rows of eight pixels."""
    data = digits()
    return data._replace(inputs=data.inputs[:, 0], test_inputs=data.test_inputs[:, 0])


@cache
def curve_images() -> Data:
    """Return 10,000 and 1,000 images of CURVES."""
    from curves import curves

    train, test = curves(10_000, seed=0), curves(1000, seed=1)
    return Data(train, train, test, test)


@cache
def waves() -> Data:
    """Return 4,000 and 1,000 noisy waves [cases, 1, 64] of five forms, of any phase and pitch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (5000,), generator=generator)
    pitch = 2 + 3 * torch.rand(5000, 1, generator=generator)
    phase = torch.rand(5000, 1, generator=generator)
    turn = torch.linspace(0, 1, 64) * pitch + phase
    angle = 2 * torch.pi * turn
    forms = [
        angle.sin(),
        angle.sin().sign(),
        2 * turn.frac() - 1,
        1 - 4 * (turn.frac() - 0.5).abs(),
        angle.sin() * (0.5 * angle).cos(),
    ]
    clean = torch.stack(forms, 1)[torch.arange(5000), labels]
    noisy = (clean + 0.5 * torch.randn(5000, 64, generator=generator))[:, None]
    return Data(noisy[:4000], labels[:4000], noisy[4000:], labels[4000:])


@cache
def teacher() -> Data:
    """Return 2,000 and 1,000 cases of sums of sines of 16 inputs on very different scales."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3000, 16, generator=generator)
    mixing = torch.randn(16, 8, generator=generator) / 4
    targets = (inputs @ mixing * 2).sin() @ torch.randn(8, 1, generator=generator) / 2
    inputs = inputs @ torch.randn(16, 16, generator=generator) * torch.logspace(-1, 0.5, 16)
    return Data(inputs[:2000], targets[:2000], inputs[2000:], targets[2000:])


CHARACTERS = 128
CONTEXT = 64


@cache
def text() -> Data:
    """Return pieces of 64 characters of Python's own library, and the characters that follow."""
    import argparse
    import inspect
    import subprocess
    import tarfile
    import tempfile

    modules = (argparse, inspect, subprocess, tarfile, tempfile)
    sources = "".join(Path(module.__file__ or "").read_text("utf-8") for module in modules)
    codes = torch.tensor([min(ord(character), CHARACTERS - 1) for character in sources])
    count = (len(codes) - 1) // CONTEXT
    inputs = codes[: count * CONTEXT].reshape(count, CONTEXT)
    targets = codes[1 : count * CONTEXT + 1].reshape(count, CONTEXT)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    train, test = order[: count * 9 // 10], order[count * 9 // 10 :]
    return Data(inputs[train], targets[train], inputs[test], targets[test])


# Problems.


def _supervised(
    name: str,
    title: str,
    build: Callable[[], nn.Module],
    likelihood: Any,
    seconds: float,
    setting: Callable[[], Supervised],
    deterministic: bool = False,
) -> Problem:
    return Problem(name, title, build, likelihood, seconds, deterministic, cache(setting))


def _autoencoder(sizes: tuple[int, ...]) -> Callable[[], nn.Module]:
    """Return a builder of tanh layers with a linear code and the sparse initialisation."""

    def build() -> nn.Module:
        from curves_autoencoder import autoencoder

        return autoencoder(torch.initial_seed(), sizes)

    return build


DIGIT_CODE = (64, 96, 48, 24, 8, 24, 48, 96, 64)
CURVES_CODE = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        _supervised(
            "mlp",
            "digits, 64-128-64-10 tanh",
            lambda: nn.Sequential(nn.Flatten(), *perceptron(64, 128, 64, 10)),
            "categorical",
            8,
            lambda: Supervised(digits(), cross_entropy, 128),
        ),
        _supervised(
            "mlp-full",
            "digits, 64-128-64-10 tanh, all cases",
            lambda: nn.Sequential(nn.Flatten(), *perceptron(64, 128, 64, 10)),
            "categorical",
            8,
            lambda: Supervised(digits(), cross_entropy, 1297),
            deterministic=True,
        ),
        _supervised(
            "cnn",
            "digits, 3 convolutions with BatchNorm",
            convolutional,
            "categorical",
            12,
            lambda: Supervised(digits(), cross_entropy, 128),
        ),
        _supervised(
            "conv1d",
            "waves, 3 convolutions over time",
            sequence_convolutional,
            "categorical",
            12,
            lambda: Supervised(waves(), cross_entropy, 128),
        ),
        _supervised(
            "gru",
            "digits by rows, GRU",
            RecurrentClassifier,
            "categorical",
            12,
            lambda: Supervised(digit_rows(), cross_entropy, 128),
        ),
        _supervised(
            "vit",
            "digits, vision transformer",
            PixelTransformer,
            "categorical",
            16,
            lambda: Supervised(digits(), cross_entropy, 128),
        ),
        _supervised(
            "text",
            "Python's library, transformer",
            lambda: TextTransformer(CHARACTERS, CONTEXT),
            "categorical",
            60,
            lambda: Supervised(text(), cross_entropy, 32, scored=256),
        ),
        _supervised(
            "regression",
            "regression, 16-64-64-1 tanh",
            lambda: nn.Sequential(*perceptron(16, 64, 64, 1)),
            "normal",
            8,
            lambda: Supervised(teacher(), half_squared_error, 128),
        ),
        _supervised(
            "ae",
            "digits autoencoder, batches of 128",
            _autoencoder(DIGIT_CODE),
            "bernoulli",
            12,
            lambda: Supervised(digit_pixels(), pixel_entropy, 128, entropy_of_pixels),
        ),
        _supervised(
            "ae-full",
            "digits autoencoder, all cases",
            _autoencoder(DIGIT_CODE),
            "bernoulli",
            12,
            lambda: Supervised(digit_pixels(), pixel_entropy, 1297, entropy_of_pixels),
            deterministic=True,
        ),
        _supervised(
            "curves",
            "CURVES autoencoder, batches of 1,000",
            _autoencoder(CURVES_CODE),
            "bernoulli",
            60,
            lambda: Supervised(curve_images(), pixel_entropy, 1000, entropy_of_pixels, 1000),
            deterministic=True,
        ),
        *EQUATIONS,
    )
}
