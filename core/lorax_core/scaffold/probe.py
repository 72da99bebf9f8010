"""Tries values of a configuration's fields on tiny models, and sees what of the answers changes.

Decides which values are tried and what counts as no effect. Knows nothing of what is made of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lorax_core.modeling.activation import ACTIVATIONS
from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.facts import Facts, find_facts
from lorax_core.scaffold.record import Record, observe, same
from lorax_core.scaffold.tiny import WINDOW, Tiny

Values = Mapping[str, Any]
DEEP: Final = 12
"""Layers of a model that shows what goes by the number of a layer."""


@dataclass(frozen=True)
class Outcome:
    """What a model of some configuration computes: its facts, or why they are not understood.

    There is no record where transformers refuses the configuration.
    """

    record: Record | None
    facts: Facts | None
    problem: str | None

    def is_same(self, other: Outcome) -> bool:
        """Whether both models have the same tensors and give the same numbers."""
        if self.record is None or other.record is None:
            return False
        mine, theirs = (dict(one.record.model.named_parameters()) for one in (self, other) if one.record is not None)
        if {name: one.shape for name, one in mine.items()} != {name: one.shape for name, one in theirs.items()}:
            return False
        # What modules say of themselves counts too: readable attention goes by its mask, other forms of it by this.
        if _declared(self.record) != _declared(other.record):
            return False
        return _same_answers(self.record, other.record)


class Probe:
    """Tiny models of one architecture under changed configurations; each is made and observed once."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny = tiny
        self._made: dict[str, Outcome] = {}

    def base(self) -> Facts:
        """The facts of the tiny configuration itself, which must be those of a deep one but for windows.

        Raises NotUnderstood where core's blocks do not compute the same.
        """
        outcome = self.of({})
        deep = self.of({self.tiny.spelt("num_hidden_layers"): DEEP, **self._longer(DEEP)})
        for one in (outcome, deep):
            if one.facts is None:
                raise NotUnderstood([one.problem or "transformers refuses the tiny configuration"])
        assert outcome.facts is not None
        return outcome.facts

    def of(self, changes: Values) -> Outcome:
        """What the tiny configuration with these changes computes."""
        key = repr(sorted(changes.items()))
        if key not in self._made:
            self._made[key] = self._outcome(changes)
        return self._made[key]

    def _longer(self, layers: int) -> dict[str, Any]:
        """Lists of the stated configuration with an entry for each layer, for so many."""
        lists = {name: value for name, value in self.tiny.fields.items() if isinstance(value, list)}
        return {name: [value[at % len(value)] for at in range(layers)] for name, value in lists.items() if value}

    def _outcome(self, changes: Values) -> Outcome:
        try:
            config = self.tiny.config(**changes)
            record = observe(self.tiny.model(config), self.tiny.ids(config))
        except Exception as error:  # whatever transformers raises: it takes no such configuration
            return Outcome(None, None, refusal(error))
        try:
            return Outcome(record, find_facts(record, config), None)
        except NotUnderstood as error:
            return Outcome(record, None, "; ".join(error.problems))


def refusal(error: Exception) -> str:
    """What is said of an error that transformers raises for a configuration."""
    why = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return f"transformers refuses it: {why}"


def hint_of(config_class: Any, name: str) -> str:
    """The type that a configuration's class states for a field, as text."""
    found = (
        {one.name: one.type for one in dataclasses.fields(config_class)}
        if dataclasses.is_dataclass(config_class)
        else {}
    )
    kind = found.get(name, "")
    return kind.__name__ if isinstance(kind, type) else str(kind)


def default_of(config_class: Any, name: str, otherwise: Any) -> Any:
    """What the class states as a field's default, before anything is derived from other fields."""
    for one in dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ():
        if one.name == name:
            if one.default is not dataclasses.MISSING:
                return one.default
            if one.default_factory is not dataclasses.MISSING:
                return one.default_factory()
    return otherwise


def other_values(value: Any, hint: str) -> list[Any]:
    """Values to try in place of one, of the type that the field has."""
    if isinstance(value, bool):
        return [not value]
    if value is None and "bool" in hint:
        return [True, False, *([2 * WINDOW, WINDOW] if "int" in hint else [])]
    if isinstance(value, str):
        acts = ["relu", "silu", "gelu"] if value in ACTIVATIONS else []
        return [act for act in acts if act != value]
    # Of `float | int | None` a number between 0 and 1: dropout takes no other.
    if isinstance(value, int) or (value is None and "int" in hint and "float" not in hint):
        tried: list[Any] = [2 * value, WINDOW] if value else [WINDOW, 2 * WINDOW]
    elif isinstance(value, float) or (value is None and "float" in hint):
        tried = [0.1] if value and value < 1e-2 else [1.5 * (value or 0) + 0.25, 0.7]
    else:
        return []
    with_none = [None] if "None" in hint and value is not None else []
    return [one for one in dict.fromkeys([*tried, *with_none]) if one != value]


def _declared(record: Record) -> list[object]:
    return [getattr(module, "is_causal", None) for module in record.model.modules()]


def _same_answers(one: Record, other: Record) -> bool:
    if not same(one.hidden, other.hidden, 1e-6):
        return False
    if one.logits is None or other.logits is None:
        return one.logits is other.logits
    return same(one.logits, other.logits, 1e-6)
