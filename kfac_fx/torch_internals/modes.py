"""Read the modes that change what torch's functions do, and hear when autocast is switched.

Why: a graph does not show in which modes its calls were made. While a model is traced the modes are
compared with those at the beginning, so that a region is recorded or refused. No public way:
functions and contexts set these modes, and most cannot be asked for. Seen on torch 2.11, 2.13 and
2.14.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_fx.torch_internals.onlookers import pack_hook, packed_by_checkpoint

_HERE = str(Path(__file__).parent.parent)
_DEVICES = ("cpu", "cuda")

set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
"""Switch gradients on or off; torch.fx keeps a call of it, whatever reads its result."""

is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
"""Tell whether gradients are on; kept apart, since the public name is watched during a trace."""

enter_autocast: Callable[..., torch.autocast] = torch.amp.autocast_mode._enter_autocast
"""Enter a region of autocast: device type, dtype, whether it is on, and its cache."""

exit_autocast: Callable[[torch.autocast], None] = torch.amp.autocast_mode._exit_autocast
"""Leave the region that ``enter_autocast`` returned."""


@contextmanager
def weights_cast_anew() -> Iterator[None]:
    """Let no pass inside take a copy of a weight that autocast has kept, nor leave one behind.

    Autocast keeps the copies until its outermost region ends, whoever writes to the weights.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
        # Those from before the step are of weights that are no more.
        torch.clear_autocast_cache()


function_modes: Callable[[], int] = torch._C._len_torch_function_stack
"""Count the torch function modes that are on; a call of C's, since every call of a net asks."""


def function_mode_of_the_user() -> str:
    """Return the class of a torch function mode that is on and no one of torch's or kfac_fx's."""
    for index in range(function_modes()):
        kind = type(torch._C._get_function_stack_at(index))
        if kind.__module__.split(".")[0] not in ("torch", "kfac_fx"):
            return kind.__name__
    return ""


def switches_gradients(func: object) -> bool:
    """Tell whether a torch function is the one that sets the gradient mode."""
    return func is torch._C._set_grad_enabled


def grad_context() -> tuple[object, str] | None:
    """Return the context of torch that sets the gradient mode at present, and its method.

    None where the user's code calls the setter itself.
    """
    frame = sys._getframe(1)
    found = None
    while frame.f_code.co_filename.startswith(_HERE) and frame.f_back is not None:
        frame = frame.f_back  # what heard of the switch
    # torch.no_grad enters and leaves by means of torch.set_grad_enabled: the outer one counts.
    while frame is not None and frame.f_code.co_filename == torch.autograd.grad_mode.__file__:
        found = frame.f_locals.get("self"), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return found


class Modes:
    """The modes that no graph records, as they are now, by their names for messages."""

    def __init__(self) -> None:
        self.found: dict[str, object] = {
            "torch.inference_mode": torch.is_inference_mode_enabled(),
            # A checkpoint packs what autograd saves, and changes no value and no gradient.
            "saved-tensor hooks": None if packed_by_checkpoint() else pack_hook(),
            "torch.autograd.forward_ad.dual_level": forward_ad._current_level,
            "torch.set_default_dtype": torch.get_default_dtype(),
            "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "torch.nn.attention.sdpa_kernel": (
                torch._C._get_flash_sdp_enabled(),
                torch._C._get_math_sdp_enabled(),
                torch._C._get_mem_efficient_sdp_enabled(),
            ),
        }

    def difference(self, other: Modes) -> str | None:
        """Return the name of the first mode that differs, None where none does."""
        mine, theirs = self.found, other.found
        return next((name for name, value in mine.items() if value != theirs[name]), None)


Switch = Callable[[torch.autocast, bool], None]
"""Is told which autocast was entered (True) or left (False)."""


@contextmanager
def autocast_heard(switch: Switch) -> Iterator[None]:
    """Within the context, tell ``switch`` of each autocast that is entered or left."""
    region = torch.amp.autocast_mode.autocast
    enter = region.__enter__
    leave = region.__exit__

    def entered(self: torch.autocast) -> Any:
        result = enter(self)
        switch(self, True)
        return result

    def left(self: torch.autocast, *error: Any) -> Any:
        result = leave(self, *error)
        switch(self, False)
        return result

    region.__enter__ = entered  # type: ignore[method-assign]
    region.__exit__ = left  # type: ignore[method-assign]
    try:
        yield
    finally:
        region.__enter__ = enter  # type: ignore[method-assign]
        region.__exit__ = leave  # type: ignore[method-assign]


def autocast_setting(region: torch.autocast) -> tuple[str, torch.dtype | None, bool, bool]:
    """Return the arguments with which ``enter_autocast`` enters the same region again."""
    return region.device, region.fast_dtype, region._enabled, region._cache_enabled


def autocast_state() -> dict[str, object]:
    """Return on which kinds of device autocast is on, with which dtype."""
    return {
        device: torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in _DEVICES
    }


@contextmanager
def mode_entries_heard(entered: Callable[[object], None]) -> Iterator[None]:
    """Within the context, call ``entered`` with each mode that sees torch's functions or operators.

    It is called before the mode is entered.
    """
    classes: tuple[Any, ...] = (TorchFunctionMode, TorchDispatchMode)
    enters = [one.__enter__ for one in classes]

    def heard(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def entering(self: object) -> Any:
            entered(self)
            return enter(self)

        return entering

    for one, enter in zip(classes, enters, strict=True):
        setattr(one, "__enter__", heard(enter))  # noqa: B010
    try:
        yield
    finally:
        for one, enter in zip(classes, enters, strict=True):
            setattr(one, "__enter__", enter)  # noqa: B010


def modes_put_back(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that switches back, after an error, what its code has switched.

    Args:
        forward: calls the switches above, with no ``finally`` around what stands between them.
    """

    @functools.wraps(forward)
    def switching_back(*args: Any, **kwargs: Any) -> Any:
        gradients = torch.is_grad_enabled()
        casts = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES]
        cached = torch.is_autocast_cache_enabled()
        # What is left too deep keeps autocast's copies of weights for ever, in their old precision.
        torch.autocast_increment_nesting()
        depth = torch.autocast_decrement_nesting()
        try:
            return forward(*args, **kwargs)
        except Exception:
            torch.set_grad_enabled(gradients)
            for device, enabled, dtype in casts:
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_cache_enabled(cached)
            while torch.autocast_decrement_nesting() >= depth:
                pass
            torch.autocast_increment_nesting()
            raise

    return switching_back
