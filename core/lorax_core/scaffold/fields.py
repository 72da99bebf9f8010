"""What each field of a configuration is for: read by a block, without effect, or not understood.

Decides by trying other values: a field is read where every fact that changes is a simple function of its value. What changes
the answers in any other way is not understood, and a package refuses it by name. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from lorax_core.scaffold.facts import Facts
from lorax_core.scaffold.probe import Outcome, Probe, Values, default_of, hint_of, other_values
from lorax_core.scaffold.tiny import COMMON

Form = Literal["is", "root", "flag"]
"""How a fact follows from a field: it is its value, one over the root of it, or there when it is true."""

ROTARY: Final = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
# What a generated package can make depend on a field; any other fact is the same in all checkpoints.
_BOUND: Final = {
    "norm_eps", "norm_weight", "norm_bias", "heads", "kv_heads", "head_dim", "scale", "soft_cap", "qk_norm", "qkv_bias",
    "out_bias", "act", "up_bias", "down_bias", "intermediate", "logit_cap", "tied", "parallel", "embed_scale", "types",
}  # fmt: skip
_SIZES: Final = ("intermediate", "kv_heads", "head_dim")


@dataclass
class Field:
    """One field: its type and default in transformers, the facts that it decides and how, and values that were understood.

    `harmless` are values that change nothing; with no `binds` and not `inert`, the field may have only those.
    """

    name: str
    hint: str
    default: Any
    binds: dict[str, Form] = field(default_factory=dict)
    tried: list[Any] = field(default_factory=list)
    harmless: list[Any] = field(default_factory=list)
    inert: bool = False
    why: str | None = None

    @property
    def refused(self) -> bool:
        """Whether a package must refuse other values."""
        return not self.inert and not self.binds


def find_fields(probe: Probe, aside: Collection[str], contexts: Sequence[Values]) -> dict[str, Field]:
    """Every field of the configuration, by name, but for those in `aside` that are dealt with elsewhere.

    A field that has no effect by itself is tried again under each of `contexts`, and under each switch.
    """
    tiny = probe.tiny
    names = [name for name in (*tiny.defaults, *tiny.source.unlisted) if name not in COMMON and name not in aside]
    sizes = {tiny.spelt(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    found, base = {}, probe.of({}).facts
    for name in dict.fromkeys(names):
        if name in sizes or name.endswith("_token_id") or name in (*map(tiny.spelt, ROTARY), *ROTARY):
            continue
        hint = hint_of(tiny.source.config_class, name) or ("" if name in tiny.defaults else _unlisted_hint(base, name))
        default = default_of(tiny.source.config_class, name, tiny.defaults.get(name))
        found[name] = _tried(probe, Field(name, hint, default), {})
    _see_together(probe, found, contexts)
    return found


def _unlisted_hint(facts: Facts | None, name: str) -> str:
    """The type of a field that no class states: that of the fact of its name, if there is one."""
    return "int" if facts is not None and type(facts.flat().get(name)) is int else "bool | int"


def differences(one: Facts, other: Facts) -> dict[str, tuple[Any, Any]]:
    """The facts in which two models differ, by name."""
    mine, theirs = one.flat(), other.flat()
    return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def _tried(probe: Probe, found: Field, context: Values) -> Field:
    """A field after its other values were tried in some context."""
    base = probe.of(context)
    value = _effective(probe, context, found.name)
    outcomes = [(other, probe.of({**context, found.name: other})) for other in other_values(value, found.hint)]
    taken = [(other, outcome) for other, outcome in outcomes if outcome.record is not None]
    if not taken:
        found.why = "no other value could be tried"
        return found
    effective = [(other, outcome) for other, outcome in taken if not outcome.is_same(base)]
    found.harmless = [other for other, outcome in taken if outcome.is_same(base)]
    found.inert = not effective
    assert base.facts is not None
    binds: dict[str, Form] = {}
    if value is None and found.name not in probe.tiny.defaults:
        value = base.facts.flat().get(found.name)  # read where it is stated, and derived where it is not
    for other, outcome in effective:
        problem = bind(binds, base.facts, value, outcome, _effective(probe, {**context, found.name: other}, found.name))
        if problem is not None:
            found.binds, found.tried, found.why = {}, [], f"{other!r}: {problem}"
            return found
        found.tried.append(other)
    found.binds = binds
    # An activation, say, for which transformers takes another one.
    surprising = [one for one in found.harmless if one is not None and binds]
    if surprising:
        found.binds, found.tried = {}, []
        found.why = f"{surprising[0]!r} means the same as {value!r}, where other values do not"
    return found


def _effective(probe: Probe, context: Values, name: str) -> Any:
    """A field's value once transformers has derived what a file leaves out."""
    return getattr(probe.tiny.config(**context), name, None)


def bind(binds: dict[str, Form], facts: Facts, value: Any, outcome: Outcome, other: Any) -> str | None:
    """Adds how facts follow from the value of a field; gives what is not understood, None when all is."""
    if outcome.facts is None:
        return outcome.problem
    changed = differences(facts, outcome.facts)
    direct = 0
    for name, (before, after) in changed.items():
        # A field that is not stated may stand for a size that transformers derives from others.
        given = before if value is None and name in _SIZES else value
        form = next(_forms(given, before, other, after), None) if name in _BOUND else None
        if form is not None and binds.setdefault(name, form) == form:
            direct += 1
        elif not _follows(name, facts, outcome.facts):
            return f"{name} becomes {after!r}"
    return None if direct else "answers change, and nothing that core's blocks know of"


def _follows(name: str, before: Facts, after: Facts) -> bool:
    """Whether a fact changes as core's blocks change it, because another one did: the size of heads with their number, say."""

    def kept(ratio: Callable[[Facts], object]) -> bool:
        return ratio(before) == ratio(after)

    match name:
        case "head_dim":
            return kept(lambda facts: facts.layer.heads * facts.layer.head_dim)
        case "kv_heads":
            return kept(lambda facts: facts.layer.heads // facts.layer.kv_heads)
        case "scale":
            return kept(lambda facts: round(facts.layer.scale**2 * facts.layer.head_dim, 6))
        case "rotary_dim":
            return kept(lambda facts: (facts.rotary_dim or 0) / facts.layer.head_dim)
        case "names":
            # Modules may come and go, and none is called otherwise.
            return all(after.names.get(core, theirs) == theirs for core, theirs in before.names.items())
    return False


def _forms(value: Any, before: Any, other: Any, after: Any) -> Iterator[Form]:
    pairs = ((value, before), (other, after))
    if all(_equal(given, fact) for given, fact in pairs):
        yield "is"
    if all(_number(given) and _number(fact) and math.isclose(fact, given**-0.5, rel_tol=1e-6) for given, fact in pairs):
        yield "root"
    if all(isinstance(given, bool) and given == bool(fact) for given, fact in pairs):
        yield "flag"


def _equal(given: Any, fact: Any) -> bool:
    if isinstance(given, bool) or isinstance(fact, bool) or given is None or isinstance(given, str):
        return type(given) is type(fact) and bool(given == fact)
    return _number(fact) and _number(given) and math.isclose(given, fact, rel_tol=1e-9)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _see_together(probe: Probe, found: dict[str, Field], contexts: Sequence[Values]) -> None:
    """Fields without effect are tried again where others have other values: some count only then."""
    flags = [
        {name: value}
        for name, one in found.items()
        for value in (*one.tried, *one.harmless)
        if isinstance(value, bool) and not one.refused
    ]
    for context in (*contexts, *flags):
        base = probe.of(context)
        if base.facts is None:
            continue
        silent = {one.name: one for one in found.values() if one.inert and one.name not in context and one.harmless}
        together = {name: one.harmless[0] for name, one in silent.items()}
        if probe.of({**context, **together}).is_same(base):
            continue
        for one in silent.values():
            if not probe.of({**context, one.name: one.harmless[0]}).is_same(base):
                found[one.name] = _tried(probe, Field(one.name, one.hint, one.default), context)
