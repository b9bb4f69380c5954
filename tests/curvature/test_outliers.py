"""Statistics that are far longer or shorter than their averages, against multiples of I."""

from __future__ import annotations

import pytest
import torch
from support.inside import estimate_of
from torch import nn

import kfac_fx
from kfac_fx.curvature.estimate import Averages
from kfac_fx.curvature.outliers import SETTLED, TINY, Compared, Fit, fit


def entry(recorded: int, size: float = 1.0) -> Averages:
    """Of a layer whose averages A and G are multiples of the identity."""
    net = kfac_fx.transform(nn.Linear(2, 3, bias=False))
    (made,) = estimate_of(kfac_fx.Preconditioner(net)).all
    for average in made.all:
        average.write(size * torch.eye(len(average.stored)))
    made.recorded = recorded
    return made


def compared(averages: Averages, new: list[torch.Tensor]) -> list[Compared]:
    return averages.compared(averages.sizes(new))


@pytest.mark.parametrize(
    ("recorded", "A", "G", "expected"),
    [
        (SETTLED, 9.9, 9.9, Fit(False, False)),
        (SETTLED, 10.1, 1.0, Fit(True, False)),
        (SETTLED, 1.0, 10.1, Fit(True, False)),
        (SETTLED, 1 / 10.1, 1 / 10.1, Fit(False, False)),
        (1, 9.9, 1e9, Fit(False, False)),  # derivatives may start at zero
        (1, 10.1, 1.0, Fit(True, False)),
        (1, 1 / 10.1, 1.0, Fit(False, True)),
        (1, 1 / 9.9, 1e-9, Fit(False, False)),
        (1, TINY / 2, 1.0, Fit(False, False)),
        (0, 1e9, 1e9, Fit(False, False)),
    ],
)
def test_statistics_are_compared_with_their_averages(
    recorded: int, A: float, G: float, expected: Fit
) -> None:
    new = [A * torch.eye(2), G * torch.eye(3)]
    assert fit(compared(entry(recorded), new), 10.0) == expected


def test_statistics_of_what_has_just_come_to_life() -> None:
    new = [9.9 * TINY / 2**0.5 * torch.eye(2), torch.zeros(3, 3)]
    assert not fit(compared(entry(SETTLED, 0.0), new), 10.0).outlier
    assert fit(compared(entry(SETTLED, 0.0), [1.1 * new[0], new[1]]), 10.0).outlier
    assert fit([], 10.0) == Fit(False, False)
