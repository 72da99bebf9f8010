"""The text of a package's `config.py`.

Decides how fields are declared, which are filled in where a file leaves them out, and which are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lorax_core.modeling.encoder import PostNormConfig
from lorax_core.scaffold.blueprint import POST_NORM, Blueprint
from lorax_core.scaffold.code import imported, literal, raised
from lorax_core.scaffold.fields import Field
from lorax_core.scaffold.windows import FULL, SLIDING, TYPES, Windows

_COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Fields that `ModelConfig` has."""


def config_text(plan: Blueprint) -> str:
    """`config.py`."""
    fields = _encoder_fields(plan) if plan.post_norm else _fields(plan)
    # A PostNormConfig has its own `max_tokens`.
    properties = () if plan.post_norm else _properties(plan)
    body = "\n".join([*_head(plan), "", *fields, *_normalise(plan), *_validators(plan), *properties])
    typing = [name for name in ("Any", "ClassVar", "Literal", "Self") if uses(body, name)]
    if uses(body, "LayerType"):
        typing = sorted({*typing, "Literal"})
    lines = [
        f'"""What the `config.json` of a checkpoint of {plan.source.stem} says."""',
        "",
        "from __future__ import annotations",
        "",
    ]
    if uses(body, "Mapping"):
        lines.append("from collections.abc import Mapping")
    if typing:
        lines.append(f"from typing import {', '.join(typing)}")
    pydantic = [name for name in ("Field", "PositiveInt", "model_validator") if uses(body, name)]
    ours = [name for name in ("ModelConfig", "PostNormConfig", "Rope", "read_rope") if uses(body, name)]
    lines += ["", imported("pydantic", pydantic)] if pydantic else []
    lines += ["", imported("lorax_core.modeling", ours), ""]
    if uses(body, "LayerType"):
        lines += [f"LayerType = Literal[{literal(FULL)}, {literal(SLIDING)}]", ""]
    return "\n".join([*lines, "", body, ""])


def uses(body: str, name: str) -> bool:
    """Whether some code has a name."""
    return re.search(rf"\b{name}\b", body) is not None


def _head(plan: Blueprint) -> Iterator[str]:
    yield f"class {plan.source.stem}Config({'PostNormConfig' if plan.post_norm else 'ModelConfig'}):"
    yield '    """The fields that inference needs; defaults are those of transformers."""'
    names = (*_COMMON, "max_position_embeddings", *(POST_NORM if plan.post_norm else ["num_key_value_heads"]))
    aliases = {plan.tiny.spelt(name): name for name in names if plan.tiny.spelt(name) != name}
    if aliases:
        yield ""
        yield f"    aliases: ClassVar[Mapping[str, str]] = {literal(aliases, 4, 46)}"
    own = {one.name: common for common, (one, _) in _post_norm_fields(plan) if one.name not in (common, *aliases)}
    if own:
        yield from () if aliases else ("",)
        yield f"    own_keys: ClassVar[Mapping[str, str]] = {literal(own, 4, 46)}"
    if plan.facts.after_padding:
        yield ""
        yield "    positions_after_padding: ClassVar[bool] = True"
    if "head_dim" in plan.read:
        yield ""
        yield "    own_head_dim: ClassVar[bool] = True"


def _fields(plan: Blueprint) -> Iterator[str]:
    """Declarations, in the order of transformers' class."""
    tiny, windows = plan.tiny, plan.windows
    pad = tiny.defaults.get("pad_token_id")
    if pad is not None:
        yield f"    pad_token_id: int | None = {pad}"
    for name in (*tiny.defaults, *(name for name in plan.fields if name not in tiny.defaults)):
        if name == tiny.spelt("max_position_embeddings"):
            yield f"    max_position_embeddings: PositiveInt = {tiny.defaults[name]}"
        elif windows is not None and name in windows.fields:
            yield f"    {_window_field(windows, name)}"
        elif name == "tie_word_embeddings" and tiny.defaults[name]:
            yield "    tie_word_embeddings: bool = True"
        elif name in plan.read and name not in (*map(tiny.spelt, _COMMON), "tie_word_embeddings"):
            yield f"    {_read_field(plan, plan.read[name])}"
        elif name in plan.refused:
            yield f"    {_refused_field(plan, name)}"
    if plan.rotary is not None:
        yield "    rope: Rope"


def _post_norm_fields(plan: Blueprint) -> list[tuple[str, tuple[Field, str]]]:
    """The fields of `PostNormConfig` that some field decides, with that one."""
    decided = [(common, plan.decides(fact)) for common, fact in POST_NORM.items() if plan.post_norm]
    return [(common, one) for common, one in decided if one is not None]


def _encoder_fields(plan: Blueprint) -> Iterator[str]:
    """What differs from `PostNormConfig`, in the order of transformers' class."""
    tiny, own = plan.tiny, {one.name: common for common, (one, _) in _post_norm_fields(plan)}
    own |= {tiny.spelt("max_position_embeddings"): "max_position_embeddings", "pad_token_id": "pad_token_id"}
    kinds = {"hidden_act": "str", "layer_norm_eps": "float", "pad_token_id": "int | None"}
    for name in (*tiny.defaults, *(name for name in plan.fields if name not in tiny.defaults)):
        if name in own:
            inherited, default = PostNormConfig.model_fields[own[name]], tiny.defaults[name]
            if inherited.is_required() or inherited.default != default:
                yield f"    {own[name]}: {kinds.get(own[name], 'PositiveInt')} = {literal(default)}"
        elif name in _refused(plan):
            yield f"    {_refused_field(plan, name)}"
    if plan.facts.types is None:
        yield "    type_vocab_size: Literal[0] = 0"


def _refused(plan: Blueprint) -> dict[str, Field]:
    """Fields that a validator must refuse; those of `PostNormConfig` have their own."""
    inherited = PostNormConfig.model_fields if plan.post_norm else {}
    return {name: one for name, one in plan.refused.items() if name not in inherited}


def _refused_field(plan: Blueprint, name: str) -> str:
    if name in plan.derived:
        return f"{attribute(name)}: PositiveInt"
    value = literal(plan.refused[name].default)
    # pydantic has no fields that begin with an underscore.
    given = f'Field({value}, validation_alias="{name}")' if name != attribute(name) else value
    return f"{attribute(name)}: {_kind(plan.refused[name])} = {given}"


def _fixed(plan: Blueprint) -> dict[str, Any]:
    """Fields of `PostNormConfig` that no field decides: transformers has them in its code."""
    facts = {common: plan.facts.flat()[fact] for common, fact in POST_NORM.items() if plan.post_norm}
    decided = dict(_post_norm_fields(plan))
    return {common: value or 0 for common, value in facts.items() if common not in decided}


def attribute(name: str) -> str:
    """A field as an attribute of the class."""
    return name.lstrip("_")


def _read_field(plan: Blueprint, one: Field) -> str:
    if one.name in plan.derived and one.default is None:
        return f"{one.name}: PositiveInt"
    # What decides a scale alone may be any number.
    if type(one.default) is int:
        kind = "PositiveInt" if set(one.binds) & {"intermediate", "kv_heads", "head_dim"} else "float"
        return f"{one.name}: {kind} = {one.default}"
    return f"{one.name}: {_kind(one)} = {literal(one.default)}"


def _kind(one: Field) -> str:
    """The type of a field as a declaration states it."""
    hint = one.hint
    found = [kind for kind in ("bool", "float", "int", "str") if kind in hint]
    if "float" in found and "int" in found:
        found.remove("int")
    if not found or "list" in hint or "dict" in hint:
        return "Any"
    return " | ".join([*found, *(["None"] if "None" in hint or one.default is None else [])])


def _window_field(windows: Windows, name: str) -> str:
    if name == windows.field:
        # `normalise` sets it where a switch decides.
        kind = "PositiveInt | None"
        return f"{name}: {kind}" if windows.gate_clears else f"{name}: {kind} = {windows.default}"
    if name == windows.gate:
        return f"{name}: bool = {windows.gate_default}"
    if name == TYPES:
        return f"{name}: tuple[LayerType, ...]"
    return f"{name}: int = {windows.first_default}"


def _normalise(plan: Blueprint) -> Iterator[str]:
    lines, fixed = [*_derivations(plan), *_window_derivations(plan)], _fixed(plan)
    if not lines and not fixed and plan.rotary is None:
        return
    known = (
        {}
        if plan.post_norm
        else {"max_position_embeddings": plan.tiny.defaults.get(plan.tiny.spelt("max_position_embeddings"))}
    )
    stated = {name: one.default for name, one in plan.read.items() if name in plan.derived and one.default is not None}
    yield ""
    yield "    @classmethod"
    yield "    def normalise(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:"
    if fixed:
        inside = ", ".join(f"{literal(name)}: {literal(value)}" for name, value in fixed.items())
        yield '        """What transformers has in its code, whatever a file states."""'
        yield f"        return {{**raw, {inside}}}"
        return
    yield '        """Fill in what transformers derives where a file leaves it out."""'
    inside = ", ".join(f"{literal(name)}: {value}" for name, value in {**known, **stated}.items() if value is not None)
    yield f"        config = {{{inside}, **raw}}" if inside else "        config = dict(raw)"
    yield from (f"        {line}" for line in lines)
    rotary = plan.rotary
    if rotary is None:
        yield "        return config"
        return
    options = [f"theta={rotary.theta}"] if rotary.theta != 10000.0 else []
    options += [f"partial={rotary.partial}"] if rotary.partial != 1.0 else []
    reading = f"read_rope({', '.join(['config', *options])})"
    if rotary.reads_partial:
        yield f'        return {{**config, "rope": {reading}}}'
        return
    yield f"        rope = {reading}"
    yield "        # Heads turn whole: transformers reads no fraction of them here, and fails on one with any other type."
    yield '        if rope["type"] == "default":'
    yield '            rope["partial"] = 1.0'
    yield '        return {**config, "rope": rope}'


def _derivations(plan: Blueprint) -> Iterator[str]:
    wanted = {name: formula for name, formula in plan.derived.items() if name in plan.read or name in plan.refused}
    if not wanted:
        return
    uses_hidden = any("hidden" in formula for formula in wanted.values())
    uses_heads = any("heads" in formula for formula in wanted.values())
    if uses_heads and uses_hidden:
        yield 'heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")'
    elif uses_heads:
        yield 'heads = config.get("num_attention_heads")'
    else:
        yield 'hidden = config.get("hidden_size")'
    for name, formula in wanted.items():
        missing = f"if config.get({literal(name)}) is None"
        value = formula.format(num_attention_heads="heads", hidden_size="hidden")
        if "//" in formula:
            # Sizes may be anything here; validation says what they must be.
            missing += " and isinstance(heads, int) and isinstance(hidden, int) and heads > 0"
        elif "*" in formula:
            missing += " and isinstance(hidden, int)"
        yield f"{missing}:"
        yield f"    config[{literal(name)}] = {value}"


def _window_derivations(plan: Blueprint) -> Iterator[str]:
    windows = plan.windows
    if windows is None:
        return
    if windows.gate_clears and windows.gate:
        stated = f"config.get({literal(windows.field)}, {windows.default})"
        switch = f"config.get({literal(windows.gate)}{', True' if windows.gate_default else ''})"
        yield f"config[{literal(windows.field)}] = {stated} if {switch} else None"
    if not windows.by_layer or windows.rule is None:
        return
    rule = windows.rule
    yield f'if config.get({literal(TYPES)}) is None and isinstance(layers := config.get("num_hidden_layers"), int):'
    match rule.kind:
        case "none" | "all":
            kind = SLIDING if rule.kind == "all" else FULL
            yield f"    config[{literal(TYPES)}] = [{literal(kind)}] * layers"
        case "every":
            test = f"at % {rule.every} == {rule.every - 1}" if rule.every != 2 else "at % 2"
            types = f"[{literal(FULL)} if {test} else {literal(SLIDING)} for at in range(layers)]"
            yield f"    config[{literal(TYPES)}] = {types}"
        case _:
            first = f"config.get({literal(rule.first)}, {windows.first_default})"
            if windows.gate:
                yield "    # Without a window all layers see everything, whatever their number."
                yield f"    first = layers if config.get({literal(windows.field)}) is None else {first}"
            else:
                yield f"    first = {first}"
            types = f"[{literal(FULL)} if at < first else {literal(SLIDING)} for at in range(layers)]"
            yield f"    config[{literal(TYPES)}] = {types}"


def _validators(plan: Blueprint) -> Iterator[str]:
    refused = _refused(plan)
    if refused:
        yield ""
        yield '    @model_validator(mode="after")'
        yield "    def _nothing_else_is_asked_for(self) -> Self:"
        yield "        # Other values change what transformers computes in a way that no block of core does."
        for name, one in refused.items():
            allowed = [literal(value) for value in dict.fromkeys((one.default, *one.harmless))]
            if name in plan.derived:
                sizes = {"num_attention_heads": "self.num_attention_heads", "hidden_size": "self.hidden_size"}
                allowed = [plan.derived[name].format(**sizes)]
            elif name in plan.tiny.equal:
                allowed = ["self.hidden_size"]
            value = f"self.{attribute(name)}"
            test = f"{value} not in ({', '.join(allowed)})" if len(allowed) > 1 else _unlike(value, allowed[0])
            yield f"        if {test}:"
            yield from raised(f"{name} {{{value}!r}} is not supported; supported is {_told(allowed)}", 12)
        yield "        return self"
    checks = [*_shape_checks(plan)]
    if checks:
        yield ""
        yield '    @model_validator(mode="after")'
        yield "    def _shapes_fit(self) -> Self:"
        yield from (f"        {line}" for line in checks)
        yield "        return self"


def _unlike(name: str, value: str) -> str:
    if value == "None":
        return f"{name} is not None"
    if value in ("True", "False"):
        return f"not {name}" if value == "True" else name
    return f"{name} != {value}"


def _told(allowed: list[str]) -> str:
    return " or ".join(f"{{{one}}}" if "self." in one else one.replace('"', "'") for one in allowed)


def _shape_checks(plan: Blueprint) -> Iterator[str]:
    kv_heads = plan.decides("kv_heads")
    if kv_heads is not None and kv_heads[0].name != plan.tiny.spelt("num_attention_heads"):
        name = kv_heads[0].name
        yield f"if self.num_attention_heads % self.{name}:"
        heads = "num_attention_heads {self.num_attention_heads}"
        yield from (line[8:] for line in raised(f"{heads} is not a multiple of {name} {{self.{name}}}", 12))
    if plan.rotary is not None and not plan.rotary.reads_partial:
        yield "if self.rope.partial != 1.0:"
        text = f"partial_rotary_factor {{self.rope.partial}}: {plan.source.stem} turns whole heads"
        yield from (line[8:] for line in raised(text, 12))
    if plan.windows is not None and plan.windows.by_layer:
        yield "if len(self.layer_types) != self.num_hidden_layers:"
        yield '    raise ValueError(f"layer_types names {len(self.layer_types)} layers of {self.num_hidden_layers}")'


def _properties(plan: Blueprint) -> Iterator[str]:
    windows = plan.windows
    if windows is not None and (windows.by_layer or (windows.gate and not windows.gate_clears)):
        more = f" + {windows.more}" if windows.more else ""
        tests = [f"self.{windows.field} is None"]
        tests += [f"not self.{windows.gate}"] if windows.gate and not windows.gate_clears else []
        tests += [f"self.layer_types[layer] != {literal(SLIDING)}"] if windows.by_layer else []
        yield ""
        yield "    def window(self, layer: int) -> int | None:"
        yield '        """Keys that a query of this layer sees, itself included; None is all."""'
        yield f"        if {' or '.join(tests)}:"
        yield "            return None"
        yield f"        return self.{windows.field}{more}"
    yield ""
    yield "    @property"
    yield "    def max_tokens(self) -> int:"
    if plan.rotary is not None:
        yield "        # `dynamic` ends at the length it was trained for: past it, cached keys would have other frequencies."
        yield "        return self.rope.max_tokens or self.max_position_embeddings"
    else:
        yield "        return self.max_position_embeddings"
