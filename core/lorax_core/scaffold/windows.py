"""Which field of a configuration is the window of attention, and which layers have it.

Decides by setting fields and looking for windows in what tiny models compute; how a file without `layer_types` is read, by
asking transformers' configuration alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.probe import Probe, Values, default_of, hint_of
from lorax_core.scaffold.tiny import LAYERS, WINDOW

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
TYPES: Final = "layer_types"
_DEPTHS = (1, 2, 3, 5, 8, 12)


@dataclass(frozen=True)
class Rule:
    """Which layers slide where a file does not say: `all`, `none`, all but each `every`-th, or from the field `first` on."""

    kind: str
    every: int = 0
    first: str = ""

    def types(self, layers: int, first: int) -> list[str]:
        """The types of that many layers."""
        match self.kind:
            case "every":
                slides = [bool((at + 1) % self.every) for at in range(layers)]
            case "first":
                slides = [at >= first for at in range(layers)]
            case _:
                slides = [self.kind == "all"] * layers
        return [SLIDING if one else FULL for one in slides]


@dataclass(frozen=True)
class Windows:
    """The `field` that holds the window, the switch without which it does not count, and whether `layer_types` choose layers.

    `gate_clears` says that transformers sets the field to None without the switch. `rule` is None where a file must state
    `layer_types`. `more` is added to the field: how many keys a query sees.
    """

    field: str
    default: int | None
    gate: str | None
    gate_default: bool
    gate_clears: bool
    by_layer: bool
    rule: Rule | None
    first_default: int
    more: int
    nullable: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that decide windows."""
        first = self.rule.first if self.rule else ""
        return tuple(filter(None, (self.field, self.gate, TYPES if self.by_layer else "", first)))

    def context(self, types: Sequence[str] = (SLIDING,) * LAYERS) -> dict[str, Any]:
        """Changes to the tiny configuration under which layers slide."""
        found: dict[str, Any] = {self.field: WINDOW}
        if self.gate:
            found[self.gate] = True
        if self.by_layer:
            found[TYPES] = list(types)
        return found


def find_windows(probe: Probe) -> Windows | None:
    """How windows are stated, None where no field makes one.

    Raises NotUnderstood where a window is not that of core's attention for the layers that should have it.
    """
    tiny = probe.tiny
    by_layer = TYPES in tiny.defaults
    for field, gate in _candidates(probe):
        types = {TYPES: [SLIDING] * LAYERS} if by_layer else {}
        switched = {gate: True} if gate else {}
        outcome = probe.of({field: WINDOW, **types, **switched})
        if outcome.facts is None or set(outcome.facts.windows) not in ({WINDOW}, {WINDOW + 1}):
            continue
        more = int(outcome.facts.windows[0] or 0) - WINDOW
        kind = tiny.source.config_class
        default = default_of(kind, field, tiny.defaults[field])
        clears = gate is not None and getattr(tiny.config(**{field: WINDOW, gate: False}), field) is None
        on = bool(gate and tiny.defaults[gate])
        nullable = "None" in hint_of(kind, field)
        found = Windows(field, default, gate, on, clears, by_layer, None, 0, more, nullable)
        if by_layer:
            _see_layers(probe, found)
            rule, first = _rule(probe, found)
            return dataclasses.replace(found, rule=rule, first_default=first)
        return found
    return None


def _candidates(probe: Probe) -> Iterator[tuple[str, str | None]]:
    defaults, kind = probe.tiny.defaults, probe.tiny.source.config_class
    # Widths of tensors cannot be windows; neither can ids of tokens.
    counts = [
        name
        for name in defaults
        if "int" in hint_of(kind, name) and name not in probe.tiny.fields and not name.endswith("_token_id")
    ]
    switches = [name for name, value in defaults.items() if isinstance(value, bool) and hint_of(kind, name)]
    likely = sorted(counts, key=lambda name: "window" not in name)
    yield from ((name, gate) for gate in (None, *switches) for name in likely)


def _see_layers(probe: Probe, windows: Windows) -> None:
    for types in ((SLIDING, FULL), (FULL, SLIDING)):
        outcome = probe.of(windows.context(types))
        wanted = tuple(WINDOW + windows.more if one == SLIDING else None for one in types)
        if outcome.facts is None or outcome.facts.windows != wanted:
            raise NotUnderstood(
                [f"layer_types {list(types)} do not give windows {wanted}: {outcome.problem or 'other ones'}"]
            )


def _rule(probe: Probe, windows: Windows) -> tuple[Rule | None, int]:
    """The rule that gives the types of layers that transformers derives, and the default of the field that it reads."""
    defaults = probe.tiny.defaults
    counts = [name for name, value in defaults.items() if type(value) is int and "layers" in name]
    counts = [name for name in counts if name != probe.tiny.spelt("num_hidden_layers")]
    plain = [Rule("none"), Rule("all"), *(Rule("every", every=size) for size in range(2, 9))]
    # Those with a field first: under its default it may look like one without.
    for rule in (*(Rule("first", first=name) for name in counts), *plain):
        if _derives(probe, windows, rule):
            return rule, int(defaults.get(rule.first, 0))
    return None, 0


def _derives(probe: Probe, windows: Windows, rule: Rule) -> bool:
    first = rule.first
    for layers in _DEPTHS:
        for start in (0, 1, 3) if first else (0,):
            changes: dict[str, Any] = {probe.tiny.spelt("num_hidden_layers"): layers, windows.field: WINDOW}
            changes |= {windows.gate: True} if windows.gate else {}
            changes |= {first: start} if first else {}
            if _types(probe, changes) != rule.types(layers, start):
                return False
            off = {**changes, windows.gate: False} if windows.gate else None
            if off is not None and _types(probe, off) != [FULL] * layers:
                return False
    return True


def _types(probe: Probe, changes: Values) -> list[str] | None:
    try:
        found = probe.tiny.config(**changes).layer_types
    except Exception:  # transformers refuses it
        return None
    return None if found is None else list(found)
