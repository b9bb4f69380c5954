"""The layers of a preconditioner's parameters, and steps that are no longer than a share of each.

How long a preconditioned gradient is beside them is said in kfac_fx/optim/bounds.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from kfac_fx.curvature.parameters import layer_numbers
from kfac_fx.optim.bounds import LayerSteps
from kfac_fx.parallel import Workers, own_entries
from kfac_fx.torch_internals import foreach


class LayerBounds(dict[tuple[str, ...], LayerSteps]):
    """The layers of parameters, by the names of those that are asked for.

    Others may be frozen, or get no gradient. What is asked for is made once, and is a plain look-up
    in every other step.

    Args:
        parameters: by name.
        layers: see ``layer_numbers``.
        workers: the processes that share sharded parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        layers: Iterable[Sequence[str]],
        workers: Workers,
    ) -> None:
        super().__init__()
        self._parameters = parameters
        self._numbers = layer_numbers(layers)
        self._workers = workers

    def __missing__(self, names: tuple[str, ...]) -> LayerSteps:
        numbers = [self._numbers[name] for name in names]
        own = [self._parameters[name] for name in names]
        self[names] = made = LayerSteps(own, numbers, self._workers)
        return made

    def shorten(self, steps: Mapping[str, Tensor], largest: float) -> float | Tensor:
        """Shorten steps in place; return which part of all their length is left.

        Args:
            steps: by name of the parameter.
            largest: the largest length of a layer's step, in units of its weights' length.
        """
        layers, own = self[tuple(steps)], [self._parameters[name] for name in steps]
        vectors = layers.pack(list(steps.values()))
        excess = layers.excess(vectors, layers.pack(own), largest)
        if excess is None:
            return 1.0
        here = [own_entries(step) for step in steps.values()]
        shortened = layers.unpack(vectors, excess)
        foreach.copy_(here, [own_entries(step) for step in shortened])
        return excess.kept
