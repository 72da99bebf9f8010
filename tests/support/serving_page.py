"""The tables of `docs/serving.md`, made from what they describe: `PYTHONPATH=core:tests/support python -m serving_page`.

Decides how routes, flags, metrics and errors are listed. The text around the tables is the page's own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

import lorax_core
from lorax_core.cli.serve import app as command
from lorax_core.server.app import build_app
from lorax_core.server.errors import KINDS
from lorax_core.serving.engine import Engine

PAGE = Path(__file__).resolve().parents[2] / "docs/serving.md"
CHECKPOINT = Path(__file__).resolve().parents[2] / "examples/tiny_qwen2/model"


def with_tables(page: str, engine: Engine) -> str:
    """The page with its tables made again."""
    for name, lines in tables(engine).items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(page), f"the page has no place for {name}"
        table = "\n".join(lines)
        page = mark.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page)
    return page


def tables(engine: Engine) -> dict[str, list[str]]:
    """Each table by the name of its mark."""
    app = build_app(engine, model_name="base")
    return {
        "routes": _table("Route", "What it does", rows=_routes(app.openapi())),
        "flags": _table("Flag", "Default", "Meaning", rows=_flags()),
        "metrics": _table("Metric", "Labels", "Meaning", rows=_metrics(app.state.gateway.metrics)),
        "errors": _table("Kind", "OpenAI", "LoRAX", "TEI", "`code`", "LoRAX's `error_type`", "TEI's", rows=_errors()),
    }


def _table(*heads: str, rows: Iterable[Iterable[str]]) -> list[str]:
    body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}", *body]


def _routes(document: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            said = operation.get("description") or operation.get("summary") or ""
            key = " Needs the admin key." if operation["security"] == [{"adminKey": []}] else ""
            yield f"`{method.upper()} {path}`", _first(said) + key


def _first(text: str) -> str:
    """The first sentence of a docstring, in one line."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph)[0]


def _flags() -> Iterable[tuple[str, str, str]]:
    kinds = (lorax_core.options.EngineOptions, lorax_core.server.options.ServerOptions)
    defaults = {one: field.default for kind in kinds for one, field in kind.model_fields.items()}
    for one in typer.main.get_command(command).params:
        if one.param_type_name != "option" or one.name == "help":
            continue
        default = one.default if one.default not in (None, (), []) else defaults.get(one.name)
        # A list: of a server it is empty by default, whatever it is of an engine.
        shown = "" if default is None or isinstance(default, tuple | list) else f"`{default}`"
        # A name in brackets, such as SECONDS, is upper case and not a choice.
        metavar = f" {one.metavar}" if one.metavar else ""
        yield f"`{one.opts[0]}{metavar}`", shown, Text.from_markup(one.help or "").plain


def _metrics(metrics: Any) -> Iterable[tuple[str, str, str]]:
    labels = {
        collector._name: collector._labelnames
        for collector in metrics.registry._collector_to_names
        if hasattr(collector, "_labelnames")
    }
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield f"`{name}` ({family.type})", ", ".join(labels.get(family.name, ())), family.documentation


def _errors() -> Iterable[tuple[str, ...]]:
    for name, kind in KINDS.items():
        code = f"`{kind.code}`" if kind.code else ""
        statuses = (str(kind.status), str(kind.lorax_status), str(kind.tei_status))
        yield f"`{name}`", *statuses, code, f"`{kind.lorax}`", f"`{kind.tei}`"


def main() -> None:
    """Write the page."""
    with lorax_core.load(CHECKPOINT, kv_cache_tokens=1_024) as engine:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), engine), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
