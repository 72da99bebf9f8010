"""`docs/reference.md`, generated from docstrings: `python -m lorax_core.cli.reference > docs/reference.md`.

Decides what the page says of a public name. Knows nothing that the source does not say; a test compares the committed page with
what is generated here. Names of torch, pydantic and Python's own classes are left out.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import ModuleType
from typing import Any, Final, ForwardRef

from pydantic import BaseModel

MODULES: Final = ("lorax_core.plugins", "lorax_core.modeling", "lorax_core.weights", "lorax_core.testing")
"""The modules whose names plugins may rely on."""

_TOP: Final = """# Reference

The names that plugins may rely on; [plugins.md](plugins.md#5-publish-it) says what is promised of them. Methods of torch and
of pydantic's models are left out. The page is generated from docstrings, and a test compares it with them:

```sh
python -m lorax_core.cli.reference > docs/reference.md
```
"""


def page() -> str:
    """The page about all public names."""
    blocks = [_TOP]
    for path in MODULES:
        module = importlib.import_module(path)
        blocks.append(f"## {path}\n\n{inspect.cleandoc(module.__doc__ or '').partition(chr(10))[0]}\n")
        for name in sorted(module.__all__, key=str.casefold):
            blocks += _entry(module, name)
    return "\n".join(blocks)


def is_ours(owner: type) -> bool:
    """Whether a class is defined in core."""
    return owner.__module__.partition(".")[0] == "lorax_core"


def _entry(module: ModuleType, name: str) -> Iterator[str]:
    value = getattr(module, name)
    yield f"### {name}\n"
    if inspect.isclass(value):
        yield from _code([f"class {name}{_bases(value)}:", *(f"    {line}" for line in _body(value))])
        yield from _text(value)
        members = list(_members(value))
        yield from ["\n".join(members) + "\n"] if members else []
    elif inspect.isfunction(value):
        yield from _code([f"{name}{_signature(value)}"])
        yield from _text(value)
    else:
        yield f"{_said_below(module, name, value)}\n"


def _code(lines: list[str]) -> Iterator[str]:
    yield "\n".join(["```python", *lines, "```\n"])


def _text(value: Any) -> Iterator[str]:
    text = inspect.cleandoc(vars(value).get("__doc__") or "") if inspect.isclass(value) else inspect.getdoc(value)
    yield from [f"{text}\n"] if text else []


def _bases(kind: type) -> str:
    public = {name for path in MODULES for name in importlib.import_module(path).__all__}
    names = [base.__name__ for base in kind.__bases__ if is_ours(base) and base.__name__ in public]
    return f"({', '.join(names)})" if names else ""


def _body(kind: type) -> Iterator[str]:
    """How an instance is made, where a constructor of core says so, and the fields of the class."""
    if is_dataclass(kind):
        yield from (_field(one) for one in fields(kind) if not one.name.startswith("_"))
        return
    owner = next((one for one in kind.__mro__ if "__init__" in vars(one)), object)
    made = is_ours(owner) and not issubclass(kind, BaseModel) and not getattr(kind, "_is_protocol", False)
    lines = [f"def __init__{_signature(kind.__init__)}: ..."] if made else []  # type: ignore[misc]
    yield from [*lines, *_fields(kind)] or ["..."]


def _field(one: Field[Any]) -> str:
    """A field of a dataclass."""
    made = f" = {one.default_factory.__name__}()" if isinstance(one.default_factory, type) else ""
    default = one.default.__name__ if isinstance(one.default, type) else repr(one.default)
    return f"{one.name}: {said(one.type)}{made if one.default is MISSING else f' = {default}'}"


def said(annotation: object) -> str:
    """An annotation as the source has it."""
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else repr(annotation)


def _fields(kind: type) -> Iterator[str]:
    """Fields of models and of typed dictionaries, members of enumerations, attributes of classes."""
    if issubclass(kind, enum.Enum):
        yield from (f"{member.name} = {member.value!r}" for member in kind)
        return
    models = kind.model_fields if issubclass(kind, BaseModel) else {}
    for name, annotation in inspect.get_annotations(kind).items():
        if name.startswith("_") or name == "model_config":
            continue
        field = models.get(name)
        if field is not None:
            default = "" if field.is_required() else f" = {field.default!r}"
        else:
            value = inspect.getattr_static(kind, name, inspect.Parameter.empty)
            plain = isinstance(value, bool | int | float | str | tuple | dict | None)
            default = f" = {value!r}" if plain and value is not inspect.Parameter.empty else ""
        yield f"{name}: {said(annotation)}{default}"


def _members(kind: type) -> Iterator[str]:
    """Methods and properties that a class defines and documents."""
    for name, value in vars(kind).items():
        function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        text = " ".join(inspect.cleandoc(function.__doc__).partition("\n\n")[0].split())
        if isinstance(value, property):
            yield f"- `{name}`: {text}"
            continue
        yield f"- `{name}{_signature(function)}`: {text}"


class _Bare(str):
    """An annotation as the source has it, without quotes."""

    __repr__ = str.__str__


def _signature(function: Callable[..., object]) -> str:
    signature = inspect.signature(function)
    kept = [
        one.replace(annotation=_Bare(one.annotation)) if isinstance(one.annotation, str) else one
        for one in signature.parameters.values()
        if one.name not in ("self", "cls")
    ]
    back = signature.return_annotation
    back = inspect.Signature.empty if back in (None, "None") else _Bare(back) if isinstance(back, str) else back
    return str(signature.replace(parameters=kept, return_annotation=back))


def _said_below(package: ModuleType, name: str, value: object) -> str:
    """The text under an assignment, for what is neither a class nor a function."""
    for path, module in sorted(sys.modules.items()):
        if not path.startswith(f"{package.__name__}.") or vars(module).get(name) is not value:
            continue
        body = ast.parse(inspect.getsource(module)).body
        for at, node in enumerate(body[:-1]):
            below = body[at + 1]
            named = isinstance(node, ast.Assign) and any(
                isinstance(one, ast.Name) and one.id == name for one in node.targets
            )
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                return inspect.cleandoc(str(below.value.value))
    raise LookupError(f"{package.__name__}.{name} is documented nowhere")


if __name__ == "__main__":
    sys.stdout.write(page())
