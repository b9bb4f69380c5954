"""Layers of torch.nn that a capture keeps whole, as calls of the operation that they run.

Symbolic tracing keeps ``nn.Linear`` as one node that calls the module; the rules know "linear" with
a weight and a bias. The table here says which operation a layer runs and where its arguments are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


class Member(NamedTuple):
    """Names a parameter, buffer or flag by its path in the captured module."""

    path: str

    def __str__(self) -> str:
        return self.path


class ModuleCall(NamedTuple):
    """An operation of the vocabulary, as a layer runs it.

    Attributes:
        operation: its name.
        arguments: those besides the inputs; a ``Member`` stands for a tensor or flag of the layer.
        inputs: names of what the layer is called with; all but the first may be left out.
    """

    operation: str
    arguments: dict[str, Argument]
    inputs: tuple[str, ...] = ("input",)


Argument = Any
"""An argument of a layer's operation: a ``Member``, a number, a name, a list of those, or None."""

Layer = Any
"""A module of torch.nn, whose class the table below names."""

FindMember = Callable[[str], "Member | None"]
"""From the name of an attribute of a layer to its member, None where the layer has it not."""


def _linear(module: nn.Linear, member: FindMember) -> ModuleCall:
    return ModuleCall("linear", {"weight": member("weight"), "bias": member("bias")})


def _convolution(module: nn.Conv2d, member: FindMember) -> ModuleCall:
    arguments = {
        "weight": member("weight"),
        "bias": member("bias"),
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
    }
    # F.conv2d pads with zeros only; for another mode the layer pads before it, as the rule must.
    if module.padding_mode != "zeros":
        arguments["padding_mode"] = module.padding_mode
    return ModuleCall(f"conv{len(module.kernel_size)}d", arguments)


def _layer_norm(module: nn.LayerNorm, member: FindMember) -> ModuleCall:
    arguments = {"normalized_shape": module.normalized_shape, "eps": module.eps}
    return ModuleCall("layer_norm", arguments | _affine(member))


def _rms_norm(module: nn.RMSNorm, member: FindMember) -> ModuleCall:
    arguments = {"normalized_shape": module.normalized_shape, "eps": module.eps}
    return ModuleCall("rms_norm", arguments | {"weight": member("weight")})


def _group_norm(module: nn.GroupNorm, member: FindMember) -> ModuleCall:
    arguments = {"num_groups": module.num_groups, "eps": module.eps}
    return ModuleCall("group_norm", arguments | _affine(member))


def _batch_norm(module: nn.BatchNorm2d, member: FindMember) -> ModuleCall:
    return ModuleCall("batch_norm", _running(module, member))


def _instance_norm(module: nn.InstanceNorm2d, member: FindMember) -> ModuleCall:
    # One case may come without a batch dimension, so channels are counted from the end.
    channels = -module._get_no_batch_dim()
    return ModuleCall("instance_norm", {"channels": channels, **_running(module, member)})


def _affine(member: FindMember) -> dict[str, Argument]:
    return {"weight": member("weight"), "bias": member("bias")}


def _running(module: Layer, member: FindMember) -> dict[str, Argument]:
    mean = member("running_mean")
    var = member("running_var")
    # Without running statistics the batch's own are taken, also in evaluation.
    training = True if mean is None and var is None else member("training")
    moments = {"running_mean": mean, "running_var": var, "training": training}
    return _affine(member) | moments | {"eps": module.eps}


def _embedding(module: nn.Embedding, member: FindMember) -> ModuleCall:
    names = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")
    options = {name: getattr(module, name) for name in names}
    return ModuleCall("embedding", {"weight": member("weight"), **options})


def _embedding_bag(module: nn.EmbeddingBag, member: FindMember) -> ModuleCall:
    names = ("mode", "max_norm", "scale_grad_by_freq", "sparse")
    options = {name: getattr(module, name) for name in (*names, "include_last_offset")}
    arguments = {"weight": member("weight"), "padding_idx": module.padding_idx, **options}
    return ModuleCall("embedding_bag", arguments, ("input", "offsets", "per_sample_weights"))


def _transposed_convolution(module: nn.ConvTranspose2d, member: FindMember) -> ModuleCall:
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    options = {name: getattr(module, name) for name in names}
    arguments = {"weight": member("weight"), "bias": member("bias"), **options}
    return ModuleCall(f"conv_transpose{len(module.kernel_size)}d", arguments)


def _recurrent(module: nn.RNNBase, member: FindMember) -> ModuleCall:
    arguments = {
        "params": [member(name) for name in module._flat_weights_names],
        "has_biases": module.bias,
        "num_layers": module.num_layers,
        "dropout": module.dropout,
        "train": member("training"),
        "bidirectional": module.bidirectional,
        "batch_first": module.batch_first,
    }
    return ModuleCall(module.mode.lower(), arguments, ("input", "hx"))


def _recurrent_cell(module: nn.RNNCellBase, member: FindMember) -> ModuleCall:
    names = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}
    family = {nn.LSTMCell: "lstm", nn.GRUCell: "gru"}
    found = [name for base, name in family.items() if isinstance(module, base)]
    operation = found[0] if found else f"rnn_{module.nonlinearity}"
    arguments = {argument: member(name) for argument, name in names.items()}
    return ModuleCall(f"{operation}_cell", arguments, ("input", "hx"))


TRANSLATIONS: dict[type[nn.Module], Callable[[Layer, FindMember], ModuleCall]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _transposed_convolution,
    nn.ConvTranspose2d: _transposed_convolution,
    nn.ConvTranspose3d: _transposed_convolution,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding_bag,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.RNN: _recurrent,
    nn.LSTMCell: _recurrent_cell,
    nn.GRUCell: _recurrent_cell,
    nn.RNNCell: _recurrent_cell,
}


def translate(module: nn.Module, path: str) -> ModuleCall | None:
    """Return the operation that a leaf module runs, None where it is not known.

    A subclass counts while it keeps its base's ``forward``. A module with hooks does not, since
    they may change what goes in and out, nor does one whose weight is computed by a
    parametrization: the weight that meets the data is then none of its parameters.

    Args:
        module: the module that a node calls.
        path: its path in the captured module; "" for that module itself.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(map(_may_change_values, hooks)) or is_parametrized(module):
        return None
    if "forward" in vars(module):  # patched on this instance: it runs something else
        return None

    def member(name: str) -> Member | None:
        if getattr(module, name, None) is None:
            return None
        return Member(f"{path}.{name}" if path else name)

    # The first base in the table decides: a subclass that overrides forward runs something else.
    for base in type(module).__mro__:
        rule = TRANSLATIONS.get(base)
        if rule is not None and type(module).forward is getattr(base, "forward", None):
            return rule(module, member)
    return None


def _may_change_values(hook: Callable[..., object]) -> bool:
    """Tell whether a hook is somebody's own; those of FSDP gather parameters and change nothing."""
    return not (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")


def has_parameters(module: nn.Module) -> bool:
    """Tell whether the module or one inside it owns parameters."""
    return next(module.parameters(), None) is not None
