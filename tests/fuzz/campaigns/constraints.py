"""Constraints of completions: JSON schemas, regular expressions, lists of choices.

The reference is an independent validator: Python's `re`, and a reading of a few keywords of schemas.
"""

from __future__ import annotations

import json
import math
import re
from random import Random
from typing import Any

import lorax_core as lorax
from fuzz.house import House
from fuzz.judge import Answer, Attempt, CannotJudge, Wrong
from fuzz.mutations import odd_value

# Quantifiers are bounded, so that an answer ends within the tokens that a case has.
REGEXES = [
    "a", "[ab]{1,4}", "(x|yz)", "[0-9]{3}", "", "a?b?", "\\d{2}-\\d{2}", "(foo|bar){2}", "[^a]{2}", "é",
        "\U0001f600", "(a|b|)", "a{0}", "\\.", "[\\]x]", "x{3,1}", "(", "[", "*", "a**", "(?=a)b", "\\1", "(?<n>a)",
        "(a+)+$", "((((a*)*)*)*)*b",
    "a{100000}", "(a{1000}){1000}", "\ud800", "\0", "x" * 5000, "(" * 1000 + ")" * 1000, "[a-\U0010ffff]", ".{2}",
        "$", "^a$", "\\p{L}", "(?i)ab", "a|", "[[:alpha:]]", "\\b", "[z-a]",
]  # fmt: skip
CHOICES: list[Any] = [
    ["a"], ["a", "b"], ["yes", "no", "maybe"], ["", "a"], [""], ["a", "a"], ["a", "ab", "abc"], ["é",
        "\U0001f600"], ['"', "\\", "\n", "\t"], ["\0"], ["\ud800"], ["x" * 3000], [str(n) for n in range(2000)],
        [str(n) for n in range(50_000)],
    [5], [None], [], "a", ["a", 5], [["a"]], {"a": 1}, ["%", "/x/", "<x>", "|"], ["<|end|>"], ["\u2028"],
]  # fmt: skip
SCHEMAS: list[Any] = [
    {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}, {"type": "null"}, {"enum": ["a", "b",
        3]}, {"const": "x"}, {"type": "string", "maxLength": 3}, {"type": "string", "enum": ["u", "v"]},
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
        "additionalProperties": False}, {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, {"type": ["boolean", "null"]}, {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"$ref": "#/nope"},
        {"$ref": "http://127.0.0.1:9/x"}, {"$ref": "file:///etc/passwd"},
    {"type": "integer", "minimum": 2**70, "maximum": 2**71}, {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "string", "pattern": "(a+)+$"}, {"type": "string", "pattern": "("}, {"type": "string",
        "minLength": 10**9}, {"type": "nope"}, {"type": 5},
    {"enum": []}, {"const": math.nan}, {"const": 10**400}, {"multipleOf": 0}, {"multipleOf": 1e-300,
        "type": "number"}, {"allOf": []}, {"not": {}}, {}, True, False, None, "x", "{", '{"type": "boolean"}', "[]",
        "null", {"x": "\ud800"}, {"\ud800": 1},
    {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(10_000)}}, {"type": "object",
        "properties": {"a": False}, "required": ["a"]}, {"oneOf": [{"type": "boolean"}, {"const": True}]},
        {"type": "array", "minItems": 10**6, "items": {}},
    {"type": "object", "required": [5]}, {"properties": []}, {"type": "string", "format": "date"},
        {"type": "string", "format": "x"}, {"if": {}, "then": False}, {5: 1}, {"x": {1, 2}},
        {"patternProperties": {"(": {}}},
]  # fmt: skip


def constraint(house: House, random: Random) -> Attempt:
    """One constrained completion, sampled so that it ends soon."""
    kind = random.choice(["regex", "choice", "json_schema"])
    value: Any = random.choice({"regex": REGEXES, "choice": CHOICES, "json_schema": SCHEMAS}[kind])
    how = random.random()
    if how < 0.15:
        value = odd_value(random)
    elif how < 0.4:
        value = _changed(kind, value, random)
    fields: dict[str, Any] = {kind: value, "max_tokens": random.choice([4, 24]), "prompt": [5, 6, 7]}
    if random.random() < 0.5:
        fields.update(temperature=1.0, seed=random.randrange(100))
    if random.random() < 0.1:
        fields["n"] = 2
    if random.random() < 0.1:
        fields["adapter"] = "good"

    def ask() -> Answer:
        done = house.engine("qwen2").run([lorax.GenerateRequest(**fields)])[0]
        return {"text": done.text, "tokens": list(done.token_ids), "why": str(done.finish_reason)}

    def refer(answer: Answer, seed: int) -> Answer:
        if answer["why"] != "stop":
            raise CannotJudge("the answer was cut at its length")
        if "\ufffd" in answer["text"]:
            raise CannotJudge("bytes that are no text")
        satisfied(kind, value, answer["text"])
        return answer

    return Attempt(ask, refer, changes=[", ".join(f"{key}={one!r:.120}" for key, one in fields.items())])


def _changed(kind: str, value: Any, random: Random) -> Any:
    if isinstance(value, str) and value:
        at = random.randrange(len(value))
        return (
            value[:at]
            + random.choice(["", "(", ")", "?", "{2}", "|", "\\", "é", "["])
            + value[at + random.randrange(2) :]
        )
    if isinstance(value, list) and value:
        return [*value[:50], random.choice([value[0], "", "q", '"', "zz top"])]
    if isinstance(value, dict):
        key = random.choice(["description", "title", "default", "type", "minimum", "maxLength", "enum", "nullable"])
        return {**value, key: random.choice(["x", 0, 1, None, [], ["a"], {}, 2.5])}
    return value


def satisfied(kind: str, value: Any, text: str) -> None:
    """Raises Wrong for a text that its constraint forbids, CannotJudge where this reading of it does not suffice."""
    if kind == "choice":
        if text not in value:
            raise Wrong(f"{text!r} is none of the choices {value!r:.200}")
    elif kind == "regex":
        if (
            len(value) > 200
            or re.search(r"\[[^\]]*\[|\\p|[*+)]\)*[*+]|\(\?|\\b", value)
            or value.startswith("^")
            or value.endswith("$")
        ):
            raise CannotJudge("an expression of which Python has another reading, or none in linear time")
        if re.fullmatch(value, text, re.DOTALL) is None:
            raise Wrong(f"{text!r:.200} does not match {value!r:.200}")
    else:
        schema = json.loads(value) if isinstance(value, str) else value
        try:
            found = json.loads(text)
        except ValueError as error:
            raise Wrong(f"{text!r:.200} is no JSON: {error}") from error
        if not fits(schema, found):
            raise Wrong(f"{text!r:.200} does not fit {schema!r:.200}")


_TYPES = {"integer": int, "boolean": bool, "null": type(None), "string": str, "object": dict, "array": list}
_KNOWN = {"type", "enum", "const", "minimum", "maximum", "maxLength", "properties", "required",
    "additionalProperties", "items", "minItems", "maxItems", "anyOf", "description", "title", "default"}  # fmt: skip


def fits(schema: Any, value: Any) -> bool:
    """Whether a value is as a schema of the known keywords says."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict) or not set(schema) <= _KNOWN:
        raise CannotJudge(f"keywords beyond those known here: {schema!r:.80}")
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds] if kinds is not None else []
    if kinds and not any(
        kind == "number" or (isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)))
        for kind in kinds
    ):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "anyOf" in schema and not any(fits(one, value) for one in schema["anyOf"]):
        return False
    if isinstance(value, int) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, list):
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)) and all(
            fits(schema.get("items", True), one) for one in value
        )
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        strange = [key for key in value if key not in inner]
        return (
            set(schema.get("required", [])) <= set(value)
            and (not strange or schema.get("additionalProperties", True) is not False)
            and all(fits(inner.get(key, True), one) for key, one in value.items())
        )
    return True
