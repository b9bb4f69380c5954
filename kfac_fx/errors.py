"""Every error that kfac_fx raises on purpose. Each message says what to change.

Whoever catches ``KFACError`` catches all of them; each is also the built-in error that it is a kind
of, so that code that knows nothing of kfac_fx treats it as it treats others.
"""

from __future__ import annotations

# There is one class for what a caller would handle in one way, not one for each place that raises;
# why it was raised is in the message.


class KFACError(Exception):
    """Base class of all errors of this library.

    Attributes:
        pass_name: the graph pass that raised it, where one did in a PassManager.
    """

    pass_name: str | None = None


class CaptureError(KFACError, RuntimeError):
    """The model could not be captured as a graph."""


class NoParametersError(KFACError, ValueError):
    """The model has no parameter to precondition."""


class UnknownOptionError(KFACError, ValueError):
    """An option has a value that is not among the valid ones."""


class CoverageError(KFACError, RuntimeError):
    """``strict=True`` and a parameter would get a weaker block than its kind allows."""


class PassError(KFACError, RuntimeError):
    """A graph pass broke one of its invariants."""


class LikelihoodError(KFACError, ValueError):
    """The likelihood does not fit the outputs or the targets."""


class ObservationError(KFACError, RuntimeError):
    """``observe`` was called at the wrong time or with outputs of another module."""


class TapsTakenError(KFACError, RuntimeError):
    """Another Preconditioner or KFAC on the same module used its taps within a step of this one."""


class StatisticsError(KFACError, RuntimeError):
    """Statistics are needed that were never recorded."""


class OperatorError(KFACError, ValueError):
    """A vector does not fit a curvature operator, or a block has none."""


class GradientError(KFACError, RuntimeError):
    """Gradients are missing or do not fit the parameters."""


class ParameterChangedError(KFACError, RuntimeError):
    """A parameter was replaced, reshaped, cast or moved after the transform."""


class DampingError(KFACError, ValueError):
    """The damping is not a finite number greater than zero."""


class WorkerLostError(KFACError, RuntimeError):
    """Another process of a distributed run has ended, or did not come in time."""


class DesynchronisedError(KFACError, RuntimeError):
    """The processes of a distributed run do not make the same calls, or differ in their values."""


class CheckpointError(KFACError, RuntimeError):
    """A checkpoint could not be written or read."""


class MissingExtraError(KFACError, ImportError):
    """An optional package is needed that is not installed."""


class FormatError(KFACError, ValueError):
    """A file has a format that is unknown, or not what its name says."""
