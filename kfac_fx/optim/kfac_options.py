"""Options of KFAC that few runs change: rates of its rules, and guards against bad batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kfac_fx.config import FACTOR_STORAGES, FactorStorage, choice, period, positive, share, within
from kfac_fx.errors import UnknownOptionError
from kfac_fx.statistics.forward import Forward, run_network


@dataclass(frozen=True)
class KFACOptions:
    """Options of ``KFAC(..., options=KFACOptions(...))`` besides its own keywords.

    T1, T2, omega1, omega2, tau1, tau2 are the names of Martens & Grosse (2015), whose own constants
    are ``KFACOptions.paper()``. An object can serve several optimizers: nothing in it changes.

    Args:
        omega1: in (0, 1), what lambda is multiplied with where the model is right, and divided by
            where it is wrong. None for 0.7; with ``damping_every`` for (19/20)^T1, so that the
            speed does not depend on T1. Without an ``lr`` only.
        damping_every: T1, for the paper's rule: lambda is judged after so many iterations, by the
            reduction ratio of a step's own batch. None for a judgement of each step, on its own
            batch and on the next. Without an ``lr`` only.
        gamma_every: T2, the number of iterations after which gamma is searched among three values,
            which costs two more refreshes. None for gamma^2 = lambda + eta. Without an ``lr`` only.
        omega2: in (0, 1), the ratio of neighbouring values of that search. None for (19/20)^(T2/2).
        gamma_limit: a gamma that is searched is at most this multiple of sqrt(lambda + eta). It is
            infinite in the paper: while lambda is large, its search then prefers gradient descent,
            stays with it.
        smallest_damping: floor of lambda, which the paper's rule lacks: lambda of an easy problem
            falls until rounding makes the inverses useless. None for 1e-12 mean eigenvalues.
        statistics_fraction: tau1 in (0, 1], the first cases of a batch that statistics are of. More
            are taken where the averages would hold fewer than 64 likelihood terms. None for a
            quarter, with an ``lr`` for all.
        products_fraction: tau2 in (0, 1], the first cases for products with the exact Fisher.
        fewest_products: so many cases are taken for products at least: directions that few cases do
            not see look flat, and steps become too long.
        exact_rows: of batches with few outputs, steps have the exact Fisher of at most so many of
            them, not that of the blocks, where the loss is quadratic in the outputs and the network
            one of linear layers (docs/howto/whole_optimizer.md). 0 for none. Without an ``lr`` and
            without ``damping_every`` only.
        ema_decay: in [0, 1), the largest weight of the old statistics in a running average. None
            for 0.95, with an ``lr`` for that of ``Preconditioner``, 0.9.
        trust_region: how long steps are. "adaptive" has the rules of ``Preconditioner``, for
            gradients and for steps. A number is KFC's own: the largest squared length of lr times
            the proposal in Fhat. None for no limit. With an ``lr`` only.
        outlier: a batch whose loss is this many times the running average, or not finite, is not
            trusted (its gradient and statistics: a hundred times as many). If its loss was fine
            before the last step, that step is undone exactly and lambda grows; else it is skipped.
            In the stochastic form with the "adaptive" trust region, only what is not finite.
        forward: a function from (network, inputs) to the likelihood's outputs, where they are not
            what the network returns for ``inputs``.
        factor_storage: how running averages are kept between folds, as for ``Preconditioner``.

    Raises:
        UnknownOptionError: a number is out of its range, or a name is unknown.
    """

    omega1: float | None = None
    damping_every: int | None = None
    gamma_every: int | None = None
    omega2: float | None = None
    gamma_limit: float = 1.0
    smallest_damping: float | None = None
    statistics_fraction: float | None = None
    products_fraction: float = 1 / 4
    fewest_products: int = 256
    exact_rows: int = 1024
    ema_decay: float | None = None
    trust_region: float | Literal["adaptive"] | None = "adaptive"
    outlier: float = 5.0
    forward: Forward = run_network
    factor_storage: FactorStorage | None = None

    @classmethod
    def paper(cls) -> KFACOptions:
        """Return the constants of Martens & Grosse (2015), with a floor and a limit of gamma.

        Their lambda_0 and eta are ``KFAC(damping=150.0, weight_decay=1e-5)``, their T3 the default
        of ``refresh_every`` where gamma is searched.
        """
        return cls(
            damping_every=5,
            gamma_every=20,
            smallest_damping=1e-3,
            statistics_fraction=1 / 8,
            fewest_products=512,
            exact_rows=0,
        )

    def __post_init__(self) -> None:
        # Here and not in KFAC, so that an object that exists is one that can be used.
        for name in ("damping_every", "gamma_every"):
            if getattr(self, name) is not None:
                period(name, getattr(self, name))
        period("fewest_products", self.fewest_products)
        if isinstance(self.exact_rows, bool) or not (
            isinstance(self.exact_rows, int) and self.exact_rows >= 0
        ):
            raise UnknownOptionError(f"exact_rows must be 0 or more, got {self.exact_rows!r}")
        for name in ("omega1", "omega2"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UnknownOptionError(f"{name} must be a number between 0 and 1, got {value!r}")
        if self.omega2 is not None and self.gamma_every is None:
            raise UnknownOptionError("omega2 is of the search of gamma: give gamma_every too")
        if self.statistics_fraction is not None:
            share("statistics_fraction", self.statistics_fraction)
        share("products_fraction", self.products_fraction)
        if self.ema_decay is not None:
            within("ema_decay", self.ema_decay, 0.0, 1.0)
        positive("smallest_damping", self.smallest_damping)
        if isinstance(self.trust_region, str):
            choice("trust_region", self.trust_region, ("adaptive",))
        else:
            positive("trust_region", self.trust_region)
        if self.factor_storage is not None:
            choice("factor_storage", self.factor_storage, FACTOR_STORAGES)
