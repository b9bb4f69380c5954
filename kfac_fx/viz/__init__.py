"""Pictures and files of curvature graphs, spectra, and training runs."""

from kfac_fx.viz.dense_fisher import (
    dense_inverse,
    draw_matrices,
    exact_fisher,
    kronecker_fisher,
    show_matrix,
)
from kfac_fx.viz.facts import to_networkx
from kfac_fx.viz.json_format import from_json, load, to_json
from kfac_fx.viz.save import save, to_pydot
from kfac_fx.viz.spectra import draw_spectra
from kfac_fx.viz.training_curves import draw_training, write_tensorboard

__all__ = [
    "dense_inverse",
    "draw_matrices",
    "draw_spectra",
    "draw_training",
    "exact_fisher",
    "from_json",
    "kronecker_fisher",
    "load",
    "save",
    "show_matrix",
    "to_json",
    "to_networkx",
    "to_pydot",
    "write_tensorboard",
]
