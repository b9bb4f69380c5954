"""Times of calls that take turns, so that all of them meet the same machine.

What else a machine does slows neighbouring calls alike: of two methods, ratios of samples of the
same round are compared, and their median taken. Processor time, which others' load hardly changes,
is the measure with one thread; with several, wall time is there too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Sample(NamedTuple):
    """Seconds of one call, the mean over the calls of a sample."""

    cpu: float
    wall: float


class Ratio(NamedTuple):
    """A median of paired ratios, and the interval that holds it in 95 of 100 cases."""

    value: float
    low: float
    high: float

    @property
    def precision(self) -> float:
        """Half the interval, relative to the value."""
        return (self.high - self.low) / 2 / self.value


def sample(call: Call, count: int = 1) -> Sample:
    """Times ``count`` calls; a GPU's work is waited for, before and after."""
    finish = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    finish()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    finish()
    return Sample((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count)


def median_ratio(ratios: Sequence[float]) -> Ratio:
    """The median with its interval by order statistics, which assumes no distribution."""
    ordered, count = sorted(ratios), len(ratios)
    reach = 1.96 * math.sqrt(count) / 2
    low, high = math.floor(count / 2 - reach), math.ceil(count / 2 + reach)
    ends = ordered[max(low, 0)], ordered[min(high, count - 1)]
    return Ratio(statistics.median(ordered), *ends)


@dataclass
class Interleaved:
    """Calls by name, sampled in turns; every second round runs backwards.

    Attributes:
        counts: calls of a sample, by name: 1, or what fills ``least`` seconds.
    """

    calls: Mapping[str, Call]
    least: float = 0.05
    warmup: int = 2
    counts: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, call in self.calls.items():
            taken = [sample(call) for _ in range(self.warmup)][-1].wall
            self.counts.setdefault(name, max(1, min(50, round(self.least / max(taken, 1e-9)))))
            self.samples[name] = []

    def round(self) -> None:
        """One more sample of every call."""
        names = list(self.calls)
        done = len(self.samples[names[0]])
        for name in reversed(names) if done % 2 else names:
            self.samples[name].append(sample(self.calls[name], self.counts[name]))

    def run(self, rounds: int, seconds: float = math.inf) -> Interleaved:
        """So many rounds, fewer (three at least) if they take longer than ``seconds``."""
        start = time.perf_counter()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - start > seconds:
                break
            self.round()
        return self

    def seconds(self, name: str, clock: str = "cpu") -> float:
        """The median of a call's samples."""
        return statistics.median(getattr(s, clock) for s in self.samples[name])

    def ratio(self, name: str, base: str, clock: str = "cpu") -> Ratio:
        """The median of paired ratios of two calls."""
        pairs = zip(self.samples[name], self.samples[base], strict=True)
        return median_ratio([getattr(a, clock) / getattr(b, clock) for a, b in pairs])

    def difference(self, name: str, less: str, base: str, clock: str = "cpu") -> float:
        """The median of (``name`` - ``less``) / ``base``, triples of a round."""
        triples = zip(*(self.samples[n] for n in (name, less, base)), strict=True)
        found = [[getattr(s, clock) for s in triple] for triple in triples]
        return statistics.median((a - b) / c for a, b, c in found)

    def until(self, name: str, base: str, precision: float, most: int) -> Ratio:
        """Rounds until the ratio is known to ``precision``, at most ``most`` of them."""
        self.run(16)
        while len(self.samples[name]) < most and self.ratio(name, base).precision > precision:
            self.run(4)
        return self.ratio(name, base)
