"""The rules that recognise parameter uses: one file a kind, found by being in this folder.

The steps for a new kind are in docs/guides/add_a_layer_kind.md.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType, TracebackType

from kfac_fx.capture.dialect import add_operation, remove_operation
from kfac_fx.passes.rules.base import BUILT_IN, Refusal, Rule, Rules, Site, Target
from kfac_fx.passes.rules.generic import generic_use
from kfac_fx.passes.rules.linear import dense_use

# A rule's file adds it to BUILT_IN by ``layer_kind``. No two of the library's rules are asked about
# the same operation, so the order of the files does not matter.
for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


_registered: list[Rule] = []


def default_rules() -> Rules:
    """Return the rules that an analysis asks unless it is given others.

    Those that ``register_rule`` added come first, the last one before the others.
    """
    return Rules((*_registered, *BUILT_IN))


class Registration:
    """A rule that is registered, until ``remove`` or the end of a ``with`` block.

    Args:
        rule: is asked before the others from now on.
        operations: words for targets, as ``register_rule`` takes them.
    """

    def __init__(self, rule: Rule, operations: Mapping[Target, str]) -> None:
        self._rule = rule
        self._words = {target: add_operation(target, words) for target, words in operations.items()}
        _registered.insert(0, rule)

    def remove(self) -> None:
        """Undo the registration; modules that were transformed with the rule keep their taps.

        Nothing happens the second time.
        """
        if not any(rule is self._rule for rule in _registered):
            return
        _registered[:] = [rule for rule in _registered if rule is not self._rule]
        for target, before in self._words.items():
            remove_operation(target, before)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def register_rule(
    rule: Rule, operations: Mapping[Target, str] = MappingProxyType({})
) -> Registration:
    """Add a rule of one's own; it is asked before the others.

    Args:
        rule: an object with ``kind``, ``operations`` and ``match`` (see ``Rule``); ``match`` for a
            dense layer is usually one call of ``dense_use``.
        operations: targets that the vocabulary does not know (a function wrapped by
            ``torch.fx.wrap``, an operator, a method's name) and the operation that each stands for
            with the names of its arguments: ``{my_linear: "my_linear input weight"}``.

    Returns:
        What undoes it: ``.remove()``, or the end of a ``with`` block.
    """
    return Registration(rule, operations)


__all__ = [
    "BUILT_IN",
    "Refusal",
    "Registration",
    "Rule",
    "Rules",
    "Site",
    "default_rules",
    "dense_use",
    "generic_use",
    "register_rule",
]
