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
    """The model could not be captured as a graph.

    What to do: pass ``example_inputs=``, with which ``torch.export`` and the model's own code
    can follow it; or change the line that the message names.
    docs/howto/when_a_layer_is_diagonal.md.
    """


class NoParametersError(KFACError, ValueError):
    """The model has no parameter to precondition.

    What to do: unfreeze what should be trained before the transform, or mend ``exclude=``.
    """


class UnknownOptionError(KFACError, ValueError):
    """An option has a value that is not among the valid ones.

    What to do: take one of the values that the message lists.
    """


class CoverageError(KFACError, RuntimeError):
    """``strict=True`` and a parameter would get a weaker block than its kind allows.

    What to do: mend what the message names (docs/howto/when_a_layer_is_diagonal.md), leave it
    out by ``exclude=``, or accept the weaker block by ``strict=False``.
    """


class PassError(KFACError, RuntimeError):
    """A graph pass broke one of its invariants.

    What to do: look at the pass that ``pass_name`` says; after passes of your own that rewrite
    layers, run ``KFACTransform`` again.
    """


class LikelihoodError(KFACError, ValueError):
    """The likelihood does not fit the outputs or the targets.

    What to do: name the likelihood that the outputs are of, and give ``observe`` the outputs as
    the network returned them. docs/howto/other_losses.md.
    """


class ObservationError(KFACError, RuntimeError):
    """``observe`` was called at the wrong time or with outputs of another module.

    What to do: call ``observe`` once a forward, between ``net(x)`` and ``loss.backward()``,
    with what ``net`` returned; or ``observe(inputs=...)`` where the forward is compiled.
    """


class TapsTakenError(KFACError, RuntimeError):
    """Another Preconditioner or KFAC on the same module used its taps within a step of this one.

    What to do: finish one object's step before another one's ``observe``, or transform the
    model once for each.
    """


class StatisticsError(KFACError, RuntimeError):
    """Statistics are needed that were never recorded.

    What to do: call ``observe`` in the first step, and train for a step before you ask for
    reports, inverses or operators.
    """


class OperatorError(KFACError, ValueError):
    """A vector does not fit a curvature operator, or a block has none.

    What to do: give vectors by the names and in the shapes of the covered parameters; for a
    block that the message names, take ``structure="block_diagonal"`` or leave it out.
    """


class GradientError(KFACError, RuntimeError):
    """Gradients are missing or do not fit the parameters.

    What to do: call ``loss.backward()`` before ``step()``; give gradients in the parameters'
    shapes.
    """


class ParameterChangedError(KFACError, RuntimeError):
    """A parameter was replaced, reshaped, cast or moved after the transform.

    What to do: cast, move, unfreeze and load first, transform then; load a ``state_dict`` into
    a model and options that are those it was saved with.
    """


class DampingError(KFACError, ValueError):
    """The damping is not a finite number greater than zero.

    What to do: give a number above zero, or leave the argument out.
    docs/howto/choose_settings.md.
    """


class WorkerLostError(KFACError, RuntimeError):
    """Another process of a distributed run has ended, or did not come in time.

    What to do: start all processes again from the last checkpoint.
    docs/howto/several_processes.md.
    """


class DesynchronisedError(KFACError, RuntimeError):
    """The processes of a distributed run do not make the same calls, or differ in their values.

    What to do: let all processes make the same calls in the same order, with the same options;
    no ``if rank == 0`` around ``observe``, ``step`` or ``report``.
    """


class CheckpointError(KFACError, RuntimeError):
    """A checkpoint could not be written or read.

    What to do: look at the folder that the message names; an older checkpoint may be whole.
    """


class MissingExtraError(KFACError, ImportError):
    """An optional package is needed that is not installed.

    What to do: install what the message names, ``pip install "kfac_fx[viz]"`` for pictures.
    """


class FormatError(KFACError, ValueError):
    """A file has a format that is unknown, or not what its name says.

    What to do: take a suffix that the message lists, or write the file anew with this version.
    """
