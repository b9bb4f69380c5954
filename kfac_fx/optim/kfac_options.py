"""Options of KFAC that few runs change: the paper's constants, and guards against bad batches."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_fx.config import FACTOR_STORAGES, FactorStorage, choice, period, positive, share, within
from kfac_fx.statistics.forward import Forward, run_network


@dataclass(frozen=True)
class KFACOptions:
    """Options of ``KFAC(..., options=KFACOptions(...))`` besides its own keywords.

    T1, T2, tau1, tau2 are the names of Martens & Grosse (2015); the defaults are the paper's, where
    it has a value. An object can serve several optimizers: nothing in it changes.

    Args:
        damping_every: T1, the number of iterations after which lambda is judged by the reduction
            ratio. Without an ``lr`` only.
        gamma_every: T2, the number of iterations after which gamma is searched among three values.
            Each search costs two more refreshes. Without an ``lr`` only.
        statistics_fraction: tau1 in (0, 1], the first cases of a batch that statistics are of. More
            are taken where the averages would hold fewer than 64 likelihood terms.
        products_fraction: tau2 in (0, 1], the first cases for products with the exact Fisher, at
            least 512: directions that few cases do not see look flat, and steps become too long.
        smallest_damping: floor of lambda, which the paper's rule lacks; at zero, lambda of an easy
            problem falls until rounding makes the inverses useless.
        gamma_limit: gamma is at most this multiple of sqrt(lambda + eta). It is infinite in the
            paper: while lambda is large, its search then prefers gradient descent, stays with it.
        ema_decay: in [0, 1), the largest weight of the old statistics in a running average.
        trust_region: largest squared length of a step in Fhat; a longer one is shortened (KFC).
            None for no limit. With an ``lr`` only.
        outlier: a batch whose loss is this many times the running average, or not finite, is not
            trusted (its gradient and statistics: a hundred times as many). If its loss was fine
            before the last step, that step is undone exactly and lambda grows; else it is skipped.
        forward: a function from (network, inputs) to the likelihood's outputs, where they are not
            what the network returns for ``inputs``.
        factor_storage: how running averages are kept between folds, as for ``Preconditioner``.

    Raises:
        UnknownOptionError: a number is out of its range, or a name is unknown.
    """

    damping_every: int = 5
    gamma_every: int = 20
    statistics_fraction: float = 1 / 8
    products_fraction: float = 1 / 4
    smallest_damping: float = 1e-3
    gamma_limit: float = 1.0
    ema_decay: float = 0.95
    trust_region: float | None = None
    outlier: float = 5.0
    forward: Forward = run_network
    factor_storage: FactorStorage | None = None

    def __post_init__(self) -> None:
        # Here and not in KFAC, so that an object that exists is one that can be used.
        period("damping_every", self.damping_every)
        period("gamma_every", self.gamma_every)
        share("statistics_fraction", self.statistics_fraction)
        share("products_fraction", self.products_fraction)
        within("ema_decay", self.ema_decay, 0.0, 1.0)
        positive("trust_region", self.trust_region)
        if self.factor_storage is not None:
            choice("factor_storage", self.factor_storage, FACTOR_STORAGES)
