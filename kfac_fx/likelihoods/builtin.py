"""Likelihoods that come with the library, and the two things that every likelihood is made of.

A likelihood turns outputs into a ``torch.distributions.Distribution`` and says which terms of a
batch count. A *term* is one element of the distribution's batch shape: a case, or a token where the
likelihood factorises over tokens.

Two estimators of the Fisher need more than torch's distributions offer: a square root of the output
Fisher, of which the exact one takes every column, and the sampled one all columns with random
signs. It is told once for each class of distributions (``ROOTS``), in the file of the likelihood
that returns it or in roots.py, so a callable that returns torch's own distributions has it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor
from torch import distributions as D
from torch.autograd import forward_ad
from torch.distributions import Distribution, Independent
from torch.nn.functional import pad

from kfac_fx.errors import LikelihoodError

Tree = Any
"""What a network takes or returns: tensors, in tuples, lists and mappings; None for none at all.

No type fits what users nest, so this alias stands for all of it, here and in statistics/.
"""


@runtime_checkable
class Likelihood(Protocol):
    """p(y | outputs), with a weight for each term of the batch.

    A class may also say ``casewise = True``: a part of the cases then has the terms that it has in
    the whole batch, so that a few cases tell how a loss is reduced. Without it all are compared.
    ``quadratic = True`` says that the loss is quadratic in the outputs: steps of any length in nats
    may then be believed as far as those of one nat.
    """

    def distribution(self, outputs: Tensor) -> Distribution:
        """Return the predictive distribution of outputs of a batch.

        Raises:
            LikelihoodError: the outputs do not fit.
        """

    def terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return targets fit for ``log_prob``, and weights of the terms.

        Only the shape and the dtype of the outputs may be used: compiled passes give stand-ins.

        Args:
            outputs: the outputs as ``distribution`` gets them.
            targets: the targets as the user gave them; None where there are none.

        Returns:
            The targets, and weights of the distribution's batch shape, or None where all terms
            count once.

        Raises:
            LikelihoodError: the targets do not fit, or are needed and missing.
        """


class OutputFisher(NamedTuple):
    """F_out of all terms of a batch in closed form: a diagonal less the products of a vector.

    Entries of one term along ``dim`` have F_ij = -v_i v_j; those of different terms are
    uncorrelated, and so are all where there is no vector.

    Attributes:
        diagonal: the diagonal of F_out, in the shape of the outputs.
        vector: v in the same shape, or None.
        dim: the dimension of the outputs that v is along.
    """

    diagonal: Tensor
    vector: Tensor | None = None
    dim: int = -1

    def along(self, dim: int, *, summed: bool, parts: int = 1) -> Tensor | None:
        """Return the sum over all other dimensions of F_out, a matrix over the entries of one.

        Args:
            dim: the dimension.
            summed: whether derivatives are added up over the others but the first before their
                products are taken; then None where they are correlated there.
            parts: into how many parts of b entries the d entries are cut, b = ceil(d / parts), the
                last filled up with zeros: only the blocks on the diagonal are formed, as the whole
                of a vocabulary's matrix is larger than memory. 1 for the whole.

        Returns:
            [d, d], or [parts, b, b].
        """
        along_vector = (self.dim - dim) % self.diagonal.dim() == 0
        if self.vector is not None and not along_vector and summed:
            return None
        d = self.diagonal.shape[dim]
        size = -(-d // parts)
        room = (0, parts * size - d)
        if self.vector is not None and along_vector and size > 1:
            v = pad(self.vector.movedim(dim, -1).flatten(0, -2), room)
            v = v.unflatten(-1, (parts, size)).movedim(0, 1)
            found = torch.baddbmm(v.new_zeros(()), v.mT, v, beta=0, alpha=-1)
        else:
            found = self.diagonal.new_zeros(parts, size, size)
        # The diagonal as it is: sum p less sum p^2 would lose what a confident model leaves of it.
        # Outputs of one dimension, of a layer that was given one vector, have no other ones.
        entries = self.diagonal.movedim(dim, -1).reshape(-1, d).sum(0)
        found.diagonal(0, -2, -1).copy_(pad(entries, room).view(parts, size))
        return found if parts > 1 else found[0]


@runtime_checkable
class KnownFisher(Protocol):
    """A likelihood whose F_out has a closed form, and with it the exact G of the last layer."""

    def output_fisher(self, outputs: Tensor, weights: Tensor | None) -> OutputFisher:
        """Return F_out of outputs [N, ...], each term times its weight.

        Args:
            outputs: as ``Likelihood.distribution`` gets them; not differentiated.
            weights: as ``Likelihood.terms`` returned them.
        """


@runtime_checkable
class Fitting(Protocol):
    """A likelihood that the shapes of a batch tell more about."""

    def fitted(self, outputs: Tensor, targets: Tensor | None) -> Likelihood:
        """Return the likelihood of this batch.

        Args:
            outputs: as ``Likelihood.distribution`` gets them; only the shape may be used.
            targets: as the user gave them, or None.

        Raises:
            LikelihoodError: the shapes leave open which one it is.
        """


def has_known_fisher(likelihood: object) -> TypeGuard[KnownFisher]:
    """Return whether a likelihood knows F_out of the distribution that it returns.

    A subclass with a distribution of its own has another Fisher than the one it inherits.
    """
    for kind in type(likelihood).__mro__:
        if "distribution" in vars(kind):
            return "output_fisher" in vars(kind)
    return False


class Signs(NamedTuple):
    """Random signs, each +1 or -1 with probability one half.

    Attributes:
        shape: the shape of the tensor.
        dtype: the dtype of the tensor.
        device: the device of the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def sample(self, seed: int) -> Tensor:
        """Return the tensor of one seed; torch's own random stream is left alone."""
        # A generator a draw, as cheap as one that is kept: a seed gives the same signs wherever and
        # whenever they are drawn, which lets compiled passes have them as an argument.
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return drawn.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


class UnknownRootError(LikelihoodError):
    """No root of the output Fisher is known.

    Attributes:
        name: of the distribution's class.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"fisher='exact' does not know {name}; use fisher='sampled', or a categorical, "
            "bernoulli or normal likelihood"
        )
        self.name = name


Root = Callable[[Any], Iterator[Tensor]]
"""From a distribution to the columns of a square root S of its output Fisher, S S^T = F_out.

Each is a tensor of batch shape + [columns] whose derivative in the outputs is S's, where what is
multiplied with is detached.
"""

ROOTS: dict[type[Distribution], Root] = {}
"""By the distribution's class. Subclasses have the root of their nearest ancestor."""

FIXED: dict[type[Distribution], str] = {}
"""An attribute that must not depend on the outputs, for the root of a class to be known."""


def may_vary(value: Tensor) -> bool:
    """Say whether a tensor has a derivative, by a backward or in forward mode."""
    # Forward mode runs without gradients, where no tensor says that it needs one.
    return value.requires_grad or forward_ad.unpack_dual(value).tangent is not None


def known_root(distribution: Distribution, *, draws: bool) -> tuple[Distribution, Root | None]:
    """Return the distribution inside of Independent, and the root of its output Fisher.

    The root is None where it is not known in closed form.

    Args:
        distribution: ``Independent`` around it only counts dimensions, which signs do not.
        draws: whether a subclass with a ``sample`` of its own has none: that is another
            distribution, from which the sampled Fisher draws targets.
    """
    while type(distribution) is Independent:
        distribution = distribution.base_dist
    # By class rather than by what the likelihood says: a callable from outputs to a distribution
    # says nothing else, and has a root, too.
    for kind in type(distribution).__mro__:
        if kind in ROOTS:
            other = draws and type(distribution).sample is not getattr(kind, "sample", None)
            # Most classes have nothing that must be fixed, and need no further look.
            varies = kind in FIXED and may_vary(getattr(distribution, FIXED[kind]))
            return distribution, None if other or varies else ROOTS[kind]
    return distribution, None


def check_outputs(outputs: Tensor, name: str) -> None:
    """Raise LikelihoodError unless the outputs are a floating-point tensor with a batch."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = getattr(outputs, "dtype", type(outputs).__name__)
        raise LikelihoodError(f"likelihood {name} needs a floating-point tensor, got {kind}")
    if outputs.dim() == 0:
        raise LikelihoodError(
            f"likelihood {name} needs outputs with a batch dimension, got a scalar"
        )


def check_targets(targets: Tensor | None, shape: torch.Size, name: str) -> None:
    """Raise LikelihoodError if there are targets and they have another shape."""
    if targets is not None and targets.shape != shape:
        raise LikelihoodError(
            f"likelihood {name}: targets have shape {tuple(targets.shape)}, "
            f"the outputs ask for {tuple(shape)}"
        )


class Softmax(D.Categorical):
    """Categorical whose logits are normalised by one operator, with one for the derivative.

    torch's own takes two or three each, over all classes of all terms.

    Attributes:
        given: the logits as they were given.
    """

    def __init__(self, logits: Tensor) -> None:
        self.given = logits
        # Distribution.__init__ alone is called: Categorical's would normalise once more.
        self.logits = torch.log_softmax(logits, -1)
        self._param = self.logits
        self._num_events = logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    def root_times(self, s: Tensor) -> Tensor:
        """Return S s, the derivative of the sum of ``_class_root``'s columns times s.

        It is what autograd makes of the columns, bit by bit, without their graph.
        """
        root = (0.5 * self.logits.detach()).exp()
        scaled = s * root
        return scaled - root.square() * scaled.sum(-1, keepdim=True)

    def expand(
        self, batch_shape: torch.Size | Sequence[int], _instance: D.Categorical | None = None
    ) -> D.Categorical:
        # torch's own expand builds its result past __init__, which here has more to do.
        plain = D.Categorical(logits=self.logits, validate_args=False)
        expanded: D.Categorical = plain.expand(batch_shape, _instance)
        return expanded


@dataclass(frozen=True)
class Categorical:
    """Classes with logits along ``dim``: outputs [N, C] or [N, T, C], targets [N] or [N, T].

    Images of logits [N, C, H, W] have targets [N, H, W], which tell that the classes are dimension
    1, as in ``torch.nn.CrossEntropyLoss``; where no targets are given, ``dim=1`` has to.

    Attributes:
        weight: [C], the weight of a term by its target's class (needs targets in ``observe``); the
            Fisher is that of the weighted mean of the terms.
        ignore_index: targets of this value contribute nothing and are not counted.
        dim: the dimension of the classes. None: the one that targets of this shape leave, 1 or the
            last; without targets the last of outputs [N, C] and [N, T, C].
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    dim: int | None = None
    casewise: ClassVar[bool] = True

    def fitted(self, outputs: Tensor, targets: Tensor | None) -> Categorical:
        if self.dim is not None or not isinstance(outputs, Tensor) or outputs.dim() < 3:
            return self
        # nn.CrossEntropyLoss has the classes first and transformers have them last: targets of an
        # image would pass for those of tokens if its sides were not looked at.
        shape = targets.shape if isinstance(targets, Tensor) else None
        fits = [dim for dim in (1, -1) if outputs.movedim(dim, -1).shape[:-1] == shape]
        if len(fits) == 1:
            return replace(self, dim=fits[0])
        if outputs.dim() == 3:  # both fit, or nothing is known: tokens
            return self
        raise LikelihoodError(
            f"likelihood categorical cannot tell which dimension of outputs {tuple(outputs.shape)} "
            "the classes are: give observe(outputs, targets), or kfac_fx.likelihoods.Categorical("
            "dim=1) for images of logits [N, C, H, W], dim=-1 where they come last"
        )

    def distribution(self, outputs: Tensor) -> Distribution:
        check_outputs(outputs, "categorical")
        if outputs.dim() < 2:
            raise LikelihoodError(
                f"likelihood categorical needs logits [N, C] or [N, T, C], got "
                f"{tuple(outputs.shape)}; for one logit a case use 'bernoulli'"
            )
        # Most have the classes last: no view of them, which has a node of its own in the backward.
        logits = outputs if self.dim in (None, -1) else outputs.movedim(self.dim, -1)
        if logits.shape[-1] < 2:
            raise LikelihoodError(
                "likelihood categorical needs at least two classes, got outputs of shape "
                f"{tuple(outputs.shape)}; for one logit a case use 'bernoulli'"
            )
        return Softmax(logits)

    def terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if targets is None:
            if self.weight is not None:
                raise LikelihoodError("class weights need observe(outputs, targets)")
            return None, None
        dim = -1 if self.dim is None else self.dim
        shape = outputs.movedim(dim, -1).shape[:-1]
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise LikelihoodError(
                f"likelihood categorical needs integer class targets, got {targets.dtype}"
            )
        check_targets(targets, shape, "categorical")
        classes = outputs.shape[dim]
        if self._counts_all(targets, classes):
            # Ones rather than None: programs are compiled for one or the other.
            weights = torch.ones(shape, dtype=outputs.dtype, device=outputs.device)
            return targets, weights if self.weight is None else self.weight.to(outputs)[targets]
        # Checked here, as a draw or a log-probability of an impossible class is an index error on
        # a CPU, and silence or a dead device on a GPU.
        counted = targets != self.ignore_index
        if bool(((targets < 0) | (targets >= classes)).logical_and(counted).any()):
            raise LikelihoodError(f"a target lies outside the {classes} classes of the outputs")
        # An ignored term needs some class that exists; its weight takes it out of every sum.
        targets = targets.where(counted, 0)
        weights = counted.to(outputs.dtype)
        if self.weight is not None:
            weights = weights * self.weight.to(outputs)[targets]
        return targets, weights

    def output_fisher(self, outputs: Tensor, weights: Tensor | None) -> OutputFisher:
        dim = -1 if self.dim is None else self.dim
        p = outputs.softmax(dim)
        a, v = p * (1 - p), p
        if weights is not None:
            w = weights.unsqueeze(dim % outputs.dim())
            a, v = w * a, w.sqrt() * v
        return OutputFisher(a, v, dim)

    def _counts_all(self, targets: Tensor, classes: int) -> bool:
        """Return whether all targets are classes that count; False where it is not worth a look."""
        # Most batches: two numbers tell. A GPU would be waited for twice.
        if 0 <= self.ignore_index < classes or targets.is_cuda or not targets.numel():
            return False
        return int(targets.min()) >= 0 and int(targets.max()) < classes


def _class_root(distribution: D.Categorical) -> Iterator[Tensor]:
    # S = diag(sqrt p) - p sqrt(p)^T has S S^T = diag(p) - p p^T. Its column c is
    # sqrt(p_c) (e_c - p), and with p held constant that is the gradient of sqrt(p_c) (f_c - p f).
    # Not of log p(c): the derivative of a softmax cannot be batched over columns.
    root = (0.5 * distribution.logits.detach()).exp()
    f = distribution.given if isinstance(distribution, Softmax) else distribution.logits
    yield root * (f - (root.square() * f).sum(-1, keepdim=True))


ROOTS[D.Categorical] = _class_root


@dataclass(frozen=True)
class Bernoulli:
    """Independent bits with logits ``outputs``; all but the first dimension are one event."""

    casewise: ClassVar[bool] = True

    def distribution(self, outputs: Tensor) -> Distribution:
        check_outputs(outputs, "bernoulli")
        # Unchecked: validation would wait for a GPU, and outputs that are not finite are found by
        # the recorder, which counts them instead of raising.
        bits = D.Bernoulli(logits=outputs, validate_args=False)
        return Independent(bits, outputs.dim() - 1)

    def terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        check_targets(targets, outputs.shape, "bernoulli")
        return None if targets is None else targets.to(outputs.dtype), None

    def output_fisher(self, outputs: Tensor, weights: Tensor | None) -> OutputFisher:
        p = outputs.sigmoid()
        return OutputFisher(p * (1 - p))


def _bit_root(distribution: D.Bernoulli) -> Iterator[Tensor]:
    # F_out = p (1 - p) in the logit.
    p = distribution.probs.detach()
    yield ((p * (1 - p)).sqrt() * distribution.logits).unsqueeze(-1)


ROOTS[D.Bernoulli] = _bit_root


class _SquaredError(D.Normal):
    """A normal whose ``log_prob`` leaves out the constant: small errors keep their digits."""

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * ((value - self.loc) / self.scale).square()


@dataclass(frozen=True)
class Normal:
    """Means ``outputs`` and a fixed variance; all but the first dimension are one event.

    The loss of a case is half its squared error over the variance, without the constant of the
    density: with variance=0.5 the squared error itself.

    Attributes:
        variance: the variance of every entry of the outputs.
        target: what the targets are where none are given; 0.0 for residuals of an equation.
    """

    variance: float = 1.0
    target: float | None = None
    casewise: ClassVar[bool] = True
    quadratic: ClassVar[bool] = True

    def distribution(self, outputs: Tensor) -> Distribution:
        check_outputs(outputs, "normal")
        # A constant without a gradient: then the root of the Fisher has no columns for it.
        scale = torch.full_like(outputs, self.variance**0.5)
        return Independent(_SquaredError(outputs, scale, validate_args=False), outputs.dim() - 1)

    def terms(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if targets is None and self.target is not None:
            targets = torch.full_like(outputs, self.target)
        check_targets(targets, outputs.shape, "normal")
        return None if targets is None else targets.to(outputs.dtype), None

    def output_fisher(self, outputs: Tensor, weights: Tensor | None) -> OutputFisher:
        return OutputFisher(torch.full_like(outputs, 1 / self.variance))


def _normal_root(distribution: D.Normal) -> Iterator[Tensor]:
    # F_out = diag(1 / sigma^2, 2 / sigma^2) in (mean, sigma).
    yield from location_scale_root(distribution, 2.0)


def location_scale_root(distribution: D.Normal | D.Laplace, c: float) -> Iterator[Tensor]:
    """Yield the columns of F_out = diag(1 / scale^2, c / scale^2) in (loc, scale).

    Args:
        distribution: has ``loc`` and ``scale``; a scale without a derivative has no column.
        c: of the scale's entry.
    """
    scale = distribution.scale.detach()
    yield (distribution.loc / scale).unsqueeze(-1)
    if may_vary(distribution.scale):
        yield (c**0.5 * distribution.scale / scale).unsqueeze(-1)


ROOTS[D.Normal] = _normal_root
