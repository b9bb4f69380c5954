"""The passes of an objective that may run as their traces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from kfac_fx.likelihoods.builtin import Likelihood, Tree
from kfac_fx.likelihoods.named import Sum
from kfac_fx.optim.products import Derivatives, TracedRows
from kfac_fx.optim.traced_loss import Evaluated, TracedLoss
from kfac_fx.parallel import Workers
from kfac_fx.statistics.buffers import sources_of
from kfac_fx.statistics.forward import Forward, run_network
from kfac_fx.statistics.own_pass import LIKELIHOOD, OwnPass
from kfac_fx.statistics.repeated_pass import RepeatedPass
from kfac_fx.statistics.replays import Replays, is_ours
from kfac_fx.statistics.swap_tensors import Places
from kfac_fx.statistics.traced_pass import Extra


class Repeats:
    """The passes of an objective of one process, as traces where they have some.

    Args:
        net: the network.
        names: of the parameters that derivatives are asked for.
        likelihood: the likelihood of the outputs.
        forward: a function from (network, inputs) to outputs.
        workers: the process.
        widened: whether losses that are compared are of outputs in float64, by their number.

    Attributes:
        names: the names as they are given.
        held: the names under which the module holds the same parameters.
        places: where it holds them.
    """

    def __init__(
        self,
        net: nn.Module,
        names: Sequence[str],
        likelihood: Likelihood | Sum,
        forward: Forward,
        workers: Workers,
        widened: Callable[[int], bool],
    ) -> None:
        # A parameter that is held twice has one name in the module, and any of its names here.
        own_names = {id(parameter): name for name, parameter in net.named_parameters()}
        self.names = tuple(names)
        self.held = tuple(own_names[id(net.get_parameter(name))] for name in names)
        self.places = Places(net)
        replays = Replays(net, forward is run_network and is_ours(likelihood))

        def loss(trained: tuple[str, ...], wide: Callable[[int], bool]) -> RepeatedPass[Evaluated]:
            own = OwnPass(
                net,
                sources_of(net, ()),
                likelihood,
                "sampled",
                forward,
                workers,
                self.places,
                loss=LIKELIHOOD,
                statistics=False,
                trained=trained,
            )
            traced = partial(TracedLoss, widened=wide)
            return RepeatedPass(own, replays, traced, Evaluated.tensors)

        self._gradient = loss(self.held, lambda _: False)
        self._compared_gradient = loss(self.held, widened)
        make = partial(TracedRows, names=self.held)
        self._products: RepeatedPass[Derivatives] = RepeatedPass(
            self._gradient.own, replays, make, lambda found: [found.rows]
        )

    def gradient(
        self, inputs: Tree, targets: Tree, compared: bool, plain: Callable[[], Evaluated]
    ) -> Evaluated:
        """Return the loss and its gradients.

        Args:
            inputs, targets: the batch.
            compared: whether ``start`` is wanted, too.
            plain: runs the pass as it is.
        """
        run = self._compared_gradient if compared else self._gradient
        return run(inputs, targets, Extra(), plain)

    def products(
        self,
        inputs: Tree,
        targets: Tree,
        directions: Sequence[Sequence[Tensor]],
        plain: Callable[[], Derivatives],
    ) -> Derivatives:
        """Return the derivatives of the output Fisher's root in directions.

        Args:
            inputs, targets: the batch.
            directions: each in the order of ``names``.
            plain: runs the passes as they are.
        """
        tensors = [tensor for direction in directions for tensor in direction]
        return self._products(inputs, targets, Extra(0, tensors), plain)

    def named(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same by the names under which the module holds parameters."""
        return dict(zip(self.held, values.values(), strict=True))
