"""Where batches are all the cases, the form of the steps is the one whose work brings more."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import kfac_fx
from kfac_fx.optim.choose_form import MODEL_STEP, SLOWER, WINDOW, FormChoice
from kfac_fx.optim.updates import Form


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def all_cases() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(96, 6), torch.randint(0, 3, (96,))


def choice(**options: object) -> FormChoice[Form]:
    torch.manual_seed(0)
    made: FormChoice[Form] = kfac_fx.KFAC(kfac_fx.transform(net()), **options)._choice
    judged(made, 1.4)
    return made


def judged(made: FormChoice[Form], ratio: float) -> None:
    """Let steps of the model do another part of what it says, and batches agree about it."""
    if made.form.held_out:
        for _ in range(20):
            made.form.held_out.judge(-ratio, -1.0)
            made.form.held_out.judge_held_out(-ratio, 1e3)


class Run:
    """An objective that falls at the speed of the form in use."""

    def __init__(self, made: FormChoice[Form]) -> None:
        self.choice = made
        self.objective = 1.0
        made.judge(self.objective, {})

    def windows(self, speeds: dict[bool, float], count: int) -> list[bool]:
        """Return whether steps had a rate in each window."""
        found = []
        for _ in range(count):
            scheduled = self.choice.form.scheduled
            found.append(scheduled)
            steps = round(WINDOW / (1.0 if scheduled else MODEL_STEP))
            for step in range(steps):
                self.objective *= math.exp(-speeds[scheduled] * WINDOW / steps)
                turned = self.choice.judge(self.objective, {})
                assert turned is (self.choice.form.scheduled is not scheduled)
                if turned:  # a trial that is hopeless ends after half of a window
                    assert step + 1 in (steps / 2, steps)
                    self.choice.judge(self.objective, {})
                    break
        return found


def told(made: FormChoice[Form], speeds: dict[bool, float], windows: int) -> list[bool]:
    return Run(made).windows(speeds, windows)


def test_the_faster_form_goes_on() -> None:
    """The other is tried for a window, and then no more."""
    assert told(choice(), {False: 0.1, True: 0.2}, 6) == [False] + 5 * [True]
    assert told(choice(), {False: 0.2, True: 0.1}, 6) == [False, True] + 4 * [False]


def test_a_form_that_has_become_slow_is_left_again() -> None:
    """At a share of the other's speed, and later each time that this was no good."""
    run = Run(choice())
    speeds = {False: 0.1, True: 0.2}
    assert run.windows(speeds, 3) == [False, True, True]
    speeds[True] = 1.01 * SLOWER[False] * 0.1
    assert run.windows(speeds, 2) == [True, True]
    speeds[True] = 0.99 * SLOWER[False] * 0.1
    assert run.windows(speeds, 3) == [True, False, False]  # which is twice as fast
    # What is known of the other is always too much.
    run = Run(choice())
    found: list[bool] = []
    for window in range(14):
        run_speeds = {False: 0.1**window, True: 0.5 * 0.1**window}
        found += run.windows(run_speeds, 1)
    tries = [i for i in range(1, len(found)) if found[i] and not found[i - 1]]
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert len(gaps) > 1 and all(later > gap for gap, later in itertools.pairwise(gaps))


def test_what_keeps_the_form() -> None:
    """Batches that differ, objectives not positive, a model that is right, a fit at rest."""
    made = choice()
    for _ in range(10):
        made.form.held_out.judge(-1.0, -1.0)
        made.form.held_out.judge_held_out(-0.5, 1e3)
    assert not any(told(made, {False: 0.1, True: 0.2}, 3))
    made = choice()
    assert not any(made.judge(value, {}) for value in [-1.0, -2.0, 0.0, math.nan, math.inf] * 20)
    for ratio in (0.0, 0.1, 0.8, 1.0, 1.1):
        made = choice()
        judged(made, ratio)
        assert not any(told(made, {False: 0.1, True: 0.2}, 3))
    for ratio in (0.2, 0.7, 1.2):
        made = choice()
        judged(made, ratio)
        assert told(made, {False: 0.1, True: 0.2}, 3) == [False, True, True]
    paper = choice(options=kfac_fx.optim.KFACOptions.paper())
    assert not any(told(paper, {False: 0.1, True: 0.2}, 3))
    assert all(told(choice(lr=0.1), {False: 0.2, True: 0.1}, 3))
    settled = choice()
    settled.settle()
    assert all(told(settled, {False: 0.2, True: 0.1}, 3))


def test_a_trial_that_raises_the_loss_is_taken_back() -> None:
    """At once where it is twice what it was, else once it is plain that it will not fall."""
    for factor, steps in ((3.0, 1), (1.02, int(WINDOW / 2))):
        run = Run(choice())
        run.windows({False: 0.1, True: 0.0}, 0)
        parameters = {"w": torch.zeros(2)}
        while not run.choice.form.scheduled:
            run.objective *= 0.9
            run.choice.judge(run.objective, parameters)
        run.choice.judge(run.objective, parameters)
        for step in range(steps):
            parameters["w"] += 1.0
            run.objective *= factor
            assert run.choice.judge(run.objective, parameters) is (step == steps - 1)
        assert not run.choice.form.scheduled
        assert torch.equal(parameters["w"], torch.zeros(2))
        # A step that fails afterwards is one of the trial; the next step is none of it any more.
        run.choice.put_back(parameters)
        assert torch.equal(parameters["w"], torch.full((2,), float(steps)))
        parameters["w"].zero_()
        run.choice.taken_back = {"w": torch.ones(2)}
        run.choice.copied()
        run.choice.put_back(parameters)
        assert torch.equal(parameters["w"], torch.zeros(2))
        # Such a form is not tried again for the speed that it had.
        assert not any(told(run.choice, {False: 0.1, True: 0.2}, 6))


@pytest.mark.parametrize("at", [6, 20, 44])
def test_a_run_goes_on_with_the_same_choices(at: int) -> None:
    """In the first window, in the trial, and after it, for the last bit."""
    x, y = all_cases()
    runs, forms = [], []
    for parts in ((48,), (at, 48 - at)):
        torch.manual_seed(2)
        model, state = net(), None
        forms.clear()
        for count in parts:
            generator = torch.Generator().manual_seed(0)
            optimizer = kfac_fx.KFAC(kfac_fx.transform(model), generator=generator)
            if state is not None:
                optimizer.load_state_dict(copy.deepcopy(state))
            for _ in range(count):
                optimizer.step(x, y)
                forms.append("rate" in optimizer.diagnostics)
            state = optimizer.state_dict()
        runs.append([p.detach().clone() for p in model.parameters()])
    change = forms.index(True)
    assert change == WINDOW / MODEL_STEP and all(forms[change : change + int(WINDOW)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))


@pytest.mark.parametrize("iteration", [5, 8, 9, 30])
def test_a_step_that_failed_is_made_again_with_the_same_choices(iteration: int) -> None:
    """Counted once, though the user's code failed in the middle of it."""
    x, y = all_cases()
    runs, forms = [], []
    for failing in (False, True):
        torch.manual_seed(2)
        model = net()
        optimizer = kfac_fx.KFAC(kfac_fx.transform(model), generator=torch.Generator())
        judged(optimizer._choice, 1.4)
        calls = []

        def run(net: nn.Module, calls: list[int] = calls, failing: bool = failing) -> Tensor:
            calls.append(len(forms))
            if failing and len(forms) == iteration and calls.count(iteration) == 2:
                raise KeyError
            return net(x)

        forms.clear()
        while len(forms) < 40:
            try:
                optimizer.step(run, y)
            except KeyError:
                continue
            forms.append(optimizer._choice.form.scheduled)
        runs.append(([p.detach().clone() for p in model.parameters()], list(forms)))
    assert runs[0][1] == runs[1][1] and True in runs[0][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
