"""Chat templates: programs of the checkpoint's author, run in a sandbox with an allowance.

Decides what a template may do: what transformers' own environment lets it do, within `Allowance`. Loops, calls, operators and
whatever makes text are counted in the compiled template, so that a rendering ends by itself and in no thread that would have
to be killed. Knows nothing of tokenizers.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from lorax_core.serving.allowance import SECONDS, Allowance, TooMuch

SOURCE: Final = 512 * 1024
"""Characters of the longest template; those in use have up to 40,000."""
# No chat template uses these; each does an amount of work that its arguments do not show.
_LEFT_OUT: Final = ("filesizeformat", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Likewise of methods, which make bytes, tables of characters or text by algorithms that are quadratic.
_NO_METHODS: Final = frozenset(("encode", "decode", "translate", "maketrans", "to_bytes", "from_bytes", "fromhex"))
# Tests that look at all of what they are given.
_COMPARING: Final = frozenset("in eq equalto == ne != lt < le <= gt > ge >= lower upper".split())  # noqa: SIM905
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A template, compiled. Safe to use from any thread; raises whatever jinja or the template itself raises.

    `seconds` is what compiling it, and each rendering, may take.
    """

    def __init__(self, source: str, seconds: float = SECONDS) -> None:
        if len(source) > SOURCE:
            raise TooMuch(f"it has {len(source):,} characters; at most {SOURCE:,} are read")
        self._environment = _Environment(seconds)
        with self._environment.allowed():
            self._template = self._environment.from_string(source)

    def render(
        self, messages: list[dict[str, Any]], special: Mapping[str, Any], variables: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a conversation, up to where the answer begins; `special` are the tokenizer's special tokens.

        `variables` are more that the template sees.
        """
        with self._environment.allowed():
            values = {"tools": None, "documents": None, "add_generation_prompt": True, **special, **(variables or {})}
            return self._template.render({**values, "messages": [_plain(one) for one in messages]})


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it to a template: without empty keys, and with reasoning under every name it has."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


class _Metered(NodeTransformer):
    """Puts the accounting into a template: before each pass of a loop, and around whatever makes text or lists."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.generic_visit(node)
        match node:
            case nodes.For():
                node.body.insert(0, nodes.ExprStmt(_call("passed", node), lineno=node.lineno))
                if node.test is not None:
                    # A loop with a condition looks at all elements before its body sees any.
                    node.test = nodes.And(_call("passed", node), node.test, lineno=node.lineno)
            case nodes.Output():
                length = sum(len(one.data) for one in node.nodes if isinstance(one, nodes.TemplateData))
                if length:
                    node.nodes.append(_call("written", node, nodes.Const(length, lineno=node.lineno)))
            case nodes.Concat():
                return _call("concatenated", node, *node.nodes)
            # A tuple of names that are assigned to is none that is made.
            case nodes.Tuple(ctx="load") | nodes.List() | nodes.Dict():
                constant = all(isinstance(one, nodes.Const) for one in node.iter_child_nodes())
                return node if constant else _call("made", node, node)
            case nodes.Getitem(arg=nodes.Slice()):
                return _call("made", node, node)
        return node


def _call(name: str, at: nodes.Node, *args: nodes.Expr) -> nodes.Call:
    """A call of the environment's own method."""
    method = nodes.EnvironmentAttribute(name, lineno=at.lineno)
    return nodes.Call(method, list(args), [], None, None, lineno=at.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment in which transformers renders chat templates, with an allowance for each rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, seconds: float) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # What is computed at compile time would be computed unseen.
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=_shown,
        )
        self._seconds = seconds
        self._renderings = threading.local()
        self.filters = {name: self._counted(name, one) for name, one in self.filters.items() if name not in _LEFT_OUT}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._counted_test(name, one) for name, one in tests.items()}
        self.filters["join"] = self._joining(self.filters["join"])
        self.filters["tojson"] = self._to_json
        self.globals = {
            **{name: one for name, one in self.globals.items() if name != "lipsum"},
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": dict,
            "namespace": _Namespace,
        }

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """One rendering, or compilation, in this thread."""
        self._renderings.allowance = Allowance(self._seconds)
        try:
            yield
        finally:
            del self._renderings.allowance

    @property
    def allowance(self) -> Allowance:
        found: Allowance = self._renderings.allowance
        return found

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        return tree

    # --- what compiled templates call ---

    def passed(self) -> bool:
        self.allowance.step()
        return True

    def written(self, length: int) -> str:
        self.allowance.text(length)
        return ""

    def made(self, value: Any) -> Any:
        return self.allowance.made(value)

    def concatenated(self, *values: Any) -> str:
        self.allowance.joined(list(values), "")
        return "".join(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.allowance.operator(operator, left, right)
        return self.allowance.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (as jinja has it)
        owner = getattr(__obj, "__self__", None)
        if owner is __self:
            return __obj(*args)  # without jinja's own arguments, which say what a loop has defined
        allowance, name = __self.allowance, getattr(__obj, "__name__", "")
        allowance.step()
        if isinstance(owner, (str, bytes, int)):
            if name == "join" and args:
                args = ([*args[0]], *args[1:])
                allowance.joined(args[0], owner)
            allowance.called(name, owner, args, kwargs)
        return allowance.made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def filled(*args: Any, **kwargs: Any) -> str:
            mapping = args[0].values() if value.__name__ == "format_map" and isinstance(args[0], dict) else ()
            self.allowance.formatted(value.__self__, [*args, *kwargs.values(), *mapping], fields=True)
            return wrapped(*args, **kwargs)

        return filled

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that accounts for what it is given and for what it makes."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after the context, where it takes one

        @wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.allowance.called(name, args[first] if len(args) > first else None, args[first + 1 :], kwargs)
            return self.allowance.made(function(*args, **kwargs))

        return filtered

    def _counted_test(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A test that accounts for what it looks at: filters such as `select` apply one to each element."""

        @wraps(function)
        def tested(*args: Any, **kwargs: Any) -> Any:
            self.allowance.step()
            if name in _COMPARING:
                self.allowance.text(sum(len(one) for one in args if isinstance(one, (str, list, tuple, dict))))
            return function(*args, **kwargs)

        return tested

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def _joining(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def joined(context: Any, value: Any, d: str = "", attribute: str | int | None = None) -> Any:
            items = list(value)
            self.allowance.joined(items, d)
            return function(context, items, d, attribute)

        return joined

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers has it: jinja's own escapes HTML."""
        self.allowance.step()
        self.allowance.text(self.allowance.weight(value))
        for part in (indent, *(separators or ())):
            if part is not None and (part > 100 if isinstance(part, int) else len(part) > 100):
                raise TooMuch(f"it writes JSON with {part!r:.60}")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        parts: list[str] = []
        for part in encoder.iterencode(value):
            self.allowance.text(len(part))
            parts.append(part)
        return "".join(parts)


@pass_context  # with a context it is never applied at compile time
def _shown(context: Context, value: Any) -> Any:
    """What a template is about to print."""
    allowance: Allowance = context.environment.allowance  # type: ignore[attr-defined]
    allowance.text(allowance.weight(value))
    return value


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message)[:500])


def _strftime_now(form: str) -> str:
    if len(form) > 200:
        raise TooMuch(f"it formats a date with {len(form):,} characters")
    return datetime.now().strftime(form)


class _Namespace(Namespace):
    """As transformers has it: no names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As in jinja's, so that namespace(self=...) works.
        self, args = args[0], args[1:]
        for name in (values := dict(*args, **kwargs)):
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Not what it holds, which may be itself, or grow with each namespace that is put into another.
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r:.60}")


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training and prints them."""

    tags = {"generation"}  # noqa: RUF012  (as jinja has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_printed"), [], [], body).set_lineno(line)

    def _printed(self, caller: Callable[[], str]) -> str:
        return caller()
