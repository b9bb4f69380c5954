"""Training in equal processor seconds: problems x methods x learning rates x seeds.

One thread; seconds are of the processor (`time.process_time`), with drawing of batches and without
evaluation. Each method looks for its learning rate on a ladder of half decades until the best one
lies between two worse, on the first seed; the other seeds run with that rate. A run is stored as
soon as it is done, and a second call goes on where the first ended.

    python tests/benchmarks/time_to_target.py --output results.json
    python tests/benchmarks/time_to_target.py --problems mlp ae --methods Adam KFAC() --seconds 4
    python tests/benchmarks/time_to_target.py --output results.json --report \\
        --picture docs/benchmarks/training.png --page docs/benchmarks/training.md
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from page import page
from problem_parts import Problem
from problems import PROBLEMS
from target_methods import METHODS, Method
from target_report import draw, report

EVALUATIONS = 16
"""On a linear axis, and as many on a logarithmic one."""

FURTHEST = 4
"""How many rates the search may add at either end."""


@dataclass
class Run:
    """One training run; lists have an entry for each evaluation."""

    problem: str
    method: str
    rate: float
    seed: int
    limit: float
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def diverged(self) -> bool:
        """Whether it failed, or ends no better than it began."""
        last, first = self.train[-1], self.train[0]
        return bool(self.failure) or not (math.isfinite(last) and last < first)

    @property
    def final(self) -> float:
        """Return the lowest training loss; infinite for a run that diverged."""
        return math.inf if self.diverged else min(self.train)


class Results:
    """Runs by what they are of, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, []
        if path.exists():
            self.runs = [Run(**entry) for entry in json.loads(path.read_text())]

    def find(self, problem: str, method: str, rate: float, seed: int, limit: float) -> Run | None:
        """Return the run, if there is one."""
        wanted = (problem, method, rate, seed, limit)
        found = (r for r in self.runs if (r.problem, r.method, r.rate, r.seed, r.limit) == wanted)
        return next(found, None)

    def add(self, run: Run) -> None:
        """Keep a run, in the file too."""
        self.runs.append(run)
        draft = self.path.with_suffix(".new")
        draft.write_text(json.dumps([asdict(run) for run in self.runs]))
        draft.replace(self.path)


def evaluation_times(limit: float) -> Iterator[float]:
    """Yield 0 and the limit, times between them, and infinity."""
    linear = {limit * k / EVALUATIONS for k in range(EVALUATIONS + 1)}
    early = {limit * 10 ** (-2 * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)}
    yield from sorted(linear | early)
    yield math.inf


def train(problem: Problem, method: Method, rate: float, seed: int, limit: float) -> Run:
    """Train for so many seconds, or until a loss is not finite."""
    run = Run(problem.name, method.name, rate, seed, limit)
    setting = problem.setting()
    model = problem.build(seed)
    start = time.process_time()
    trainer = method.make(problem, model, rate)
    made = time.process_time() - start  # what a run pays once: it is told, and not counted
    batches = setting.batches(model, seed)
    due, clock, steps = evaluation_times(limit), 0.0, 0
    following = next(due)
    while True:
        if clock >= following:
            following = next(moment for moment in due if moment > clock)
            scores = setting.evaluate(trainer.net)
            run.seconds.append(round(clock, 4))
            run.steps.append(steps)
            run.train.append(scores.train)
            run.test.append(scores.test)
            if scores.accuracy is not None:
                run.accuracy.append(scores.accuracy)
            if clock >= limit or not math.isfinite(scores.train):
                break
        start = time.process_time()
        try:
            trainer.step(next(batches))
        except Exception as error:  # a method that breaks down has diverged, and the others go on
            run.failure = f"{type(error).__name__}: {str(error)[:200]}"
            break
        clock += time.process_time() - start
        steps += 1
    print(
        f"{problem.name:11} {method.name:15} {shown(rate):>8} seed {seed}  {steps:6} steps  "
        f"loss {run.train[-1]:.3e}  best {min(run.train):.3e}  test {run.test[-1]:.3e}  "
        f"made in {made:.1f} s  {'DIVERGED ' if run.diverged else ''}{run.failure}",
        flush=True,
    )
    return run


def shown(rate: float) -> str:
    """Return a rate as text; 0 stands for none."""
    return f"{rate:g}" if rate else "-"


def ladder(rate: float, rungs: int) -> float:
    """Return the rate so many half decades above, 1 and 3 times powers of ten."""
    place = round(2 * math.log10(rate)) + rungs
    return float(f"{(3 if place % 2 else 1)}e{place // 2}")


def run_method(
    problem: Problem, method: Method, options: argparse.Namespace, kept: Results
) -> None:
    """Look for the learning rate, then run the other seeds."""
    limit = options.seconds or problem.seconds * options.scale

    def once(rate: float, seed: int) -> Run:
        run = kept.find(problem.name, method.name, rate, seed, limit)
        if run is None:
            run = train(problem, method, rate, seed, limit)
            kept.add(run)
        return run

    if not method.first:
        for seed in range(options.seeds):
            once(0.0, seed)
        return
    rates = list(options.rates or method.first)
    finals = {rate: once(rate, 0).final for rate in rates}
    for _ in range(0 if options.rates else FURTHEST):
        best = min(finals, key=lambda rate: finals[rate])
        if best == min(finals):
            added = ladder(best, -1)
        elif best == max(finals):
            added = ladder(best, 1)
        else:
            break
        finals[added] = once(added, 0).final
    best = min(finals, key=lambda rate: finals[rate])
    for seed in range(1, options.seeds):
        once(best, seed)


def main(extra: Sequence[Method] = ()) -> None:
    """Run what is asked for and print the report."""
    known = METHODS | {method.name: method for method in extra}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--seconds", type=float, help="of a run; default: each problem's own")
    parser.add_argument("--scale", type=float, default=1.0, help="of the problems' own seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", help="these instead of a search")
    parser.add_argument("--output", type=Path, default=Path("time_to_target.json"))
    parser.add_argument("--report", action="store_true", help="only of what there is")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--page", type=Path, help="what is printed, with date, commit and machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("kfac_fx").setLevel(logging.ERROR)
    kept = Results(options.output)
    if not options.report:
        for problem in options.problems:
            for method in options.methods:
                run_method(PROBLEMS[problem], known[method], options, kept)
    runs = [r for r in kept.runs if r.problem in options.problems and r.method in options.methods]
    problems = [PROBLEMS[name] for name in options.problems]
    printed = report(runs, problems, [known[name] for name in options.methods])
    print(printed)
    if options.page:
        # Of paths of this machine only the names: a reader has others.
        given = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
        command = " ".join(["python tests/benchmarks/time_to_target.py", *given])
        picture = options.picture.name if options.picture else None
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(page("Training in equal time", command, printed, picture))
    if options.picture:
        draw(runs, problems, [known[name] for name in options.methods], options.picture)
        print(f"saved {options.picture}")


if __name__ == "__main__":
    main()
