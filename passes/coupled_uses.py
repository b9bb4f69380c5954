"""Tell which uses can be coupled with others, and describe them for the operators that do it.

Links, couples and moments are second operators at a use whose tap is there already. They read the
use from its tap: from the options that the rule wrote, as one text.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from kfac_fx.ir.curvature_graph import CurvatureBlock
from kfac_fx.ops.convolution import ConvolutionOptions
from kfac_fx.ops.sides import coupling_operators, side_text
from kfac_fx.passes.annotations import annotation


def why_alone(block: CurvatureBlock) -> str | None:
    """Return why a block has no cross factors with any other; None if it can have some.

    A cross factor needs one A and one G, both whole matrices, from one tap that sees the input and
    the derivative of a case together.
    """
    tap = block.uses[0].tap
    if block.products != 1:
        return f"a {block.kind} block ({block.approximation}) has no cross factors"
    # A pair needs the rows of one run of one use on either side.
    if any(factor.role == "count" for factor in block.factors) or len(block.uses) > 1:
        return "its uses, or their positions, are counted at run time"
    if any(factor.diagonal or factor.cut for factor in block.factors):
        return "a side that is a diagonal, or cut, has no cross factors"
    if any(len(factor.shape) != 2 for factor in block.factors):
        return "it is a batch of blocks, one for each group"
    if (
        tap is None
        or tap.operator not in coupling_operators()
        or tap.consumer is not None
        or tap.scale
    ):
        return "its statistics are not those of a plain layer"
    return None


def may_come_first(block: CurvatureBlock) -> bool:
    """Return whether a block can be the earlier one of a pair.

    Args:
        block: one that ``why_alone`` has nothing against.
    """
    tap = block.uses[0].tap
    if tap is None or tap.operator != "convolution":
        return True
    # A couple sees the earlier use's output by its link alone, which has no positions where they
    # are reduced. A transposed convolution's patches cannot be read without them: its input's shape
    # does not tell the output's (``output_padding``), and the backward pass would fail.
    options = ConvolutionOptions.from_args(tap.options)
    return not (options.reduce and options.padding_mode == "transposed")


def text_of_side(module: nn.Module, block: CurvatureBlock) -> str:
    """Return the block's only use as the operators of couplings and moments read it.

    Args:
        module: whose block it is.
        block: one that ``why_alone`` has nothing against.
    """
    tap = block.uses[0].tap
    assert tap is not None
    return side_text(tap.operator, tap.options, interleaved=_interleaved(module, block))


def _interleaved(module: nn.Module, block: CurvatureBlock) -> bool:
    """Tell whether it is the output projection of attention, which reads positions by cases."""
    owner, _, leaf = block.parameters[0].rpartition(".")[0].rpartition(".")
    # nn.MultiheadAttention flattens [positions, cases] before this layer, which nothing in the
    # graph's shapes tells from cases by positions.
    if leaf != "out_proj":
        return False
    return isinstance(module.get_submodule(owner), nn.MultiheadAttention)


def taps_of_couplings(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return block -> the tap of its use, for the kinds of use that can be coupled."""
    plain = [getattr(torch.ops.kfac_fx, name).default for name in coupling_operators()]
    taps = (node for node in graph.nodes if node.op == "call_function" and node.target in plain)
    return {annotation(tap)["blocks"][0]: tap for tap in taps}
