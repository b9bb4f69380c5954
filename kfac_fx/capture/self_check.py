"""Compare a captured module with its model on the example inputs.

A route that is silently wrong would make everything that follows wrong: a graph that froze a branch
still trains, and its factors are those of another model. One run is not enough: a counter, a cache
or a number that was drawn once show in the second, and a mode in the other mode.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kfac_fx.capture.behaviour import (
    Aftermath,
    Behaviour,
    difference,
    form_of,
    tensor_difference,
)
from kfac_fx.capture.train_and_eval import all_in_mode
from kfac_fx.capture.undisturbed import fresh, tensors_in, undisturbed
from kfac_fx.capture.user_lines import user_line
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.pytree import tree_leaves, tree_map_only

log = logging.getLogger("kfac_fx")

Value = Any
"""Example inputs of the user's: tensors in any nesting of containers."""


class Run(NamedTuple):
    """One of the runs of a check, in their order.

    Attributes:
        words: for messages.
        seed: of torch's generator.
        training: the mode of all modules; None leaves each as it is.
        gradients: whether gradients are compared too; those of inputs are asked for then.
        larger: whether the inputs have a case more than the example.
    """

    words: str
    seed: int
    training: bool | None = None
    gradients: bool = False
    larger: bool = False


_RUNS = (
    Run("on the example inputs", 0, gradients=True),
    Run("in another call, in training,", 1, training=True),
    Run("in another call, in evaluation,", 2, training=False),
)
_LARGER = Run("on inputs of one case more", 3, training=True, larger=True)
"""Asked of exports, which take sizes for constants where the code looks at them."""


class Seen(NamedTuple):
    """What a module did in all runs.

    Attributes:
        runs: what each did; the model's own error where it failed.
        after: what they left.
    """

    runs: dict[Run, Behaviour | Exception]
    after: Aftermath


class SelfCheck:
    """Know what the model does with the example inputs, and how that differs in a second call.

    Args:
        model: runs here, and once more where its running code differs from itself.
        args: positional example inputs; each run gets copies.
        kwargs: keyword example inputs, likewise.

    Raises:
        CaptureError: the model fails on them; its own error is the cause.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = model
        self._inputs = (args, kwargs)
        self._open_inputs = True
        self._expected = self._see(model, _RUNS)
        first = self._expected.runs[_RUNS[0]]
        if isinstance(first, Exception):
            # A model that writes to its inputs may not take those that ask for gradients.
            self._open_inputs = False
            self._expected = self._see(model, _RUNS)
            first = self._expected.runs[_RUNS[0]]
        if isinstance(first, Exception):
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs at "
                f"{user_line(first)}: {first}"
            ) from first
        if len(self._runs()) < len(_RUNS):
            # What a run did before it failed is none of what the others leave.
            self._expected = self._see(model, self._runs())
        self._larger: Seen | None = None

    def compare(self, module: nn.Module, *, runs_model: bool = False, sizes: bool = False) -> None:
        """Run the captured module and compare.

        Args:
            module: the capture, with the model's own parameters.
            runs_model: whether the capture runs the model's own code, so that a difference may be
                that of the model from itself.
            sizes: compare on inputs of another size too.

        Raises:
            CaptureError: it fails, or does anything else than the model.
        """
        found = self._difference(self._see(module, self._runs()), self._expected)
        if found is None and sizes:
            found = self._difference_in_size(module)
        if found is None:
            return
        # A model that differs from itself (random numbers of the system, atomics) says nothing
        # about the code that runs it; a graph of it would repeat one of its runs for ever.
        if runs_model and self._difference(self._see(self._model, self._runs()), self._expected):
            log.info("the model does not repeat itself: its runs cannot be compared")
            return
        raise CaptureError(found)

    def _runs(self) -> list[Run]:
        """Return the runs that the model can do: a batch norm of one case fails in training."""
        return [r for r, seen in self._expected.runs.items() if not isinstance(seen, Exception)]

    def _difference(self, got: Seen, want: Seen) -> str | None:
        """Return the first difference in words."""
        for run, seen in got.runs.items():
            expected = want.runs[run]
            assert not isinstance(expected, Exception)
            if isinstance(seen, Exception):
                return f"{run.words} the capture fails at {user_line(seen)}: {seen}"
            found = difference(seen, expected)
            if found is not None:
                return f"{run.words} {found}"
        missed = [text for text in want.after.written if text not in got.after.written]
        if missed:
            return f"the model {missed[0]}, and the capture does not"
        found = tensor_difference(got.after.tensors, want.after.tensors)
        return None if found is None else f"after the calls {found}"

    def _difference_in_size(self, module: nn.Module) -> str | None:
        """Return how the capture differs on inputs of another size; a refusal is no difference."""
        if self._larger is None:
            self._larger = self._see(self._model, [_LARGER])
        if isinstance(self._larger.runs[_LARGER], Exception):
            return None  # nor does the model take them
        got = self._see(module, [_LARGER])
        if isinstance(got.runs[_LARGER], CaptureError):
            return None
        return self._difference(got, self._larger)

    def _see(self, module: nn.Module, runs: Sequence[Run]) -> Seen:
        """Run a module, with all that it changes put back at the end."""
        found: dict[Run, Behaviour | Exception] = {}
        with undisturbed(self._model, runs=True) as before:
            for run in runs:
                with _mode(self._model, module, run.training):
                    try:
                        found[run] = self._run(module, run)
                    except Exception as error:  # any code of the user's may run here
                        found[run] = error
            after = Aftermath(before.values.moved(), tuple(before.state.written()))
        return Seen(found, after)

    def _run(self, module: nn.Module, run: Run) -> Behaviour:
        args, kwargs = fresh(self._inputs)
        if run.larger:
            args, kwargs = one_case_more((args, kwargs))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if run.gradients and self._open_inputs:
            args, kwargs, given = _asking_gradients((args, kwargs))
        # Dropout draws the same masks in the model and in its capture, if it is called in the same
        # order; the state of the generator is put back afterwards.
        torch.manual_seed(run.seed)
        outputs = module(*args, **kwargs)
        tensors = dict(enumerate(tensors_in(outputs)))
        # Before the backward pass, which may draw (a checkpoint does) and which is not compared.
        found = {f"output {index}": t.detach().clone() for index, t in tensors.items()}
        given_back = form_of((args, kwargs))
        left = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found |= {f"input {i} after the call": t.detach().clone() for i, t in enumerate(left)}
        found["the state of the generator"] = torch.get_rng_state()
        gradients = None
        if run.gradients:
            gradients = _gradients(self._model, given, list(tensors.values()))
        return Behaviour(form_of(outputs), given_back, found, gradients)


@contextmanager
def _mode(model: nn.Module, module: nn.Module, training: bool | None) -> Iterator[None]:
    """Within the context a model and its capture are in one mode."""
    if training is None:
        yield
        return
    with all_in_mode(model, training), all_in_mode(module, training):
        yield


def _asking_gradients(inputs: Value) -> tuple[Any, Any, list[Tensor]]:
    """Return inputs whose gradients can be asked for, and those.

    What the model gets is no leaf: it may write to it.
    """
    leaves: list[Tensor] = []

    def asking(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.is_nested:
            return tensor
        leaf = tensor.detach().requires_grad_()
        leaves.append(leaf)
        return leaf.clone()

    args, kwargs = tree_map_only(Tensor, asking, inputs)
    return args, kwargs, leaves


def one_case_more(inputs: Value) -> Value:
    """Return inputs with the first case once more at their end.

    Args:
        inputs: tensors of as many cases as the first one with a dimension are lengthened.
    """
    sizes = [len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]

    def longer(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != sizes[0] or not len(tensor):
            return tensor
        if tensor.layout is not torch.strided or tensor.is_nested:
            return tensor
        return torch.cat([tensor, tensor[:1]]).detach().requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, longer, inputs)


def _gradients(
    model: nn.Module, inputs: list[Tensor], outputs: list[Tensor]
) -> dict[str, Tensor] | None:
    """Return the gradients of a combination of the outputs with fixed weights.

    The weights differ from entry to entry, since the plain sum may be a constant (of a softmax).
    None where autograd refuses: reentrant checkpoints allow backward() only.
    """
    named: dict[str, Tensor] = {
        f"gradient of {n}": p for n, p in model.named_parameters() if p.requires_grad
    }
    asked = [t for t in inputs if t.requires_grad and t.is_leaf]
    named |= {f"gradient of input {index}": t for index, t in enumerate(asked)}
    parts = [o for o in outputs if o.requires_grad and o.is_floating_point()]
    if not parts or not named:
        return {}
    loss = torch.zeros((), device=parts[0].device)
    for part in parts:
        dtype = torch.promote_types(part.dtype, torch.float32)
        weights = torch.arange(part.numel(), device=part.device).cos().to(dtype)
        loss = loss + (part.to(dtype).flatten() @ weights).to(loss.device)
    try:
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    except RuntimeError as error:
        log.info("gradients of the capture are not checked: %s", error)
        return None
    dense = (g if g is None or g.layout is torch.strided else g.to_dense() for g in found)
    return {n: g for n, g in zip(named, dense, strict=True) if g is not None}
