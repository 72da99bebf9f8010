"""The public names of plugins as data, and what of a change to them breaks plugins.

`python tests/support/public_api.py > tests/api2/api.json` freezes them, once for each version of the plugin API.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from lorax_core.cli.reference import MODULES, is_ours, said

Data = Mapping[str, Any]
OVERRIDDEN = "lorax_core.modeling"
"""Plugins override methods of these classes, so core may not call them with more."""
MADE_BY_CORE = ("Batch", "HeadRows", "Model")
"""Plugins read these or derive from them; how one is made is not promised, nor what the engine asks of a model."""


def describe() -> dict[str, dict[str, Any]]:
    """Every public name of the modules that plugins import."""
    modules = {path: importlib.import_module(path) for path in MODULES}
    return {
        path: {name: _described(getattr(one, name)) for name in sorted(one.__all__)} for path, one in modules.items()
    }


def _described(value: Any) -> dict[str, Any]:
    if inspect.isfunction(value):
        return {"kind": "function", **_called(value)}
    if not inspect.isclass(value):
        return {"kind": type(value).__name__}
    if issubclass(value, enum.Enum):
        return {"kind": "enum", "members": {one.name: one.value for one in value}}
    public = {name for path in MODULES for name in importlib.import_module(path).__all__}
    ours = [one for one in value.__mro__ if is_ours(one) and one.__name__ in public]
    owner = next((one for one in value.__mro__ if "__init__" in vars(one)), object)
    plain = not issubclass(value, BaseModel) and not getattr(value, "_is_protocol", False)
    made = is_ours(owner) and plain and value.__name__ not in MADE_BY_CORE
    asked = [] if value.__name__ == "Model" else reversed(ours)
    return {
        "kind": "typed dictionary" if typing.is_typeddict(value) else "class",
        "bases": sorted(one.__name__ for one in ours[1:]),
        "made": _called(value.__init__)["parameters"] if made else [],
        "fields": {name: text for one in reversed(ours) for name, text in _fields(one, value)},
        "methods": {name: method for one in asked for name, method in _methods(one)},
    }


def _called(function: Any) -> dict[str, Any]:
    signature = inspect.signature(function)
    kept = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
    return {"parameters": [_parameter(one) for one in kept], "returns": _said(signature.return_annotation)}


def _parameter(one: inspect.Parameter) -> dict[str, str]:
    found = {"name": one.name, "how": one.kind.description, "type": _said(one.annotation)}
    return found if one.default is one.empty else {**found, "default": repr(one.default)}


def _said(annotation: Any) -> str:
    return "" if annotation is inspect.Signature.empty else said(annotation)


def _fields(owner: type, kind: type) -> Iterator[tuple[str, dict[str, str]]]:
    models = kind.model_fields if issubclass(kind, BaseModel) else {}
    for name, annotation in inspect.get_annotations(owner).items():
        if name.startswith("_") or name == "model_config":
            continue
        found = {"type": _said(annotation)}
        if name in models:
            found["default"] = "required" if models[name].is_required() else repr(models[name].default)
        yield name, found


def _methods(owner: type) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in vars(owner).items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if name.startswith("_") or not inspect.isfunction(inspect.unwrap(function)):
            continue
        # What the reference shows, and how a block is called.
        if function.__doc__ or name == "forward":
            yield name, {"kind": type(value).__name__, **_called(function)}


def breaks(frozen: Data, present: Data) -> list[str]:
    """What of `present` a plugin that was written for `frozen` cannot live with, one line for each."""
    found = []
    for module, names in frozen.items():
        for name, old in names.items():
            new = present.get(module, {}).get(name)
            where = f"{module}.{name}"
            if new is None or new["kind"] != old["kind"]:
                found.append(f"{where} is gone" if new is None else f"{where} is no longer a {old['kind']}")
            elif old["kind"] == "function":
                found += _changed_call(where, old, new, may_grow=True)
            elif old["kind"] == "enum":
                lost = {one: value for one, value in old["members"].items() if new["members"].get(one) != value}
                found += [f"{where}.{one} is gone, or has another value" for one in lost]
            elif "made" in old:
                found += _changed_class(where, old, new, may_grow=module != OVERRIDDEN)
    return found


def _changed_class(where: str, old: Data, new: Data, *, may_grow: bool) -> Iterator[str]:
    yield from (f"{where} is no longer a {base}" for base in old["bases"] if base not in new["bases"])
    yield from _changed_parameters(f"{where}()", old["made"], new["made"], may_grow=True)
    for name, field in old["fields"].items():
        if new["fields"].get(name) != field:
            yield f"{where}.{name} is gone, or has another type or default"
    for name, field in new["fields"].items():
        if name not in old["fields"] and field.get("default") == "required":
            yield f"{where}.{name} is a field that plugins do not give"
    for name, method in old["methods"].items():
        other = new["methods"].get(name)
        if other is None or other["kind"] != method["kind"]:
            yield f"{where}.{name} is gone, or no longer a {method['kind']}"
        else:
            yield from _changed_call(f"{where}.{name}", method, other, may_grow=may_grow)


def _changed_call(where: str, old: Data, new: Data, *, may_grow: bool) -> Iterator[str]:
    if old["returns"] != new["returns"]:
        yield f"{where} returns {new['returns']}, and returned {old['returns']}"
    yield from _changed_parameters(where, old["parameters"], new["parameters"], may_grow=may_grow)


def _changed_parameters(where: str, old: list[Data], new: list[Data], *, may_grow: bool) -> Iterator[str]:
    by_name = {one["name"]: one for one in new}
    for one in old:
        if by_name.get(one["name"]) != one:
            yield f"{where}: the parameter {one['name']!r} is gone, or another"
    known = {one["name"] for one in old}
    positions = [[one["name"] for one in each if one["how"].startswith("positional")] for each in (old, new)]
    if positions[1][: len(positions[0])] != positions[0]:
        yield f"{where}: its parameters have another order"
    for one in new:
        if one["name"] not in known and "default" not in one and not one["how"].startswith("variadic"):
            yield f"{where}: the parameter {one['name']!r} is new, and has no default"
        elif one["name"] not in known and not may_grow:
            yield f"{where}: the parameter {one['name']!r} is new, and plugins override the method without it"


if __name__ == "__main__":
    json.dump(describe(), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")
