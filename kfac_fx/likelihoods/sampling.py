"""Targets drawn from the model as a function of noise that does not depend on the model.

So one noise gives one draw, in a pass that runs and in a program that was compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributions as D


@contextmanager
def forked(tensors: Iterable[Tensor]) -> Iterator[list[int]]:
    """Draws inside leave the streams of the CPU and of the tensors' devices as they were."""
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices):
        yield devices


@contextmanager
def seeded(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Draws inside, on the CPU and the CUDA devices of ``tensors``, come from the seed.

    Only those generators are touched: ``torch.manual_seed`` takes milliseconds before CUDA starts.
    """
    with forked(tensors) as devices:
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


class Noise(NamedTuple):
    """A standard random tensor: "exponential", "uniform" or "normal"."""

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def sample(self, seed: int) -> Tensor:
        """The tensor of one seed; torch's own random stream is left alone."""
        generator = torch.Generator(self.device).manual_seed(seed)
        result = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.kind == "exponential":
            return result.exponential_(generator=generator)
        fill = result.uniform_ if self.kind == "uniform" else result.normal_
        return fill(generator=generator)


def noise_of(distribution: D.Distribution) -> Noise | None:
    """What a draw needs; None where only the distribution itself knows how to draw."""
    base = _base(distribution)
    sample = type(base).sample
    if isinstance(base, D.Normal) and sample is D.Normal.sample:
        return _noise_like("normal", base.loc)
    if isinstance(base, D.Categorical) and sample is D.Categorical.sample:
        if _races(base.probs):
            return _noise_like("exponential", base.probs)
        return _noise_like("uniform", base.probs[..., 0])
    if isinstance(base, D.Bernoulli) and sample is D.Bernoulli.sample:
        return _noise_like("uniform", base.probs)
    return None


def _noise_like(kind: str, like: Tensor) -> Noise:
    wide = torch.promote_types(like.dtype, torch.float32)
    return Noise(kind, like.shape, wide, like.device)


def draw(distribution: D.Distribution, noise: Tensor) -> Tensor:
    """Targets y ~ p from a noise of ``noise_of(distribution)``."""
    base = _base(distribution)
    if isinstance(base, D.Categorical):
        if _races(base.probs):
            return (base.probs / noise).argmax(-1)
        return _inverted(base.probs, noise)
    if isinstance(base, D.Bernoulli):
        return (noise < base.probs).to(noise.dtype)
    assert isinstance(base, D.Normal)
    return base.loc + base.scale * noise


def _races(probs: Tensor) -> bool:
    """Whether exponential clocks of all classes race, as torch.multinomial has them.

    On a CPU they take 10 to 20 times as long as inversion. Elsewhere sums in parallel need not be
    monotone, and inversion might draw a class of probability zero.
    """
    return probs.device.type != "cpu"


def _inverted(probs: Tensor, noise: Tensor) -> Tensor:
    """The class at which the distribution function passes a uniform number, one a case."""
    wide = torch.promote_types(probs.dtype, torch.float32)
    sums = probs.cumsum(-1, dtype=wide)
    # Numbers below one stay below the total, rounded too: a class follows that adds to the sum.
    reached = noise.unsqueeze(-1) * sums[..., -1:]
    found = torch.searchsorted(sums, reached, right=True).squeeze(-1)
    return found.clamp_max(probs.shape[-1] - 1)  # NaNs are found elsewhere, but may not lead astray


@torch.no_grad()
def drawn(distribution: D.Distribution, seed: int) -> Tensor:
    """Targets y ~ p; torch's own random stream is left as it was."""
    noise = noise_of(distribution)
    if noise is not None:
        return draw(distribution, noise.sample(seed))
    with seeded(seed, _parameters(distribution)):
        return distribution.sample()


def _parameters(distribution: D.Distribution) -> list[Tensor]:
    """The tensors that a distribution holds, or the ones inside it do."""
    held = list(vars(distribution).values())
    inner = [t for d in held if isinstance(d, D.Distribution) for t in _parameters(d)]
    return [value for value in held if isinstance(value, Tensor)] + inner


def _base(distribution: D.Distribution) -> D.Distribution:
    while type(distribution) is D.Independent:
        distribution = distribution.base_dist
    return distribution
