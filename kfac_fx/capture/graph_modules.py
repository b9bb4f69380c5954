"""Capture of a GraphModule that somebody else made: its graphs are copied, nothing is traced."""

from __future__ import annotations

import copy

from torch import fx

from kfac_fx.capture.captured_module import CapturedModule, captured_module
from kfac_fx.capture.shared_hooks import share_hooks


def from_graph_module(model: fx.GraphModule) -> CapturedModule:
    """Return a captured module with copies of a GraphModule's graphs and with its own members.

    Args:
        model: is not changed; a captured module keeps its graph for the evaluation.
    """
    evaluation = getattr(model, "evaluation", None)
    module = captured_module(model, copy.deepcopy(model.graph), copy.deepcopy(evaluation))
    module.meta.update(model.meta)
    share_hooks(module, model)
    # torch.export registers a hook that compares the module it runs in with the one it made; here
    # it would refuse every run.
    kept = {
        key: hook
        for key, hook in model._forward_pre_hooks.items()
        if not getattr(hook, "__module__", "").startswith("torch.export")
    }
    module.__dict__["_forward_pre_hooks"] = type(model._forward_pre_hooks)(kept)
    return module
