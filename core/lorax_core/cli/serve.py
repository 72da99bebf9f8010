"""`lorax serve`: a model and its adapters over HTTP.

Decides the flags of a server and where its keys come from. Knows nothing of HTTP: `lorax_core.server` serves, imported when the
command runs.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lorax_core.cli.loading import Loading, ModelPath, loads_model
from lorax_core.cli.options import numbered_labels
from lorax_core.cli.remote import admin_key_in, keys_in
from lorax_core.cli.render import data_only_stdout, print_message
from lorax_core.errors import RequestError, listed
from lorax_core.options import EngineOptions
from lorax_core.server.options import ServerOptions
from lorax_core.settings import Settings

app = typer.Typer(add_completion=False)


_DEFAULTS: Final = {
    name: field.default for kind in (EngineOptions, ServerOptions) for name, field in kind.model_fields.items()
}


def _flag(*names: str, help: str, metavar: str | None = None, option: str | None = None) -> Any:
    """A flag with its help, and the default of the option of that name."""
    default = _DEFAULTS.get(option or "")
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return typer.Option(*names, metavar=metavar, help=help, show_default=shown if default is not None else False)


_AdapterSources = Annotated[
    list[str] | None,
    _flag(
        "--adapter-sources",
        metavar="KIND|FOLDER|URL",
        help="What requests may name unloaded: hub, folder, url, a folder, a URL's start. Repeatable.",
    ),
]
_Label = Annotated[
    list[str] | None,
    _flag(
        metavar="ADAPTER:ID=NAME",
        help="Name a label of an adapter's head; once for each label.",
    ),
]
_ProblemType = Annotated[
    list[str] | None,
    _flag(
        metavar="ADAPTER=TYPE",
        help="How an adapter's head was trained: single_label_classification, multi_label_classification or regression.",
    ),
]
_Host = Annotated[str | None, _flag(help="The address to listen on; 0.0.0.0 is all of this machine.", option="host")]
_Port = Annotated[int | None, _flag(help="The port; 0 takes a free one.", option="port")]
_ModelName = Annotated[str | None, _flag(metavar="NAME", help="What clients call the base, instead of MODEL.")]
_ApiKeyFile = Annotated[
    Path | None, _flag(metavar="FILE", help="API keys, one a line; or set LORAX_API_KEYS, separated by commas.")
]
_AdminKeyFile = Annotated[
    Path | None, _flag(metavar="FILE", help="The key that may load adapters; or set LORAX_ADMIN_KEY.")
]
_MaxQueue = Annotated[
    int | None,
    _flag(metavar="N", help="Maximum number of sequences that wait; more are refused with 429.", option="max_queue"),
]
_MaxBodyBytes = Annotated[
    int | None, _flag(metavar="N", help="Maximum size of a request body.", option="max_body_bytes")
]
_MaxBatch = Annotated[
    int | None, _flag(metavar="N", help="Maximum number of inputs of one request.", option="max_batch")
]
_MaxSchemaChars = Annotated[
    int | None,
    _flag(metavar="N", help="Maximum length of a JSON schema or regular expression.", option="max_schema_chars"),
]
_RequestTimeout = Annotated[
    float | None, _flag(metavar="SECONDS", help="Maximum time for an answer.", option="request_timeout")
]
_BodyTimeout = Annotated[
    float | None,
    _flag(metavar="SECONDS", help="Maximum time for headers to arrive, and for a body.", option="body_timeout"),
]
_DrainTimeout = Annotated[
    float | None,
    _flag(metavar="SECONDS", help="Time for running requests to finish after SIGTERM.", option="drain_timeout"),
]
_CorsOrigin = Annotated[list[str] | None, _flag(metavar="ORIGIN", help="Web pages of this origin may ask. Repeatable.")]
_Page = Annotated[bool, typer.Option("--page/--no-page", help="GET / is a page to try the server in a browser.")]
_LogFormat = Annotated[
    str | None, _flag(metavar="text|json", help="How requests are logged, on stderr.", option="log_format")
]
_Pooling = Annotated[str | None, _flag(help="How rows become one vector: cls, mean or last.")]
_KvCacheTokens = Annotated[
    int | None, _flag(metavar="N", help="Size of the KV cache that all running sequences share.")
]
_MaxBatchTokens = Annotated[
    int | None, _flag(metavar="N", help="Maximum number of tokens of one step.", option="max_batch_tokens")
]
_MaxBatchRows = Annotated[
    int | None, _flag(metavar="N", help="Maximum number of sequences of one step.", option="max_batch_rows")
]
_MaxAdapters = Annotated[
    int | None, _flag(metavar="N", help="Maximum number of adapters on the device at once; all by default.")
]
_MaxAdapterBytes = Annotated[
    int | None, _flag(metavar="N", help="Maximum size on disk of an adapter that clients load; no limit by default.")
]


@app.command()
@loads_model
def serve(
    path: ModelPath,
    adapter_sources: _AdapterSources = None,
    label: _Label = None,
    problem_type: _ProblemType = None,
    host: _Host = None,
    port: _Port = None,
    model_name: _ModelName = None,
    api_key_file: _ApiKeyFile = None,
    admin_key_file: _AdminKeyFile = None,
    max_queue: _MaxQueue = None,
    max_body_bytes: _MaxBodyBytes = None,
    max_batch: _MaxBatch = None,
    max_schema_chars: _MaxSchemaChars = None,
    request_timeout: _RequestTimeout = None,
    body_timeout: _BodyTimeout = None,
    drain_timeout: _DrainTimeout = None,
    cors_origin: _CorsOrigin = None,
    page: _Page = True,
    log_format: _LogFormat = None,
    pooling: _Pooling = None,
    kv_cache_tokens: _KvCacheTokens = None,
    max_batch_tokens: _MaxBatchTokens = None,
    max_batch_rows: _MaxBatchRows = None,
    max_adapters: _MaxAdapters = None,
    max_adapter_bytes: _MaxAdapterBytes = None,
    *,
    loading: Loading,
) -> None:
    """Serve a model over HTTP: the APIs of OpenAI, LoRAX and TEI, and every task of one base at once.

    SIGTERM and Ctrl-C finish what runs, then end. Logs are on stderr.
    """
    server = _server()
    options = _given(
        host=host, port=port, model_name=model_name, max_queue=max_queue, max_body_bytes=max_body_bytes, max_batch=max_batch,
        max_schema_chars=max_schema_chars, request_timeout=request_timeout, body_timeout=body_timeout,
        drain_timeout=drain_timeout, cors_origins=cors_origin, page=page, log_format=log_format,
    )  # fmt: skip
    # Unlike an engine in Python, a server lets requests name nothing that was not loaded, unless somebody says so.
    sources = adapter_sources or loading.options_of(path).get("adapter_sources", [])
    for_engine = {
        "adapter_sources": sources, "pooling": pooling, "kv_cache_tokens": kv_cache_tokens, "max_adapters": max_adapters,
        "max_batch_tokens": max_batch_tokens, "max_batch_rows": max_batch_rows, "max_adapter_bytes": max_adapter_bytes,
    }  # fmt: skip
    about = _heads(label or [], problem_type or [], loading.options_of(path)["adapters"])
    settings = Settings.from_env()
    options["api_keys"] = [*settings.api_keys, *(keys_in(api_key_file) if api_key_file else [])]
    options["admin_key"] = admin_key_in(admin_key_file) if admin_key_file else settings.admin_key
    chosen = ServerOptions(**options)
    with contextlib.closing(server.listen(chosen)) as bound, data_only_stdout():
        _say(f"loading {path}", chosen)
        with loading.engine(path, about=about, **for_engine) as engine:
            engine.warmup()
            # A model of lorax.toml is called as it is there.
            name = chosen.model_name or (path if path in loading.config.models else None)
            called = name or server.base_name(engine.options.checkpoint)
            _say(f"serving {called!r} at {server.address(bound)}; Ctrl-C stops", chosen)
            server.serve(engine, chosen, bound, model_name=name)


def _say(text: str, options: ServerOptions) -> None:
    """A line on stderr; one of JSON where the logs are, which programs read."""
    if options.log_format == "json":
        from lorax_core.server.logs import json_line

        text = json_line(text)
    print_message(text)


def _heads(labels: list[str], problems: list[str], adapters: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What is said of the heads of adapters."""
    about: dict[str, dict[str, Any]] = {name: {"id2label": those} for name, those in _labels(labels, adapters).items()}
    for name, problem in _problems(problems, adapters).items():
        about.setdefault(name, {})["problem_type"] = problem
    return about


def _labels(given: list[str], adapters: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """The labels of each adapter."""
    found: dict[str, list[str]] = {}
    for one in given:
        before, equals, name = one.partition("=")
        adapter, _, index = before.rpartition(":")
        if adapter not in adapters:
            problem = f"{one!r} is not ADAPTER:ID=NAME" if not adapter else f"no adapter is called {adapter!r}"
            raise typer.BadParameter(f"{problem}; --adapter names {listed(adapters)}", param_hint="--label")
        found.setdefault(adapter, []).append(f"{index}{equals}{name}")
    return {adapter: numbered_labels(those, "ADAPTER:ID=NAME") for adapter, those in found.items()}


def _problems(given: list[str], adapters: Mapping[str, str]) -> dict[str, str]:
    """What the numbers of each adapter's head mean."""
    found: dict[str, str] = {}
    for one in given:
        adapter, equals, problem = one.partition("=")
        if adapter not in adapters or not equals:
            message = f"{one!r} is not ADAPTER=TYPE with an adapter that --adapter names: {listed(adapters)}"
            raise typer.BadParameter(message, param_hint="--problem-type")
        found[adapter] = problem
    return found


def _given(**options: Any) -> dict[str, Any]:
    """Without the flags that were left out, whose defaults are those of the Python interface."""
    return {name: value for name, value in options.items() if value is not None}


def _server() -> Any:
    """The module that serves; raises RequestError where its libraries are not installed."""
    try:
        return importlib.import_module("lorax_core.server.run")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lorax_core"):
            raise
        raise RequestError(
            f"lorax serve needs {error.name}, which is not installed", hint="pip install 'lorax-core[server]'"
        ) from error
