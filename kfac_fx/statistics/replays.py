"""Passes of a network that repeat: after a few of one form, their operators are run alone.

A pass is a function of tensors. What surrounds its operators (autograd, modules, taps) costs a
small network more than the operators do, and is the same at every call. So a pass that has come a
few times in one form is traced (``codegen/replay.py``), and its trace is run in its place. It has
to earn that: its results are compared with the pass's own, bit by bit, before they are used.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from kfac_fx.capture.captured_module import CapturedModule
from kfac_fx.capture.dialect import PACKED_ROWS, row_of_node
from kfac_fx.capture.packed_calls import WHOLE
from kfac_fx.codegen.functional import random_nodes
from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.likelihoods.sampling import forked
from kfac_fx.ops.gram import Statistic
from kfac_fx.ops.recurrent import READING_SIZES
from kfac_fx.statistics.forward import run_network
from kfac_fx.torch_internals.onlookers import module_hooks, watched

log = logging.getLogger("kfac_fx")

BEFORE = 3
"""Calls of one form before it is traced: a trace takes the time of about so many."""

PROOFS = 2
"""Calls in which trace and pass are both run and compared: a constant in the trace that the next
step changes shows in the second one."""

MOST_FORMS = 16
"""Forms that are traced; batches whose form changes all the time would never stop it."""

LARGEST = 2**20
"""Entries of all parameters: the operators of larger networks take longer than what is saved."""


_KINDS = (Tensor, nn.Parameter)

KNOWN = ("torch", "kfac_fx", "_operator", "math", "builtins")
"""Packages whose functions compute the same of the same tensors."""

PLAIN = (bool, int, float, str, type(None))
"""Values that are compared at every call."""


class Form(NamedTuple):
    """What a trace takes for constant: it is found by this.

    Attributes:
        what: the pass, and its arguments that are no tensors.
        tensors: the shapes, strides, dtypes and devices of its tensors.
        net: the plain attributes of the network's modules.
    """

    what: Hashable
    tensors: Hashable
    net: Hashable


class _Known:
    """What is known of one form of a pass.

    Attributes:
        calls: how often it came.
        proofs: how often the trace gave what the pass gave.
        refused: whether the pass runs as it is for good.
        traced: whether there was a trace.
        draws: whether the trace reads torch's random streams.
    """

    def __init__(self) -> None:
        self.traced = False
        self.calls = 0
        self.proofs = 0
        self.refused = False
        self.draws = False


class Replays:
    """Traces of the passes of one network.

    Args:
        net: an instrumented module; one that is no CapturedModule is never traced.
        pure: whether all code around the network (the likelihood, the function that calls the
            network) is known to compute the same of the same tensors at every call.
    """

    def __init__(self, net: Any, pure: bool) -> None:
        self._forms: dict[Form, _Known] = {}
        self._parameters = list(net.parameters())
        size = sum(parameter.numel() for parameter in self._parameters)
        self._possible = pure and size <= LARGEST and is_pure(net)
        self._net = net
        self._modules = [*net.modules()] if self._possible else []
        self._plain = [_plain_names(module) for module in self._modules]

    def form(self, what: Hashable, tensors: Sequence[Tensor]) -> Form | None:
        """Return the form of a pass, or None where it is no function of the tensors alone."""
        if not self._possible or watched() or module_hooks() or not self._net.stands():
            return None
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return None
        net = self._net_form()
        if net is None:
            return None
        shapes = []
        for t in tensors:
            # Hooks of parameters run in an autograd's backward alone; tensors of other classes do
            # what they like.
            if type(t) not in _KINDS or t.layout is not torch.strided or t._backward_hooks:
                return None
            shapes.append((t.shape, t.stride(), t.dtype, t.device, t.requires_grad))
        return Form(what, tuple(shapes), net)

    def takes(self, inputs: Tree) -> bool:
        """Say whether the network's graph is for inputs of this form, rather than its own code."""
        return bool(run_network(self._net.takes, inputs))

    def _net_form(self) -> Hashable | None:
        """Return the plain attributes of all modules; None where a hook would have to run."""
        found = []
        for module, names in zip(self._modules, self._plain, strict=True):
            held = module.__dict__
            if (
                held["_forward_hooks"]
                or held["_forward_pre_hooks"]
                or held["_backward_hooks"]
                or held["_backward_pre_hooks"]
            ):
                return None
            values = [held.get(name) for name in names]
            found.append((len(held), *held["_modules"].values(), *values))
        return tuple(found)

    def proven(self, form: Form) -> bool:
        """Say whether a form has a trace that was found right."""
        trace = self._forms.get(form)
        return trace is not None and trace.proofs >= PROOFS

    def ready(self, form: Form) -> bool:
        """Count a call of a form; say whether it has come often enough to be traced."""
        if form not in self._forms and len(self._forms) >= 2 * MOST_FORMS:
            return False
        found = self._forms.setdefault(form, _Known())
        found.calls += 1
        return not found.refused and found.calls > BEFORE

    def begin(self, form: Form) -> bool:
        """Say whether a form that is ready may be traced; it is known from then on."""
        traced = sum(known.traced for known in self._forms.values())
        if form not in self._forms and traced >= MOST_FORMS:
            return False
        found = self._forms.setdefault(form, _Known())
        return not found.refused

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace inside: torch's random streams stay as they are."""
        with forked(self._parameters):
            yield

    def traced(self, form: Form, module: fx.GraphModule) -> None:
        """Take note of the trace of a form."""
        self._forms[form].traced = True
        self._forms[form].draws = bool(random_nodes(module.graph))

    @contextmanager
    def drawing_alike(self, form: Form) -> Iterator[None]:
        """Draw inside from torch's streams, and let what comes after draw the same."""
        if not self._forms[form].draws:
            yield
            return
        with forked(self._parameters):
            yield

    def refuse(self, form: Form, why: str) -> None:
        """Let a form run as it is from now on."""
        log.debug("a pass is not traced: %s", why)
        self._forms[form].refused = True
        self._forms[form].proofs = 0

    def prove(self, form: Form, found: Sequence[Statistic], wanted: Sequence[Statistic]) -> bool:
        """Note and return whether the trace of a form gave what the pass gives, to the last bit."""
        same = len(found) == len(wanted) and all(map(_equal, found, wanted))
        self._forms[form].proofs += same
        if not same:
            # Something that is no tensor has changed: the code is no function of the tensors.
            self.refuse(form, "its results differ from those of the pass")
        return same


def _equal(one: Statistic, other: Statistic) -> bool:
    # Rows that wait for their product belong to large layers: there a trace would lose time.
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    alike = one.dtype == other.dtype and one.layout == other.layout
    return alike and torch.equal(one, other)


# Which networks are functions of their tensors.


def is_pure(net: nn.Module) -> bool:
    """Say whether a network's code is made of torch's functions and modules alone.

    Code of others may count its calls, draw from Python's own streams or read tensors that are
    nowhere registered: a trace would take these for constant.
    """
    if not isinstance(net, CapturedModule) or net.runs_model:
        return False
    held = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    held |= {name for name, _ in net.named_buffers(remove_duplicate=False)}
    return all(_is_pure(node, net, held) for graph in net.graphs for node in graph.nodes)


def _is_pure(node: fx.Node, net: nn.Module, held: set[str]) -> bool:
    """Say whether a node computes the same of the same tensors.

    Args:
        node: of a graph of the network.
        net: the network.
        held: the names of its parameters and buffers, which are arguments of a trace.
    """
    path = str(node.target)
    if node.op == "call_module":
        return type(net.get_submodule(path)).__module__.startswith("torch.nn.modules.")
    if node.op == "call_function":
        return _is_torch(node.target) and not _reads_lengths(node)
    if node.op == "get_attr" and path not in held:
        owner, _, name = path.rpartition(".")  # plain values of modules belong to the form
        return isinstance(vars(net.get_submodule(owner)).get(name), PLAIN)
    return True


def _reads_lengths(node: fx.Node) -> bool:
    """Say whether a node packs sequences, or runs on packed ones: sizes follow from values there.

    torch reads them where no trace sees it, and a batch of other lengths may have the same form.
    """
    if node.target in WHOLE or node.target in READING_SIZES:
        return True
    row = row_of_node(node)
    return row is not None and row in PACKED_ROWS.values()


def is_ours(likelihood: Likelihood | Sum) -> bool:
    """Say whether the library's own code is all that a likelihood runs."""
    if isinstance(likelihood, Sum):
        return all(is_ours(part) for _, (part, _) in likelihood.items())
    return type(likelihood).__module__ == Likelihood.__module__


def _is_torch(target: object) -> bool:
    space = getattr(target, "namespace", None)
    if space is not None:  # an operator
        return space in ("aten", "prims", "kfac_fx")
    module = getattr(target, "__module__", None)
    return module is None or str(module).partition(".")[0] in KNOWN


def _plain_names(module: nn.Module) -> list[str]:
    """Return the names of a module's attributes that are plain values."""
    skipped = ("_is_full_backward_hook", "_version")
    return [n for n, v in vars(module).items() if isinstance(v, PLAIN) and n not in skipped]
