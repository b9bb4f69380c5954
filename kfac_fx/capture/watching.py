"""The contexts in which user's code is traced: what it asks and switches is heard.

Symbolic tracing and torch.export run the user's Python once. Questions about modes, the seeds of
random generators and modes that rewrite torch's functions leave nothing in a graph, so they are
refused where they are asked: on the user's line.
"""

from __future__ import annotations

import builtins
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import fx, nn
from torch.backends import ContextProp
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from kfac_fx.capture.autograd_calls import FunctionCall
from kfac_fx.capture.proxies import WatchedMember
from kfac_fx.capture.real_calls import FACTS, RealCalls
from kfac_fx.capture.user_lines import running_line, users_code_asks
from kfac_fx.errors import CaptureError
from kfac_fx.torch_internals.modes import Modes, autocast_heard, mode_entries_heard
from kfac_fx.torch_internals.pytree import tree_leaves

if TYPE_CHECKING:
    from kfac_fx.capture.recording import Recording

Value = Any
"""An argument or result of a function of torch's."""

Refuse = Callable[[str], NoReturn]
"""Stops the capture with a reason."""

_MODES = (
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "is_autocast_enabled",
    "is_autocast_cpu_enabled",
    "is_autocast_cache_enabled",
    "get_autocast_dtype",
    "are_deterministic_algorithms_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "get_deterministic_debug_mode",
    "get_float32_matmul_precision",
    "is_anomaly_enabled",
    "is_anomaly_check_nan_enabled",
    "get_num_threads",
    "get_num_interop_threads",
    "set_num_threads",
    "set_default_dtype",
    "set_float32_matmul_precision",
    "use_deterministic_algorithms",
)
_ATTENTION = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled")
_QUESTIONS = (
    *((torch, name) for name in _MODES),
    *((torch.backends.cuda, name) for name in (*_ATTENTION, "cudnn_sdp_enabled")),
)
"""Functions of torch that answer with a mode of the caller, or set one that no graph records."""

_CLEARING = ((nn.Module, "zero_grad"), (torch.optim.Optimizer, "zero_grad"))
"""Methods that take gradients away; none is there in a capture, so that nothing would be seen."""

_HISTORY = frozenset({"_base", "_version", "grad", "grad_fn", "is_leaf", "output_nr"})
_MEMORY = frozenset({"storage_offset", "data_ptr", "_is_view", "untyped_storage"})
"""Attributes and methods that answer with how a tensor has come about, or where it lies."""

_SEEDING = ("manual_seed", "seed", "initial_seed", "get_state", "set_state")


@contextmanager
def questions_refused(refuse: Refuse) -> Iterator[None]:
    """Within the context, refuse what a graph cannot answer anew at each call.

    Args:
        refuse: is called with the reason, on the user's line.
    """
    with ExitStack() as stack:
        for owner, name in (*_QUESTIONS, *_CLEARING):
            stack.enter_context(_asked(owner, name, refuse))
        stack.enter_context(_replaced(ContextProp, "__get__", _flag(refuse)))
        stack.enter_context(_replaced(torch.random, "default_generator", _Seeding(refuse)))

        def entered(mode: object) -> None:
            if not isinstance(mode, (RealCalls, ModeWatch)) and users_code_asks(2):
                refuse(f"the forward enters {type(mode).__name__}, which no graph records")

        stack.enter_context(mode_entries_heard(entered))
        yield


class ModeWatch(TorchFunctionMode):
    """Refuse calls in modes that no graph records; for captures that make their nodes elsewhere.

    Args:
        refuse: is called with the reason, on the user's line.
        held: names of the tensors that the model holds and that are no members, by identity.

    Attributes:
        asks_order: whether the user's code has asked in which order tensors lie in memory.
        asks_gradients: whether it has asked parameters for gradients that have them already.
        read: the names of those that it has computed with.
    """

    def __init__(
        self, refuse: Refuse, held: Mapping[int, str] = types.MappingProxyType({})
    ) -> None:
        super().__init__()
        self._held = held
        self.read: set[str] = set()
        self._refuse = refuse
        self._modes = Modes()
        self.asks_order = False
        self.asks_gradients = False

    def __torch_function__(
        self,
        func: Value,
        types: object,
        args: tuple[Value, ...] = (),
        kwargs: Mapping[str, Value] | None = None,
    ) -> Value:
        """Compare the modes with those at the beginning, and run the call."""
        changed = Modes().difference(self._modes)
        if changed is not None:
            self._refuse(f"{changed} is set in the forward, which no graph records")
        name = getattr(func, "__name__", "")
        wanted = _gradients_wanted(func, args, kwargs or {})
        if wanted is not None and args[0].requires_grad != wanted:
            self._refuse("the forward changes requires_grad of a parameter, which no graph records")
        self.asks_gradients |= wanted is not None
        if name == "__set__" and func.__self__.__name__ == "grad" and users_code_asks(1):
            self._refuse("the forward sets a gradient, which no graph records")
        if name in ("is_contiguous", "stride") and users_code_asks(1):
            self.asks_order = True
        elif (asked := _history_asked(func, name)) and users_code_asks(1):
            self._refuse(f"{asked} of a tensor is read, which a graph would not ask again")
        elif self._held and name not in FACTS and not _is_in_place(name):
            self._note_reads(args)
        elif name == "__get__" and func.__self__.__name__ == "requires_grad" and users_code_asks(1):
            self._refuse("requires_grad of a tensor is read, which a graph would not ask again")
        return func(*args, **(kwargs or {}))

    def _note_reads(self, args: tuple[Value, ...]) -> None:
        """Take note of a call that computes with tensors of the model's alone: it runs now."""
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if all(id(tensor) in self._held for tensor in tensors):
            self.read.update(self._held[id(tensor)] for tensor in tensors)


def _history_asked(func: Value, name: str) -> str:
    """Return what a call asks about a tensor's making or memory, "" where it asks nothing."""
    if name == "__get__":
        asked: str = func.__self__.__name__
        return asked if asked in _HISTORY else ""
    return name if name in _MEMORY else ""


def _gradients_wanted(
    func: Value, args: tuple[Value, ...], kwargs: Mapping[str, Value]
) -> bool | None:
    """Return the flag that a call gives to a parameter, None where it gives none."""
    name = getattr(func, "__name__", "")
    assigns = name == "__set__" and func.__self__.__name__ == "requires_grad"
    if not (assigns or name == "requires_grad_") or not isinstance(args[0], nn.Parameter):
        return None
    return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))


def _is_in_place(name: str) -> bool:
    """Tell by a method's name whether it writes to its tensor, or reads a property of it."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__get__", "__set__", "__setitem__")


@contextmanager
def refusals_noted(held: Mapping[int, str]) -> Iterator[ModeWatch]:
    """Within the context, code of the user's is traced by torch; see ``questions_refused``.

    Args:
        held: names of the tensors that the model holds and that are no members, by identity.

    Yields:
        What knows which questions were answered.

    Raises:
        CaptureError: at the end, if the user's code or torch's caught a refusal.
    """
    refused: list[str] = []

    def refuse(reason: str) -> NoReturn:
        refused.append(f"{running_line()}: {reason}")
        raise CaptureError(reason)

    # Symbolic tracing is done again in another default; an export is kept, and would not ask again.
    default = _asked(torch, "get_default_dtype", refuse)
    with questions_refused(refuse), default, ModeWatch(refuse, held) as watch:
        yield watch
    if refused:
        raise CaptureError(refused[0])


@contextmanager
def watched(tracer: Recording) -> Iterator[None]:
    """Within the context, a tracer hears what fx does not tell it.

    Args:
        tracer: records or refuses.
    """
    with ExitStack() as stack:
        stack.enter_context(questions_refused(tracer.refuse))
        stack.enter_context(autocast_heard(tracer.regions.autocast))
        stack.enter_context(_replaced(torch.autograd.Function, "apply", _apply(tracer)))
        stack.enter_context(_replaced(nn.Module, "__setattr__", _set_attribute(tracer)))
        stack.enter_context(_replaced(builtins, "isinstance", _is_instance(tracer)))
        stack.enter_context(_replaced(torch, "is_tensor", _is_tensor(tracer)))
        stack.enter_context(RealCalls(tracer))
        yield


@contextmanager
def _replaced(owner: Value, name: str, value: Value) -> Iterator[None]:
    """Within the context, an attribute of torch has another value."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _asked(owner: Value, name: str, refuse: Refuse) -> Iterator[None]:
    """Within the context, refuse a question that the user's code asks."""
    function = getattr(owner, name)
    where = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__qualname__

    @functools.wraps(function)
    def question(*args: Value, **kwargs: Value) -> Value:
        if users_code_asks(1):
            refuse(f"{where}.{name}() is called, which a graph would not do again")
        return function(*args, **kwargs)

    with _replaced(owner, name, question):
        yield


def _flag(refuse: Refuse) -> Value:
    """Return how a flag of ``torch.backends`` is read, which refuses it to the user's code."""
    original = ContextProp.__get__

    def read(self: ContextProp, *owner: Value) -> Value:
        if users_code_asks(1):
            refuse("a flag of torch.backends is read, which a graph would not ask again")
        return original(self, *owner)

    return read


class _Seeding:
    """torch's own generator, whose seed and state the user's code must leave alone.

    Args:
        refuse: is called with the reason.
    """

    def __init__(self, refuse: Refuse) -> None:
        self._refuse = refuse
        self._generator = torch.default_generator

    def __getattr__(self, name: str) -> Value:
        if name in _SEEDING and users_code_asks(1):
            self._refuse("the state or the seed of torch's random generator is read or set")
        return getattr(self._generator, name)


def _is_instance(tracer: Recording) -> Value:
    """Return ``isinstance`` that answers for symbolic values as their values would.

    A proxy must not say itself that its class is Tensor: torch's C++ code believes it, and reads
    memory that is none of a tensor.
    """
    original = isinstance

    def is_instance(value: Value, kinds: Value) -> bool:
        symbolic = issubclass(type(value), fx.Proxy)
        if not symbolic or original(value, kinds) or not users_code_asks(1):
            return original(value, kinds)
        return _answer(tracer, value, kinds)

    return is_instance


def _is_tensor(tracer: Recording) -> Value:
    """Return ``torch.is_tensor`` that answers for symbolic values as their values would."""
    original = torch.is_tensor

    def is_tensor(value: Value) -> bool:
        if not issubclass(type(value), fx.Proxy) or not users_code_asks(1):
            return original(value)
        return _answer(tracer, value, torch.Tensor)

    return is_tensor


def _answer(tracer: Recording, value: Value, kinds: Value) -> bool:
    """Tell whether a symbolic value is an instance of one of the classes, or refuse."""
    if issubclass(type(value), WatchedMember):
        return isinstance(value.param, kinds)
    kind = tracer.kind(value.node)
    if kind is None:
        tracer.refuse("the class of a symbolic value is asked for (isinstance)")
    return issubclass(kind, kinds)


def _apply(tracer: Recording) -> Value:
    """Return ``autograd.Function.apply`` that makes a node where it is given symbolic values."""
    # Bound by hand: a classmethod of Python up to torch 2.13, a descriptor in C from 2.14 on, which
    # has no ``__func__``.
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Value, **kwargs: Value) -> Value:
        given = (*args, *kwargs.values())
        symbolic = any(issubclass(type(value), fx.Proxy) for value in given)
        if symbolic and cls is CheckpointFunction:
            tracer.refuse("a reentrant checkpoint runs without gradients, and again in backward")
        # torch's own (a checkpoint's, which saves inputs) belong to what torch does around.
        if symbolic and users_code_asks(1):
            return tracer.create_proxy("call_function", FunctionCall(cls), args, kwargs)
        return original.__get__(None, cls)(*args, **kwargs)

    return classmethod(apply)


def _set_attribute(tracer: Recording) -> Value:
    """Return ``nn.Module.__setattr__`` that knows symbolic values."""
    original = nn.Module.__setattr__

    def set_attribute(module: nn.Module, name: str, value: Value) -> None:
        if not issubclass(type(value), fx.Proxy):
            original(module, name, value)
        elif name in module._buffers and tracer.updates(value.node, module._buffers[name]):
            return  # `self.count += 1` gives the buffer back that it has changed
        elif name in module._buffers or name in module._parameters:
            tracer.refuse(f"the forward replaces {type(module).__name__}.{name}")
        else:
            # Not a value for torch to look at. If it stays, the model has changed, and the trace
            # will be refused for that.
            object.__setattr__(module, name, value)

    return set_attribute
