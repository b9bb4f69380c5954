"""Models that no tracer follows: their own Python code runs, and is recorded while it does."""

from kfac_fx.eager.eager_module import EagerModule

__all__ = ["EagerModule"]
