"""Choose between steps of the quadratic model and steps with a rate, by what a unit of work brings.

Only where batches are all the cases: both lower the same loss there, and its fall needs no average.
The rule is described in docs/explanation/mathematics.md, section 9.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch

from kfac_fx.optim.adapt_damping import DampingRule
from kfac_fx.optim.bounds import AdaptiveLength
from kfac_fx.optim.held_out import HeldOutRule
from kfac_fx.optim.products import Direction, Parameters
from kfac_fx.optim.quadratic import cloned
from kfac_fx.torch_internals import foreach

WINDOW = 32.0
"""The work after which the fall of the loss is looked at, in steps with a rate. Less would compare
the first steps of a form, which are short, with later ones of the other."""

MODEL_STEP = 4.0
"""The work of a step of the model: measured 3 to 4.5 gradients, for one and a little. Counted and
not timed, so that a resumed run makes the same choices."""

SLOWER = {True: 0.25, False: 0.5}
"""A form that was slower, with a rate and of the model, is tried again once the present one is at
this share of its speed. Every run gets slower: at one, the other would be tried for what it was
long ago. A trial of the model is safe, as each of its steps lowers the loss."""

WORSE = 2.0
"""A form that is tried is left at once where the loss is this many times what it began with; and
after half of a window where its speed is below half of the other's."""


class SomeForm(Protocol):
    """What is asked of a form; see ``kfac_fx.optim.updates.Form``."""

    @property
    def scheduled(self) -> bool: ...
    @property
    def rule(self) -> DampingRule: ...
    @property
    def length(self) -> AdaptiveLength | None: ...
    @property
    def held_out(self) -> HeldOutRule | None: ...


FormType = TypeVar("FormType", bound=SomeForm)


class FormChoice(Generic[FormType]):
    """The form in use, and when another one takes its place.

    Without a learning rate a run begins with steps of the model. Where batches are all the cases
    it tries a rate after the first window, stays with the faster form, and tries the other again
    when the present one has become slow, each time later. A trial that has raised the loss has
    its steps taken back.

    Args:
        form: the first one.
        make: makes another: of steps with a rate, or of the model.

    Attributes:
        form: the one in use.
        open: whether another may take its place.
        taken_back: what a failed trial had made of parameters and buffers, if this step ended it.
    """

    def __init__(self, form: FormType, make: Callable[[bool], FormType]) -> None:
        self.form = form
        self._make = make
        self._other: FormType | None = None
        self._model = self.form.held_out
        self.open = self._model is not None
        self._speeds: dict[bool, float] = {}
        self._start: float | None = None
        self._work = 0.0
        self._trial = False
        self._waited = 0
        self._patience = 1
        self._kept: Direction = {}
        self.taken_back: Direction = {}

    def settle(self) -> None:
        """Go on with steps of a rate for the rest of the run."""
        self.open = False
        self._kept = {}
        if not self.form.scheduled:
            self._turn()

    def judge(self, objective: float, parameters: Parameters) -> bool:
        """Say whether the other form is in use from here on.

        Args:
            objective: of the present batch, before its step.
            parameters: those of the optimizer, and the network's buffers; they are put back where a
                trial has failed.
        """
        if not self.open or self._model is None or self._model.differs:
            return False
        if self._start is None:
            self._start = objective
            return False
        self._work += 1.0 if self.form.scheduled else MODEL_STEP
        failed = self._trial and self._fails(self._start, objective)
        if self._work < WINDOW and not failed:
            return False
        before = self._start
        work = self._work
        self._start = objective
        self._work = 0.0
        # Of an objective that is not positive no part is known.
        if not (before > 0 and (objective > 0 or failed)):
            return False
        speed = math.log(before / objective) / work if 0 < objective < math.inf else -math.inf
        self._speeds = {**self._speeds, self.form.scheduled: speed}
        tried = self._trial
        if not self._turns(speed, self._speeds.get(not self.form.scheduled), self._model):
            self._kept = {}
            return False
        if tried and speed < 0:
            self.taken_back = cloned(parameters)
            _write(parameters, self._kept)
        self._kept = cloned(parameters) if self._trial else {}
        self._turn()
        return True

    def copied(self) -> FormChoice[FormType]:
        """Return the choice as it is where a step begins, which may fail."""
        # Else a failure in a later step would bring back what this one has been rid of.
        self.taken_back = {}
        return copy.copy(self)  # what it holds is replaced, not changed; forms are not its own

    def put_back(self, parameters: Parameters) -> None:
        """Undo what ``judge`` has put back in a step that has failed since."""
        _write(parameters, self.taken_back)
        self.taken_back = {}

    def _fails(self, before: float, objective: float) -> bool:
        """Say whether a trial need not be finished."""
        if before <= 0:
            return False
        # "not <=" rather than ">": a loss that is not a number is no good.
        if not objective <= WORSE * before:
            return True
        if self._work < WINDOW / 2 or objective <= 0:
            return False
        other = self._speeds.get(not self.form.scheduled, -math.inf)
        return math.log(before / objective) / self._work < other / 2

    def _turns(self, speed: float, other: float | None, model: HeldOutRule) -> bool:
        """Say whether to go on with the other form, whose last speed may be known."""
        if self._trial:
            self._trial = False
            self._waited = 0
            worse = other is not None and speed < other
            if worse:
                self._patience *= 2
            return worse
        self._waited += 1
        slow = other is None or speed < SLOWER[not self.form.scheduled] * other
        # Where steps of the model change nothing but roundings, those of a rate may lose the fit;
        # and few are better than those of a model that is right (equations' residuals), or of one
        # with the exact Fisher.
        right = model.rests or model.is_right or model.exact
        stays = not self.form.scheduled and right
        self._trial = slow and self._waited >= self._patience and not stays
        return self._trial

    def _turn(self) -> None:
        """Change the forms over."""
        left = self.form
        self.form = self._other or self._make(not left.scheduled)
        self._other = left
        self._start = None
        self._work = 0.0
        if self._model is not None:
            self._model.pause()

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as plain values and tensors."""
        choice = {
            "other": None if self._other is None else _state(self._other),
            "open": self.open,
            "speeds": dict(self._speeds),
            "start": self._start,
            "kept": cloned(self._kept),
            "work": self._work,
            "trial": self._trial,
            "waited": self._waited,
            "patience": self._patience,
        }
        return {**_state(self.form), "choice": choice}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore ``state``, also that of a run that has gone on with another form."""
        scheduled = state.get("scheduled", self.form.scheduled)
        if scheduled != self.form.scheduled:
            self._other = self.form
            self.form = self._make(scheduled)
        _load(self.form, state, device)
        choice = state.get("choice")
        if choice is None:  # earlier states have none, and a rate was for good
            choice = FormChoice(self.form, self._make).state()["choice"]
        self._other = None
        if other := choice["other"]:
            self._other = self._make(other["scheduled"])
            _load(self._other, other, device)
        both = [self.form, *([self._other] if self._other else [])]
        self._model = next((form.held_out for form in both if form.held_out), None)
        self.open = choice["open"] and self._model is not None
        self._speeds = dict(choice["speeds"])
        self._start = choice["start"]
        self._kept = cloned(choice["kept"])
        self._work = choice["work"]
        self._trial = choice["trial"]
        self._waited = choice["waited"]
        self._patience = choice["patience"]


def _write(parameters: Parameters, values: Direction) -> None:
    if values:
        foreach.copy_([parameters[name] for name in values], list(values.values()))


def _state(form: SomeForm) -> dict[str, Any]:
    return {
        "scheduled": form.scheduled,
        "rule": form.rule.state(),
        "length": form.length.state() if form.length else None,
    }


def _load(form: SomeForm, state: Mapping[str, Any], device: torch.device) -> None:
    form.rule.load(state["rule"])
    if form.length and state.get("length"):
        form.length.load(state["length"], device)
