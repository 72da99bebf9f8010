"""All that is written into a package: what was observed, which fields decide it, which heads there are, and variants to test.

Decides which tasks a package has and which variants the conformance kit tests it with; every variant was computed and
understood once before it is written. Knows nothing of how files look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from torch import nn

from lorax_core.modeling.rope import read_rope
from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.facts import Facts
from lorax_core.scaffold.fields import Field, find_fields
from lorax_core.scaffold.probe import Probe
from lorax_core.scaffold.source import Source
from lorax_core.scaffold.tiny import HEADS, WIDTH, WINDOW, Tiny
from lorax_core.scaffold.windows import FULL, SLIDING, TYPES, Windows, find_windows
from lorax_core.types import Task

FORMULAS: Final[Mapping[str, Callable[[int, int], int]]] = {
    "{num_attention_heads}": lambda _, heads: heads,
    "{hidden_size} // {num_attention_heads}": lambda hidden, heads: hidden // heads,
    "4 * {hidden_size}": lambda hidden, _: 4 * hidden,
    "{hidden_size}": lambda hidden, _: hidden,
}
"""How transformers derives a size that a file leaves out, and what that gives of the width and the number of heads."""
_WIDTHS: Final = ((WIDTH, HEADS), (WIDTH, 2 * HEADS), (2 * WIDTH, HEADS), (3 * WIDTH, 2 * HEADS))
_STEEP: Final = 0.5
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

    `derived` are formulas of `FORMULAS` by field. `heads` are the names of layers that classify, by task; `ignored` those of
    heads that core has no task for.
    """

    source: Source
    tiny: Tiny
    facts: Facts
    fields: Mapping[str, Field]
    windows: Windows | None
    rotary: RotaryFacts | None
    names: Mapping[str, str]
    derived: Mapping[str, str]
    heads: Mapping[Task, str]
    ignored: tuple[str, ...]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tiny_config(self) -> dict[str, Any]:
        """The configuration that the kit tests most: where windows need no switch, with one that is left by short texts."""
        windows, found = self.windows, dict(self.tiny.fields)
        if windows is not None and windows.gate is None and windows.default is not None:
            found[windows.field] = WINDOW
        if self.facts.layer.scale > _STEEP:
            # Unscaled scores magnify rounding: smaller weights keep them small.
            found["initializer_range"] = 0.1
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
    def tasks(self) -> tuple[Task, ...]:
        """What the architecture supports."""
        return tuple(
            task for task in Task if task in self.source.classes and (task in self.heads or task is Task.EMBED)
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
        return (*(["tied_embeddings"] if self.decides("tied") else []), *(["sliding_window"] if self.windows else []))


def understand(source: Source) -> Blueprint:
    """What is needed to write a package; raises NotUnderstood, with all that was seen, where core's blocks do not do."""
    if Task.GENERATE not in source.classes:
        raise NotUnderstood(
            [f"transformers has no causal language model of {source.model_type!r}, and only decoders are written"]
        )
    probe = Probe(Tiny(source))
    facts = probe.base()
    if not facts.layer.causal:
        raise NotUnderstood([f"{source.model_type!r} attends to later tokens"])
    windows = find_windows(probe)
    contexts = [windows.context()] if windows else []
    fields = find_fields(probe, windows.fields if windows else (), contexts)
    heads, ignored = _heads(probe.tiny)
    plan = Blueprint(
        source, probe.tiny, facts, fields, windows, _rotary(probe, facts), _names(probe, facts, fields),
        dict(_derived(probe, fields)), heads, ignored,
    )  # fmt: skip
    problems = list(_not_written(plan))
    if problems:
        raise NotUnderstood(problems)
    plan.variants = {name: dict(changes) for name, changes in _variants(plan, probe)}
    return plan


def _not_written(plan: Blueprint) -> Iterator[str]:
    """What was understood, and is more than a generated package says."""
    layer, windows = plan.facts.layer, plan.windows
    if plan.decides("intermediate") is None:
        yield "no field decides how wide feed-forward blocks are"
    if layer.up_bias != layer.down_bias or plan.decides("up_bias") != plan.decides("down_bias"):
        yield "of the layers of a feed-forward block, some have a bias"
    if windows is not None and windows.more and not windows.by_layer:
        yield f"a window of {windows.field} and {windows.more} more"


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


def _heads(tiny: Tiny) -> tuple[dict[Task, str], tuple[str, ...]]:
    """The layer of each task's head, and the modules of heads that core does not have."""
    found: dict[Task, str] = {}
    ignored: dict[str, None] = {}
    wanted = {
        Task.GENERATE: ({"weight"}, {"weight", "bias"}),
        Task.TOKEN_CLASSIFICATION: ({"weight", "bias"},),
        Task.SEQUENCE_CLASSIFICATION: ({"weight"},),
    }
    for kind in (*tiny.source.classes.values(), *tiny.source.others):
        task = next((task for task, one in tiny.source.classes.items() if one is kind), None)
        try:
            outside = _outside(tiny.model(kind=kind))
        except Exception as error:
            raise NotUnderstood([f"{kind.__name__} cannot be made: {error}"]) from error
        layers = {name.rpartition(".")[0] for name in outside}
        leaves = {name.rpartition(".")[2] for name in outside}
        if task in wanted and len(layers) == 1 and leaves in wanted[task]:
            (found[task],) = layers
        elif task is not Task.EMBED:
            ignored |= dict.fromkeys(sorted(name.partition(".")[0] for name in layers))
    if found.get(Task.SEQUENCE_CLASSIFICATION, "score") != "score":
        ignored[found.pop(Task.SEQUENCE_CLASSIFICATION)] = None
    known = {name.partition(".")[0] for name in found.values()}
    return found, tuple(f"{name}.**" for name in ignored if name not in known)


def _outside(model: nn.Module) -> list[str]:
    """The tensors of a model that are not of its base model."""
    inside = {id(one) for one in cast("nn.Module", model.base_model).parameters()}
    return [
        name for name, one in model.named_parameters(remove_duplicate=False) if id(one) not in inside or "head" in name
    ]


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
    yield "odd_vocabulary", {plan.tiny.spelt("vocab_size"): 131}


def _of_field(one: Field) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for value in one.tried:
        match value:
            case bool():
                words = {("tied", True): "tied", ("tied", False): "untied"}
                usual = one.name if value else f"no_{one.name}"
                yield (
                    next((words[fact, value] for fact in one.binds if (fact, value) in words), usual),
                    {one.name: value},
                )
            case str() if value == one.tried[0]:
                yield value, {one.name: value}
            case None if "soft_cap" in one.binds or "logit_cap" in one.binds:
                yield f"no_{one.name}", {one.name: None}
            case _ if value is not None and value == one.tried[0] and "head_dim" not in one.binds:
                # The kit adds sizes of heads itself.
                yield f"other_{one.name}", {one.name: value}


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
