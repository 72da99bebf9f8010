"""All that is written into a package: what was observed, which fields decide it, which heads there are, and variants to test.

Decides which tasks a package has and which variants the conformance kit tests it with; every variant was computed and
understood once before it is written. Knows nothing of how files look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from lorax_core.modeling.rope import read_rope
from lorax_core.plugins.cases import HEAD_SIZES
from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.facts import Facts
from lorax_core.scaffold.fields import Field, find_fields
from lorax_core.scaffold.heads import HeadFacts, find_heads, refuse_in_heads
from lorax_core.scaffold.probe import Probe, refusal
from lorax_core.scaffold.record import observe, same
from lorax_core.scaffold.source import Source
from lorax_core.scaffold.tiny import HEAD_DIM, HEADS, POSITIONS, SPREAD, WIDTH, WINDOW, Tiny
from lorax_core.scaffold.windows import FULL, SLIDING, TYPES, Windows, find_windows
from lorax_core.types import Task

FORMULAS: Final[Mapping[str, Callable[[int, int], int]]] = {
    "{num_attention_heads}": lambda _, heads: heads,
    "{hidden_size} // {num_attention_heads}": lambda hidden, heads: hidden // heads,
    "4 * {hidden_size}": lambda hidden, _: 4 * hidden,
    "{hidden_size}": lambda hidden, _: hidden,
}
"""How transformers derives a size that a file leaves out, and what that gives of the width and the number of heads."""
POST_NORM: Final = {
    "intermediate_size": "intermediate",
    "hidden_act": "act",
    "layer_norm_eps": "norm_eps",
    "type_vocab_size": "types",
}
"""Fields of `PostNormConfig`, and the facts that they decide in core's encoder."""
_WIDTHS: Final = ((WIDTH, HEADS), (WIDTH, 2 * HEADS), (2 * WIDTH, HEADS), (3 * WIDTH, 2 * HEADS))
_ROPES: Final = {
    "linear_rope": {"rope_type": "linear", "factor": 4.0},
    "dynamic_rope": {"rope_type": "dynamic", "factor": 4.0},
    "yarn_rope": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 40},
    "llama3_rope": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@dataclass(frozen=True)
class RotaryFacts:
    """RotaryFacts parameters by default, and whether a fraction of heads that a file states is read."""

    theta: float
    partial: float
    reads_partial: bool


@dataclass
class Blueprint:
    """One architecture, understood.

    `derived` are formulas of `FORMULAS` by field.
    """

    source: Source
    tiny: Tiny
    facts: Facts
    fields: Mapping[str, Field]
    windows: Windows | None
    rotary: RotaryFacts | None
    names: Mapping[str, str]
    derived: Mapping[str, str]
    heads: HeadFacts
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tiny_config(self) -> dict[str, Any]:
        """The configuration that the kit tests most: where windows need no switch, with one that is left by short texts."""
        windows, found = self.windows, dict(self.tiny.fields)
        if windows is not None and windows.gate is None and windows.default is not None:
            found[windows.field] = WINDOW
        scale = self.facts.layer.scale
        if self.encodes and not self.post_norm:
            # Rows that see both sides, and are normalised by no layer, magnify rounding as well.
            found["initializer_range"] = SPREAD / 2
        elif scale > 1.01 * self.facts.layer.head_dim**-0.5:
            # Large scores magnify rounding: weights by which those of the largest heads are as with the usual scale.
            found["initializer_range"] = round(SPREAD * math.sqrt(max(HEAD_SIZES) ** -0.5 / scale), 2)
        return found

    @property
    def read(self) -> dict[str, Field]:
        """Fields that a block computes with."""
        return {name: one for name, one in self.fields.items() if one.binds}

    @property
    def refused(self) -> dict[str, Field]:
        """Fields that may have their default alone."""
        return {name: one for name, one in self.fields.items() if one.refused}

    @property
    def encodes(self) -> bool:
        """Whether rows depend on later tokens too."""
        return not self.facts.layer.causal

    @property
    def post_norm(self) -> bool:
        """Whether it is written on core's `PostNormEncoder`; all else is a `Decoder`, those that see both sides too."""
        return self.facts.layer.norms == "post"

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the architecture supports."""
        return tuple(
            task for task in Task if task in self.source.classes and (task in self.heads.layers or task is Task.EMBED)
        )

    def decides(self, fact: str) -> tuple[Field, str] | None:
        """The field that decides a fact, and how; the one with the fewest others before those that decide much."""
        found = [one for one in self.read.values() if fact in one.binds]
        heads = self.tiny.spelt("num_attention_heads")
        best = min(found, key=lambda one: (one.name == heads, len(one.binds)), default=None)
        return None if best is None else (best, best.binds[fact])

    @property
    def features(self) -> tuple[str, ...]:
        """What a declaration says of variants."""
        return (
            *(["token_types"] if self.facts.types else []),
            *(["tied_embeddings"] if self.decides("tied") else []),
            *(["sliding_window"] if self.windows else []),
        )


def understand(source: Source) -> Blueprint:
    """What is needed to write a package; raises NotUnderstood, with all that was seen, where core's blocks do not do."""
    tiny = Tiny(source)
    encodes = _looks_ahead(tiny)
    if encodes and Task.GENERATE in source.classes:
        source = _without_generation(source)
        tiny = Tiny(source)
    elif not encodes and Task.GENERATE not in source.classes:
        raise NotUnderstood(
            [f"transformers has no causal language model of {source.model_type!r}, whose rows see no later ones"]
        )
    probe = Probe(tiny)
    facts = probe.base()
    if not encodes and facts.layer.norms == "post":
        raise NotUnderstood(
            [f"{source.model_type!r} normalises after its residuals, and its rows do not see later ones"]
        )
    # Windows to both sides are not written: a field that makes one is refused.
    windows = None if encodes else find_windows(probe)
    contexts = [windows.context()] if windows else []
    fields = find_fields(probe, windows.fields if windows else (), contexts)
    acts = {name: one.tried[0] for name, one in fields.items() if "act" in one.binds}
    heads = find_heads(tiny, facts.beside, acts)
    refuse_in_heads(tiny, fields, heads.layers if encodes else ())
    plan = Blueprint(
        source, tiny, facts, fields, windows, _rotary(probe, facts), _names(probe, facts, fields),
        dict(_derived(probe, fields)), heads,
    )  # fmt: skip
    problems = list(_not_written(plan, probe))
    if problems:
        raise NotUnderstood(problems)
    plan.variants = {name: dict(changes) for name, changes in _variants(plan, probe)}
    return plan


def _looks_ahead(tiny: Tiny) -> bool:
    """Whether the first row depends on the last token."""
    try:
        config = tiny.config()
        model, ids = tiny.model(config, tiny.source.classes[Task.EMBED]), tiny.ids(config)
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
        one, another = (observe(model, tokens).hidden for tokens in (ids, other))
    except Exception as error:  # whatever transformers raises
        raise NotUnderstood([refusal(error)]) from error
    return not same(one[:1], another[:1])


def _without_generation(source: Source) -> Source:
    """An encoder's classes: that of a language model is one whose head core has no task for."""
    classes: dict[Task, Any] = {task: kind for task, kind in source.classes.items() if task is not Task.GENERATE}
    return replace(source, classes=classes, others=(source.classes[Task.GENERATE], *source.others))


def _not_written(plan: Blueprint, probe: Probe) -> Iterator[str]:
    """What was understood, and is more than a generated package says."""
    layer, windows = plan.facts.layer, plan.windows
    if plan.post_norm:
        yield from _not_post_norm(plan, probe)
    if plan.decides("intermediate") is None:
        yield "no field decides how wide feed-forward blocks are"
    if layer.up_bias != layer.down_bias or plan.decides("up_bias") != plan.decides("down_bias"):
        yield "of the layers of a feed-forward block, some have a bias"
    if windows is not None and windows.more and not windows.by_layer:
        yield f"a window of {windows.field} and {windows.more} more"


def _not_post_norm(plan: Blueprint, probe: Probe) -> Iterator[str]:
    """What an encoder computes otherwise than a `PostNormEncoder`."""
    layer, facts, tiny = plan.facts.layer, plan.facts, plan.tiny
    usual = {
        "norm_kind": "layer", "norm_weight": True, "norm_bias": True, "kv_heads": layer.heads, "rotary": False,
        "soft_cap": None, "qk_norm": None, "qkv_bias": True, "out_bias": True, "gate": False, "up_bias": True,
        "down_bias": True, "head_dim": WIDTH // layer.heads, "scale": HEAD_DIM**-0.5, "embed_scale": 1.0,
    }  # fmt: skip
    found = facts.flat()
    yield from (
        f"{name} {found[name]!r} in an encoder, where core's has {value!r}"
        for name, value in usual.items()
        if found[name] != value
    )
    if facts.positions != POSITIONS or facts.position_offset not in (None, 0):
        yield "a table of positions that is not of max_position_embeddings rows, or is read from another row than its first"
    for name, fact in POST_NORM.items():
        if name in plan.refused or (name in plan.read and fact not in plan.read[name].binds):
            yield f"{name}, which does something else in core's encoder"
    types = plan.decides("types")
    if facts.types and (types is None or types[0].name != "type_vocab_size"):
        yield "token types whose number type_vocab_size does not decide"
    for padding in (0, 5) if facts.after_padding else ():
        other = probe.of({"pad_token_id": padding}).facts
        if other is None or not other.after_padding:
            yield f"positions that are counted otherwise with pad_token_id {padding}"
    for name in tiny.equal:
        if probe.of({tiny.spelt("hidden_size"): 2 * WIDTH, name: 2 * WIDTH}).facts is None:
            yield f"{name}, which does not only widen embeddings"


def _names(probe: Probe, facts: Facts, fields: Mapping[str, Field]) -> dict[str, str]:
    """Names of modules, those too that only other values bring."""
    found: dict[str, str] = {}
    for one in fields.values():
        for value in one.tried:
            other = probe.of({one.name: value}).facts
            found |= other.names if other is not None else {}
    return {**found, **facts.names}


def _rotary(probe: Probe, facts: Facts) -> RotaryFacts | None:
    if facts.rotary_dim is None:
        return None
    rope = read_rope(dict(probe.tiny.defaults))
    half = probe.of({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}})
    reads = half.facts is not None and half.facts.rotary_dim == facts.layer.head_dim // 4
    return RotaryFacts(float(rope["theta"]), float(rope["partial"]), reads)


def _derived(probe: Probe, fields: Mapping[str, Field]) -> Iterator[tuple[str, str]]:
    """The formula of each field that transformers fills in where a file says nothing, or null."""
    for name, one in fields.items():
        if type(one.default) not in (int, type(None)) or one.inert:
            continue
        for formula, compute in FORMULAS.items():
            if all(_gives(probe, one, compute(hidden, heads), hidden, heads) for hidden, heads in _WIDTHS):
                yield name, formula
                break


def _gives(probe: Probe, one: Field, wanted: int, hidden: int, heads: int) -> bool:
    """Whether a field that is null, or not there, comes to a number."""
    tiny = probe.tiny
    sizes = {tiny.spelt("hidden_size"): hidden, tiny.spelt("num_attention_heads"): heads}
    # One that the class does not have is left out: some code reads a null of it as a number.
    absent = {one.name: None} if one.name in tiny.defaults else {}
    try:
        config = tiny.source.config_class(**{**tiny.fields, **sizes, **absent})
        value = getattr(config, one.name, None)
    except Exception:  # it takes no null
        return False
    if value is None:
        fact = next((name for name in one.binds if name in ("intermediate", "kv_heads", "head_dim")), None)
        facts = probe.of({**sizes, **absent}).facts
        value = facts.flat()[fact] if facts is not None and fact is not None else None
    return value == wanted and type(value) is int


def _variants(plan: Blueprint, probe: Probe) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the kit tests beside the tiny configuration: every decision of the code taken otherwise, once."""
    for one in plan.read.values():
        yield from _of_field(one)
    if plan.windows is not None:
        yield from _of_windows(plan.windows)
    if plan.rotary is not None:
        yield from _of_rotary(plan.rotary, probe)
    if plan.tiny.defaults.get("pad_token_id") != 0:
        yield "padding", {"pad_token_id": 0}
    if plan.facts.after_padding:
        yield "late_padding", {"pad_token_id": 5}
    if plan.tiny.equal:
        yield from _of_head_sizes(plan.tiny)
    yield "odd_vocabulary", {plan.tiny.spelt("vocab_size"): 131}


def _of_field(one: Field) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # A default may be left out of a file, and sizes that core itself reads may not.
    first = next((value for value in one.tried if value != one.default), None)
    for value in one.tried:
        match value:
            case bool():
                words = {("tied", True): "tied", ("tied", False): "untied"}
                usual = one.name if value else f"no_{one.name}"
                yield (
                    next((words[fact, value] for fact in one.binds if (fact, value) in words), usual),
                    {one.name: value},
                )
            case str() if value == first:
                yield value, {one.name: value}
            case None if "soft_cap" in one.binds or "logit_cap" in one.binds:
                yield f"no_{one.name}", {one.name: None}
            case _ if value is not None and value == first and "head_dim" not in one.binds:
                # The kit adds sizes of heads itself.
                yield f"other_{one.name}", {one.name: value}


def _of_head_sizes(tiny: Tiny) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Heads of other sizes, which the kit adds itself where the width of hidden rows is that of nothing else."""
    width, heads = tiny.spelt("hidden_size"), tiny.spelt("num_attention_heads")
    for size in HEAD_SIZES:
        if size != HEAD_DIM:
            # Neither is the default, for core reads both from the file.
            count = next(
                one for one in (HEADS, 3, 5) if one * size != tiny.defaults[width] and one != tiny.defaults[heads]
            )
            wide = count * size
            yield f"heads_of_{size}", {width: wide, heads: count, **dict.fromkeys(tiny.equal, wide)}


def _of_windows(windows: Windows) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "windows", windows.context()
    if windows.by_layer:
        yield "window_by_layer_type", windows.context((FULL, SLIDING))
        yield "no_window", {TYPES: [FULL, FULL]}
    elif windows.default is not None and windows.nullable:
        yield "no_window", {windows.field: None}
    if windows.rule and windows.rule.first:
        without = {name: value for name, value in windows.context().items() if name != TYPES}
        yield "window_in_the_last_layer", {**without, windows.rule.first: 1}
    if windows.gate:
        yield "window_switched_off", {**windows.context((FULL, FULL)), windows.gate: False}


def _of_rotary(rotary: RotaryFacts, probe: Probe) -> Iterator[tuple[str, Mapping[str, Any]]]:
    more = {"partial_rotary_factor": rotary.partial} if rotary.reads_partial else {}
    ropes: dict[str, dict[str, Any]] = {
        "other_base": {"rope_type": "default", "rope_theta": 2 * rotary.theta},
        **_ROPES,
    }
    for name, rope in ropes.items():
        changes: dict[str, Any] = {"rope_parameters": {"rope_theta": rotary.theta, **rope, **more}}
        if name == "dynamic_rope":
            # Past its length, cached keys would have to turn again.
            changes[probe.tiny.spelt("max_position_embeddings")] = 48
        if probe.of(changes).facts is not None:
            yield name, changes
    if rotary.reads_partial:
        other = 0.25 if rotary.partial != 0.25 else 0.5
        yield (
            "other_rotary_fraction",
            {"rope_parameters": {"rope_type": "default", "rope_theta": rotary.theta, "partial_rotary_factor": other}},
        )
